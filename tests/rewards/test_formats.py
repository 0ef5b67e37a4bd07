"""Where the answer of a text stands: whatever is put into a form is read back out of it."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lvrpo.data.example import Example
from lvrpo.rewards.formats import (
    BoxedFormat,
    FormatReward,
    PatternFormat,
    PlainFormat,
    TaggedFormat,
    answer_format,
)
from lvrpo.rewards.registry import load_reward
from lvrpo.rewards.reward import RewardError, Samples
from lvrpo.rewards.score import score

TEXTS = st.text(max_size=30)
UNTAGGED = TEXTS.filter(lambda text: "<" not in text and ">" not in text)


def balanced(depth: int = 2) -> st.SearchStrategy[str]:
    """Texts whose braces are balanced, without backslashes."""
    plain = st.text("ab1 +,[]", max_size=4)
    if not depth:
        return plain
    inner = balanced(depth - 1)
    return st.builds("{}{{{}}}{}".format, plain, inner, inner) | plain


@given(UNTAGGED, UNTAGGED, st.sampled_from(["", " ", "\n\n"]))
def test_tags_are_read_back(thought, answer, between):
    form = TaggedFormat()
    text = f"<think>{thought}</think>{between}<answer>{answer}</answer>\n"
    assert form.fits(text)
    assert form.answer_of(text) == (answer.strip() or None)


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("<answer>4</answer>", "4"),  # no thought
        ("<think>a</think> so <answer>4</answer>", "4"),
        ("<think>a</think><answer>4</answer> 5", "4"),
        ("<answer>4</answer><think>a</think>", "4"),
        ("<think>a</think><answer>3</answer><answer>4</answer>", "4"),
        ("<think>a<think>b</think></think><answer>4</answer>", "4"),
        ("<think>a</think><answer>4", None),
        ("4</answer>", None),
        ("<think>a</think>", None),
        ("", None),
    ],
)
def test_other_forms_may_have_an_answer_and_do_not_fit(text, answer):
    assert not TaggedFormat().fits(text)
    assert TaggedFormat().answer_of(text) == answer


def test_tags_have_any_names_and_a_thought_is_optional():
    form = TaggedFormat(thought="", answer="solution")
    assert form.fits(" <solution>\n4\n</solution> ")
    assert form.answer_of("<solution>\n4\n</solution>") == "4"
    assert not form.fits("why <solution>4</solution>")


@given(TEXTS.filter(lambda text: "\\" not in text), balanced(), balanced())
def test_the_last_box_is_read_back(before, first, last):
    text = rf"{before}\boxed{{{first}}} so \boxed{{{last}}}"
    assert BoxedFormat().answer_of(text) == (last.strip() or None)


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed {7} and then", "7"),
        (r"\fbox{a}", "a"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{1", None),
        (r"\boxed{5} or \boxed{1", "5"),
        ("boxed{1}", None),
    ],
)
def test_boxes(text, answer):
    assert BoxedFormat().answer_of(text) == answer
    assert BoxedFormat().fits(text) == (answer is not None)


def test_a_pattern_names_its_answer():
    assert PatternFormat(r"(\w+) is (?P<answer>\d+)").answer_of("it is 4\n") == "4"
    assert PatternFormat(r"it is (\d+)").answer_of("it is 4") == "4"
    assert PatternFormat(r"\d+").answer_of(" 4 ") == "4"
    assert PatternFormat(r"(a)?b").answer_of("b") is None
    assert not PatternFormat(r"\d+").fits("4 or 5")
    assert PatternFormat("a.*b").fits("a\nb")
    with pytest.raises(ValueError, match=r"'\(' is no pattern: missing \)"):
        PatternFormat("(")


@given(TEXTS)
def test_no_text_is_too_odd(text):
    for form in (PlainFormat(), TaggedFormat(), BoxedFormat(), PatternFormat("(.*)")):
        answer = form.answer_of(text)
        assert answer is None or answer == answer.strip() != ""
    assert PlainFormat().fits(text) == (PlainFormat().answer_of(text) is not None)


def test_names():
    assert answer_format("boxed") == BoxedFormat()
    assert answer_format(r"regex:it is: (\d)").answer_of("it is: 4") == "4"
    assert answer_format(TaggedFormat("a", "b")) == TaggedFormat("a", "b")
    with pytest.raises(ValueError, match="format is 'latex', expected one of plain, tagged, boxed"):
        answer_format("latex")


def test_the_form_as_a_reward():
    example = Example("understand", "q", "what", image=np.zeros((1, 8, 8), np.float32), answer="1")
    samples = Samples.of_texts([example] * 2, ["<think></think><answer>1</answer>", "1"])
    assert score([load_reward("format")], samples)[:, 0].tolist() == [1, 0]
    assert score([FormatReward("regex:\\d")], samples)[:, 0].tolist() == [0, 1]
    drawing = Samples(
        [Example("generate", "d", "draw")], [None], np.zeros((1, 1, 8, 8)), image_index=[0]
    )
    assert math.isnan(FormatReward()(drawing)[0])
    with pytest.raises(RewardError, match="'format': ValueError: format is 'x'"):
        load_reward("format", arguments={"format": "x"})
