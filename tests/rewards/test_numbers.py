"""Numbers: what is printed is read back, in every way to write one, and nothing else is."""

from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lvrpo.rewards.numbers import Number, equal_numbers, last_number, parse_number

INTEGERS = st.integers(-(10**30), 10**30)
WHOLE = st.integers(0, 10**12)
#: (a way to write an integer, or a sign and a positive one)
WAYS = [
    "{}",
    "{:,}",
    "${}$",
    r"\boxed{{{}}}",
    r"$\boxed{{{:,}}}$",
    "{}.",
    "{}.0",
    "  {}\n",
    r"\({}\)",
    r"\text{{{}}}",
]


@given(INTEGERS, st.sampled_from(WAYS))
def test_integers_are_read_back(value, way):
    assert parse_number(way.format(value)) == Number(Fraction(value))


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_floats_are_read_back(value):
    for text in (repr(value), f"{value:.17e}", f"{value:.17E}".replace("-", "\u2212")):
        assert float(parse_number(text).value) == value
    if abs(value) > 1e300:  # would be rounded to infinity
        return
    mantissa, _, power = repr(float(f"{value:.6e}")).partition("e")
    for times in (r"\times", "\u00d7", r"\cdot", "*"):
        text = f"{mantissa} {times} 10^{{{power or 0}}}"
        assert float(parse_number(text).value) == float(f"{value:.6e}")


@given(st.integers(-(10**9), 10**9), st.integers(1, 10**9))
def test_fractions_are_read_back(above, below):
    value = Fraction(above, below)
    for text in (f"{above}/{below}", f"{above} / {below}", rf"\frac{{{above}}}{{{below}}}"):
        assert parse_number(text).value == value
    whole, rest = divmod(abs(above), below)
    if rest:
        for text in (f"{whole} {rest}/{below}", rf"{whole}\dfrac{{{rest}}}{{{below}}}"):
            assert parse_number(text).value == abs(value)
        assert parse_number(f"-{whole} {rest}/{below}").value == -abs(value)


@given(WHOLE, st.sampled_from([",", "\u202f", "\u2009", "'"]))
def test_thousands_are_read_back(value, separator):
    assert parse_number(f"{value:,}".replace(",", separator)).value == value


@given(st.decimals(0, 10**6, places=3), st.sampled_from(["%", " %", r"\%"]))
def test_percents_are_read_back(value, sign):
    assert parse_number(f"{value}{sign}") == Number(Fraction(value) / 100, True)


@pytest.mark.parametrize(
    "text",
    ["", "x", "1 2", "1,23", "1,2345", ",123", "1.2.3", "12 cm", "--1", "1/0", "1e9999", "nan",
     "inf", "1_000", "٣", "0x10", "1/2/3", "9" * 301, r"\boxed{}", "five", "1e", "%", ".", "-"],
)  # fmt: skip
def test_what_is_no_number(text):
    assert parse_number(text) is None


@given(st.text("0123456789.,/%$-+eE^*{}\\ fracboxed", max_size=40) | st.text(max_size=20))
def test_no_text_is_too_odd(text):
    for found in (parse_number(text), last_number(text)):
        assert found is None or isinstance(found.value, Fraction)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("The answer is 42.", 42),
        ("3 apples and 4 pears", 4),
        ("it costs $1,250.50, no more", Fraction(125050, 100)),
        ("so x2 = -7", -7),
        ("x=-7", -7),
        ("pages 3-5", 5),
        ("1, 2 and -3.", -3),
        (r"thus \boxed{\frac{3}{4}}", Fraction(3, 4)),
        ("half of 1 1/2 cups", Fraction(3, 2)),
        ("25 % of all", Fraction(1, 4)),
        ("version 1.2.3", None),
        ("a1b", None),
        ("none", None),
    ],
)
def test_the_last_number_of_a_text(text, value):
    found = last_number(text)
    assert (None if found is None else found.value) == value


@given(st.fractions(), st.fractions(), st.floats(0, 1), st.floats(0, 1e6))
def test_tolerances_are_exact(a, b, relative, absolute):
    near = abs(a - b) <= max(Fraction(relative) * abs(b), Fraction(absolute))
    options = {"relative": relative, "absolute": absolute}
    assert equal_numbers(Number(a), Number(b), **options) == near
    assert equal_numbers(Number(b), Number(b), **options)
    assert not near or equal_numbers(Number(a), Number(b), relative=1.0, absolute=1e6)


@pytest.mark.parametrize(
    ("given_text", "expected_text", "equal"),
    [
        ("0.5", "50%", True),
        ("50", "50%", True),
        ("50%", "50", True),
        ("50%", "0.5", True),
        ("50%", "50.0 %", True),
        ("5000", "50%", False),
        ("0.5%", "50%", False),
        ("0.005", "50%", False),
    ],
)
def test_a_percent_sign_may_be_left_out(given_text, expected_text, equal):
    assert equal_numbers(parse_number(given_text), parse_number(expected_text)) == equal
