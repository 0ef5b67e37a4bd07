"""Texts against right answers: what is right stays right however it is written, and no more is."""

from __future__ import annotations

import math
import string
from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lvrpo.data.example import Example
from lvrpo.rewards.answers import check_answers
from lvrpo.rewards.distance import edit_distance
from lvrpo.rewards.matching import (
    COLORS,
    POSITIONS,
    ChoiceReward,
    ColorReward,
    ContainsReward,
    CountReward,
    ExactReward,
    NormalizedReward,
    NumberReward,
    PositionReward,
    TextDistanceReward,
    named,
    normalized,
    parse_choice,
    parse_count,
)
from lvrpo.rewards.registry import load_reward
from lvrpo.rewards.reward import RewardError, Samples
from lvrpo.rewards.score import score

IMAGE = np.zeros((1, 8, 8), np.float32)
NAMES = [
    "exact",
    "normalized",
    "contains",
    "anls",
    "number",
    "count",
    "choice",
    "color",
    "position",
]
RIGHT = {"number": "3", "count": "3", "choice": "B", "color": "red", "position": "above"}
CHOICES = ["a red boat", "Paris", "3", "the cat's toy"]


def question(*answers: str, **extra: object) -> Example:
    first, *others = answers
    return Example(
        "understand", "q", "what", image=IMAGE, answer=first, other_answers=tuple(others),
        extra=extra,
    )  # fmt: skip


def scores(reward, example, *texts):
    found = score([reward], Samples.of_texts([example] * len(texts), texts))
    return found[:, 0].tolist()


@pytest.mark.parametrize("name", NAMES)
def test_every_rule_through_the_door_of_a_run(name):
    reward = load_reward(name, arguments={"format": "tagged"})
    assert reward.name == name
    right = RIGHT.get(name, "three boats")
    texts = f"<think>?</think><answer>{right}</answer>", "<answer>other</answer>", right, ""
    assert scores(reward, question(right), *texts) == [1, 0, 0, 0]
    drawing = Samples(
        [Example("generate", "d", "draw")], [None], torch.zeros(1, 1, 8, 8), image_index=[0]
    )
    assert math.isnan(score([reward], drawing))


@pytest.mark.parametrize("name", NAMES)
def test_any_of_several_answers_is_right(name):
    other = {"number": "4", "count": "40", "choice": "C", "color": "blue", "position": "left"}
    example = question(RIGHT.get(name, "a boat"), other.get(name, "a ship"))
    assert scores(load_reward(name), example, *example.answers) == [1, 1]


def test_r_ins_knows_several_answers_too():
    samples = Samples.of_texts([question("3", "three")] * 4, ["3", " three\n", "two", "7"])
    verdicts = check_answers(samples)
    assert verdicts.strict.tolist() == [1, 1, 0, 0]
    assert verdicts.format.tolist() == [1, 1, 1, 1]


def test_exact():
    example = question("a red  Boat")
    texts = ("a red Boat", " a  red Boat\n", "A red Boat", "red Boat")
    assert scores(ExactReward(), example, *texts) == [1, 1, 0, 0]


WORDS = st.lists(st.text(string.ascii_lowercase + "éжя", min_size=2, max_size=6), min_size=1)


@given(WORDS, st.sampled_from(["{}.", "The {}", "“{}”", " {}!\n", "a {}?", "({})"]), st.booleans())
def test_case_punctuation_and_articles_do_not_count(words, way, capital):
    text = " ".join(words)
    given_text = way.format(text.upper() if capital else text)
    example = question(text)
    assert scores(NormalizedReward(), example, given_text, f"{text} xyz") == [1, 0]
    assert scores(ContainsReward(), example, f"it is {given_text}, or so") == [1]


@given(st.text(max_size=20))
def test_normalizing_twice_is_normalizing_once(text):
    assert normalized(normalized(text)) == normalized(text)


def test_hyphens_and_scripts_are_kept():
    assert normalized("T-Shirt -") == "t-shirt"
    assert normalized("Рубашка!") == "рубашка"
    assert normalized("A.") == "a"
    assert scores(ContainsReward(), question("top-left"), "top", "at top-left of") == [0, 1]
    assert scores(ContainsReward(), question("cat"), "concatenate") == [0]


@cache
def distance(a: str, b: str) -> int:
    """By the definition."""
    if not a or not b:
        return len(a) + len(b)
    replaced = distance(a[1:], b[1:]) + (a[0] != b[0])
    return min(replaced, distance(a[1:], b) + 1, distance(a, b[1:]) + 1)


@given(st.text("abc", max_size=7), st.text("abc", max_size=7))
def test_the_distance_is_levenshteins(a, b):
    assert edit_distance(a, b) == distance(a, b)


def test_similarity_of_texts():
    found = scores(TextDistanceReward(), question("stop"), "STOP", "stop sign", "shop", "xyz", "")
    assert found == pytest.approx([1, 0, 0.75, 0, 0])
    assert scores(TextDistanceReward(threshold=0), question("stop"), "stop sign")[0] == (
        pytest.approx(1 - 5 / 9)
    )


def test_numbers():
    example = question("1,250")
    texts = ("1250", "1250.0", "1.25e3", "1250 cm", "1251")
    assert scores(NumberReward(), example, *texts) == [1, 1, 1, 0, 0]
    assert scores(NumberReward(anywhere=True), example, *texts) == [1, 1, 1, 1, 0]
    assert scores(NumberReward(relative=0.001), example, *texts) == [1, 1, 1, 0, 1]
    assert scores(NumberReward(absolute=0.5), example, "1250.5", "1250.51") == [1, 0]
    with pytest.raises(RewardError, match="ValueError: answer 'many' of 'q' is no number"):
        scores(NumberReward(), question("many"), "")
    for value in (-1, math.nan, math.inf):
        with pytest.raises(ValueError, match=f"relative is {value}, expected a number >= 0"):
            NumberReward(relative=value)


@given(st.integers(0, 40), st.integers(0, 40))
def test_counts(counted, right):
    (found,) = scores(CountReward(), question(str(right)), str(counted))
    wanted = 1 - min(1, abs(counted - right) / right) if right else float(counted == right)
    assert found == pytest.approx(wanted)
    strict = scores(CountReward(strict=True), question(str(right)), str(counted))
    assert strict == [float(counted == right)]


def test_counts_have_names():
    assert [parse_count(text) for text in ("zero", "Three.", "twenty", "12", "3.0")] == [
        0, 3, 20, 12, 3,
    ]  # fmt: skip
    assert [parse_count(text) for text in ("-1", "2.5", "50%", "many", "")] == [None] * 5


@pytest.mark.parametrize("at", range(len(CHOICES)))
@pytest.mark.parametrize(
    "way",
    ["{}", "({})", "{}.", "[{}]", "{})", "{}:", " {}\n", "The answer is {}.", "Answer: ({})",
     "option {}", "**{}**", "{{{}}}"],
)  # fmt: skip
def test_letters_of_choices(way, at):
    letter = "ABCD"[at]
    right = question(letter, choices=CHOICES)
    for text in (way.format(letter), way.format(letter.lower())):
        assert scores(ChoiceReward(), right, text) == [1]
        assert scores(ChoiceReward(), question("ABCD"[at - 1], choices=CHOICES), text) == [0]
        assert scores(ChoiceReward(), question(letter), text) == [1]


@pytest.mark.parametrize("at", range(len(CHOICES)))
@pytest.mark.parametrize(
    "way", ["{1}", "{0}. {1}", "({0}) {1}.", "{0}) {1}", "{0} - {1}", "{0}: {1}"]
)
def test_texts_of_choices(way, at):
    letter, text = "ABCD"[at], CHOICES[at]
    for answer in (letter, text, f"({letter})", f"{letter}. {text}"):
        example = question(answer, choices=CHOICES)
        assert scores(ChoiceReward(), example, way.format(letter, text)) == [1]
        assert scores(ChoiceReward(), example, way.format(letter, CHOICES[at - 1])) == [0]


def test_what_is_no_choice():
    letters = dict(zip("ABCD", CHOICES, strict=True))
    for text in ("", "E", "(E)", "A or B", "A, B", "boat", "a", "I", "Apple", "B. Rome", "AB"):
        expected = "A" if text == "a" else None
        assert parse_choice(text, letters) == expected, text
    assert parse_choice("B. Rome", {}) == "B"
    assert parse_choice("a red boat", {}) is None
    assert parse_choice("same", {"A": "same", "B": "Same."}) is None


def test_choices_of_the_data():
    named_choices = question("x", choices={"(X)": "yes", "y.": "no"})
    assert scores(ChoiceReward(), named_choices, "X", "yes", "y", "no") == [1, 1, 0, 0]
    with pytest.raises(RewardError, match="answer 'E' of 'q' is none of A, B, C, D"):
        scores(ChoiceReward(), question("E", choices=CHOICES), "A")
    for wrong in (3, "abc", [1, 2], {"AB": "x"}, ["x"] * 27):
        with pytest.raises(RewardError, match=r"choices of 'q' is .*, expected a list of at most"):
            scores(ChoiceReward(), question("A", choices=wrong), "A")


@pytest.mark.parametrize("name", COLORS)
def test_colors(name):
    others = [other for other in COLORS if other != name]
    example = question(f"it is {name}")
    texts = (name, f"A {name.upper()} one.", others[0], f"{name} and {others[0]}", "")
    assert scores(ColorReward(), example, *texts) == [1, 1, 0, 0, 0]


@pytest.mark.parametrize("name", POSITIONS)
def test_positions(name):
    reward = PositionReward()
    for way in POSITIONS[name]:
        texts = (f"It is {way} the cup", way.replace(" ", "-"), f"{name} {way}")
        assert scores(reward, question(name), *texts)[:2] == [1, 1], way
        others = [other for other in POSITIONS if other != name]
        assert scores(reward, question(name), *others) == [0] * len(others)


def test_the_longest_name_counts():
    assert named("at the top-left", POSITIONS) == {"top left"}
    assert named("top left and left", POSITIONS) == {"top left", "left"}
    assert named("grey or red", COLORS) == {"gray", "red"}
    with pytest.raises(RewardError, match="answer 'teal' of 'q' names none of red, orange"):
        scores(ColorReward(), question("teal"), "red")
