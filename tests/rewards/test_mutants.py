"""Mistakes in what rewards read and count: the test that is named for each notices it."""

from __future__ import annotations

import pytest
from mistakes import Mistake
from rewards import test_boxes as boxes
from rewards import test_failures as failures
from rewards import test_formats as formats
from rewards import test_matching as matching
from rewards import test_numbers as numbers

from lvrpo.rewards.boxes import Box, box_iou, match_boxes
from lvrpo.rewards.distance import edit_distance
from lvrpo.rewards.formats import BoxedFormat, TaggedFormat
from lvrpo.rewards.matching import (
    ContainsReward,
    CountReward,
    MatchReward,
    TextDistanceReward,
    named,
    normalized,
    parse_choice,
)
from lvrpo.rewards.numbers import equal_numbers, last_number
from lvrpo.rewards.score import score

LARGE, SMALL, APART = Box(0, 0, 4, 4), Box(1, 1, 3, 6), Box(5, 5, 6, 6)
BOTH = {"first": [LARGE, APART], "second": [SMALL]}
#: The greedy choice, LARGE for the first, leaves the second nothing.
CROSSED = {
    "first": [Box(0, 0, 4, 4), Box(0, 0, 4, 5)],
    "second": [Box(0, 0, 4, 4), Box(0, 0, 2, 2)],
    "threshold": 0.5,
}

MISTAKES = {
    "the first of several answers counts": Mistake(
        MatchReward.__call__,
        "for right in example.answers]",
        "for right in example.answers[:1]]",
        matching.test_any_of_several_answers_is_right,
        {"name": "exact"},
    ),
    "a text without an answer is an empty one": Mistake(
        MatchReward.__call__,
        "0.0 if given is None else max(found, default=math.nan)",
        "max(found, default=math.nan) + (given is None)",
        matching.test_every_rule_through_the_door_of_a_run,
        {"name": "exact"},
    ),
    "a part of a word is contained": Mistake(
        ContainsReward.match,
        'f" {wanted} " in f" {normalized(given)} "',
        "wanted in normalized(given)",
        matching.test_hyphens_and_scripts_are_kept,
    ),
    "hyphens are punctuation": Mistake(
        normalized,
        ".translate(_PUNCTUATION)",
        '.translate(_PUNCTUATION).replace("-", " ")',
        matching.test_hyphens_and_scripts_are_kept,
    ),
    "an article alone is left out": Mistake(
        normalized,
        " or words)",
        ")",
        matching.test_hyphens_and_scripts_are_kept,
    ),
    "similarity is of the right answer's length": Mistake(
        TextDistanceReward.match,
        "max(len(a), len(b), 1)",
        "max(len(b), 1)",
        matching.test_similarity_of_texts,
    ),
    "a replaced letter costs two": Mistake(
        edit_distance,
        "diagonal + (letter != other)",
        "diagonal + 2 * (letter != other)",
        matching.test_the_distance_is_levenshteins,
        {"a": "abc", "b": "acc"},
    ),
    "a count too small is better than the right one": Mistake(
        CountReward.match,
        "abs(",
        "(",
        matching.test_counts,
        {"counted": 3, "right": 4},
    ),
    "the shortest name counts": Mistake(
        named,
        "-len(pair[0])",
        "len(pair[0])",
        matching.test_the_longest_name_counts,
    ),
    "two equal choices are the first": Mistake(
        parse_choice,
        "len(same) == 1",
        "same",
        matching.test_what_is_no_choice,
    ),
    "a letter that is no choice is one": Mistake(
        parse_choice,
        "not choices or letter in choices",
        "True",
        matching.test_what_is_no_choice,
    ),
    "the first number of a text counts": Mistake(
        last_number,
        "reversed(list(_NUMBER.finditer(plain)))",
        "_NUMBER.finditer(plain)",
        numbers.test_the_last_number_of_a_text,
        {"text": "3 apples and 4 pears", "value": 4},
    ),
    "a part of a word is a number": Mistake(
        last_number,
        "(joined or not touches)",
        "True",
        numbers.test_the_last_number_of_a_text,
        {"text": "a1b", "value": None},
    ),
    "the tolerance is of the given number": Mistake(
        equal_numbers,
        "Fraction(relative) * abs(b)",
        "Fraction(relative) * abs(a)",
        numbers.test_tolerances_are_exact,
        {"a": 11, "b": 10, "relative": 0.095, "absolute": 0.0},
    ),
    "tolerances add up": Mistake(
        equal_numbers,
        "max(Fraction(relative) * abs(b), Fraction(absolute))",
        "Fraction(relative) * abs(b) + Fraction(absolute)",
        numbers.test_tolerances_are_exact,
        {"a": 12, "b": 10, "relative": 0.125, "absolute": 1.0},
    ),
    "a percent sign has to be there": Mistake(
        equal_numbers,
        "given.is_percent != expected.is_percent",
        "False",
        numbers.test_a_percent_sign_may_be_left_out,
        {"given_text": "50", "expected_text": "50%", "equal": True},
    ),
    "the first answer in tags counts": Mistake(
        TaggedFormat.answer_of,
        'text.rfind(f"</{self.answer}>")',
        'text.find(f"</{self.answer}>")',
        formats.test_other_forms_may_have_an_answer_and_do_not_fit,
        {"text": "<think>a</think><answer>3</answer><answer>4</answer>", "answer": "4"},
    ),
    "words around the tags fit": Mistake(
        TaggedFormat.fits,
        "re.fullmatch(",
        "re.search(",
        formats.test_other_forms_may_have_an_answer_and_do_not_fit,
        {"text": "<think>a</think><answer>4</answer> 5", "answer": "4"},
    ),
    "a box ends at its first brace": Mistake(
        BoxedFormat.answer_of,
        '{"{": 1, "}": -1}',
        '{"}": -1}',
        formats.test_boxes,
        {"text": r"\boxed{\frac{1}{2}}", "answer": r"\frac{1}{2}"},
    ),
    "the union counts what is inside twice": Mistake(
        box_iou,
        " - inside",
        "",
        boxes.test_iou_is_that_of_sets_of_pixels,
        BOTH,
    ),
    "boxes apart overlap": Mistake(
        box_iou,
        "np.clip(sides + pixel, 0, None).prod(axis=2)",
        "(sides + pixel).prod(axis=2)",
        boxes.test_iou_is_that_of_sets_of_pixels,
        {"first": [LARGE], "second": [APART]},
    ),
    "boxes too many cost nothing": Mistake(
        match_boxes,
        "total / max(iou.shape)",
        "total / min(iou.shape)",
        boxes.test_the_assignment_is_the_best_of_all,
        BOTH | {"threshold": 0.5},
    ),
    "two boxes cover the same one": Mistake(
        match_boxes,
        "iou[linear_sum_assignment(iou, maximize=True)].sum()",
        "iou.max(axis=1).sum()",
        boxes.test_the_assignment_is_the_best_of_all,
        CROSSED,
    ),
    "labels are not looked at": Mistake(
        match_boxes,
        "normalized(box.label) != normalized(other.label)",
        "False",
        boxes.test_labels_tell_boxes_apart,
    ),
    "a penalty of a cut answer is forgiven": Mistake(
        score,
        "table.clamp(max=0.0)",
        "torch.zeros_like(table)",
        failures.test_a_cut_answer_scores_as_the_setting_says,
        {"values": [-1.0] * 15},
    ),
    "a cut answer keeps its score": Mistake(
        score,
        "table.clamp(max=0.0)",
        "table",
        failures.test_a_cut_answer_scores_as_the_setting_says,
        {"values": [1.0] * 15},
    ),
    "cut answers that are to be left out are not": Mistake(
        score,
        "table.masked_fill(cut, math.nan)",
        "table",
        failures.test_a_cut_answer_scores_as_the_setting_says,
        {"values": [1.0] * 15},
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_noticed(mistake):
    assert mistake.is_noticed()
