r"""Numbers as people and models write them: "1,234.5", "-3/4", "50%", "\frac{1}{2}", "1.2e-3"."""

from __future__ import annotations

import re
from fractions import Fraction
from typing import NamedTuple

#: Longer runs of digits and larger powers of ten are no answers, and take long to compute with.
MOST_DIGITS, MOST_POWER = 300, 400

_DIGITS = rf"(?:\d{{1,3}}(?:,\d{{3}})+|\d{{1,{MOST_DIGITS}}})"
_UNSIGNED = rf"(?:{_DIGITS}(?:\.\d{{0,{MOST_DIGITS}}})?|\.\d{{1,{MOST_DIGITS}}})"
_POWER = (
    r"(?:[eE](?P<power>[+-]?\d{1,3})|\*10\^(?:(?P<bare>[+-]?\d{1,3})|\{(?P<braced>[+-]?\d{1,3})\}))"
)
_NUMBER = re.compile(
    rf"(?P<sign>[+-]?)[$€£¥]?"
    rf"(?:(?P<whole>\d{{1,{MOST_DIGITS}}})[ +](?=\d+/))?"
    rf"(?P<number>{_UNSIGNED}){_POWER}?(?:/(?P<below>{_UNSIGNED}))?(?P<percent>%?)",
    re.ASCII,
)
_LATEX_FRACTION = re.compile(r"\\[dt]?frac\s*(?:\{([^{}]*)\}|(\d))\s*(?:\{([^{}]*)\}|(\d))")
#: What has no value of its own: LaTeX spacing and dollar signs around a formula.
_WRAPPING = re.compile(r"\\(?:left|right|displaystyle|,|;|!|:| )|\\[()\[\]]")
_SAME = str.maketrans(
    # Minus and en dash, the times sign, two slashes of fractions, the wide percent sign.
    {"\u2212": "-", "\u2013": "-", "\u00d7": "*", "\u2044": "/", "\u2215": "/", "\uff05": "%"}
    | {"\u00a0": " "}
    | dict.fromkeys("\u2009\u202f\u2007'\u2019", "")  # what separates thousands, beside the comma
)


class Number(NamedTuple):
    """A number as it was written.

    Attributes:
        value: exact; of "50%" one half.
        is_percent: whether it had a percent sign.
    """

    value: Fraction
    is_percent: bool = False


def parse_number(text: str) -> Number | None:
    r"""The number that a text is, or None where it is none.

    Signs, decimal points, thousands separated by commas, thin blanks or apostrophes, fractions
    ("3/4", "1 3/4", "\frac{3}{4}"), percents, powers of ten ("1.2e-3", "1.2 \times 10^{-3}") and a
    currency sign in front are read; so are LaTeX boxes and dollar signs around, and a full stop
    behind. A decimal comma is not: "1,234" would have two meanings.

    Args:
        text: of the number and nothing else.
    """
    found = _NUMBER.fullmatch(_plain(text))
    return None if found is None else _value(found)


def last_number(text: str) -> Number | None:
    """The last number in a text, written in any way that `parse_number` reads; None for none."""
    plain = _plain(text)
    # What a letter or a digit touches is part of a word, as in "x2" or "1.2.3".
    for found in reversed(list(_NUMBER.finditer(plain))):
        before = plain[: found.start()][-1:]
        joined = bool(found["sign"]) and re.match(r"[\w)]", before)  # 3-5 ends in 5
        touches = re.match(r"\w|[.,]\d", plain[found.end() :]) or re.match(r"[\w.]", before)
        number = _value(found)
        if number is not None and (joined or not touches):
            return number._replace(value=abs(number.value)) if joined else number
    return None


def equal_numbers(
    given: Number, expected: Number, *, relative: float = 0.0, absolute: float = 0.0
) -> bool:
    """Whether |given - expected| <= max(relative |expected|, absolute), in exact arithmetic.

    Where one of the two alone has a percent sign, "50" for "50%" is right as well as "0.5".

    Args:
        given: number.
        expected: number.
        relative: tolerance, of the expected value.
        absolute: tolerance.
    """
    pairs = [(given.value, expected.value)]
    if given.is_percent != expected.is_percent:
        bare = [number.value * (100 if number.is_percent else 1) for number in (given, expected)]
        pairs.append((bare[0], bare[1]))
    return any(abs(a - b) <= max(Fraction(relative) * abs(b), Fraction(absolute)) for a, b in pairs)


def _plain(text: str) -> str:
    text = text.translate(_SAME).strip().rstrip(".").strip()
    text = re.sub(r"\\(?:boxed|text|mathrm)\s*\{([^{}]*(?:\{[^{}]*\}[^{}]*)*)\}", r"\1", text)
    text = _LATEX_FRACTION.sub(
        lambda m: f" {m[1] if m[2] is None else m[2]}/{m[3] if m[4] is None else m[4]}", text
    )
    text = _WRAPPING.sub("", text).replace("\\%", "%").replace("\\$", "$")
    text = re.sub(r"\s*(?:\\times|\\cdot|\*)\s*(?=10\^)", "*", text)
    if len(text) > 1 and text[0] == text[-1] == "$":
        text = text.strip("$")
    text = re.sub(r"\s*/\s*", "/", text)
    text = re.sub(r"\s+(?=%)|(?<=[+-])\s+(?=[\d.])", "", text)
    return " ".join(text.split())


def _value(found: re.Match[str]) -> Number | None:
    number = Fraction(found["number"].replace(",", "").rstrip(".") or "0")
    power = int(found["power"] or found["bare"] or found["braced"] or 0)
    if abs(power) > MOST_POWER:
        return None
    value = number * Fraction(10) ** power
    if found["below"] is not None:
        below = Fraction(found["below"].replace(",", "").rstrip("."))
        if not below:
            return None
        value /= below
    if found["whole"] is not None:
        value += int(found["whole"])
    if found["sign"] == "-":
        value = -value
    is_percent = bool(found["percent"])
    return Number(value / 100 if is_percent else value, is_percent)
