from __future__ import annotations

import dataclasses
import itertools
import json

import numpy as np
import pytest

from lvrpo.data.example import (
    RELATIONS,
    Example,
    LayoutRule,
    RelationRule,
    SumRule,
    check_disjoint,
    picture_hash,
    rule_from_json,
    rule_to_json,
)

LAYOUT = LayoutRule(2, 2, (3, None, None, 7))
RULES = [LAYOUT, RelationRule(2, 2, 3, "above", 7), SumRule(9)]


def test_layout_partial_counts_digits_and_occupancy():
    assert LAYOUT.partial((3, None, None, 7)) == 1
    assert LAYOUT.partial((3, None, None, 8)) == (1 + 1) / 3  # one digit right, all cells right
    assert LAYOUT.partial((3, None, None, None)) == (1 + 3 / 4) / 3
    assert LAYOUT.partial((None, 1, 1, None)) == 0
    assert not LAYOUT.satisfied_by((3, None, 1, 7))


@pytest.mark.parametrize(
    ("cells", "relation", "holds"),
    [
        ((3, None, 7, None), "above", True),
        ((3, None, 7, None), "below", False),
        ((3, None, None, 7), "above", False),  # the other column
        ((7, 3, None, None), "right of", True),
        ((3, 7, None, None), "left of", True),
        ((3, 7, 3, None), "left of", False),  # one digit too many
        ((3, None, None, None), "left of", False),
    ],
)
def test_relation(cells, relation, holds):
    assert RelationRule(2, 2, 3, relation, 7).satisfied_by(cells) == holds


def test_a_relation_of_equal_digits_needs_two_of_them():
    rule = RelationRule(2, 2, 3, "above", 3)
    assert rule.satisfied_by((3, None, 3, None))
    assert not rule.satisfied_by((3, None, None, None))
    assert rule.partial((3, None, None, 3)) == 3 / 4


def test_sum_partial_falls_with_distance():
    scores = [SumRule(9).partial((4, None, None, other)) for other in (5, 6, 9, None)]
    assert scores[0] == 1
    assert scores == sorted(scores, reverse=True)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: type(rule).__name__)
def test_strict_is_partial_of_one_for_every_drawing(rule):
    choices = (None, 3, 4, 5, 7)
    scores = {cells: rule.partial(cells) for cells in itertools.product(choices, repeat=4)}
    assert all(0 <= score <= 1 for score in scores.values())
    assert any(rule.satisfied_by(cells) for cells in scores)
    assert all(rule.satisfied_by(cells) == (score == 1) for cells, score in scores.items())


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: type(rule).__name__)
def test_rules_survive_json(rule):
    assert rule_from_json(json.loads(json.dumps(rule_to_json(rule)))) == rule


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"kind": "shape"}, "kind is 'shape'"),
        ({"kind": "sum"}, "lacks 'total'"),
        ({"kind": "sum", "total": 9, "colour": 1}, "no entry 'colour'"),
        ({"kind": "sum", "total": "9"}, "expected an integer"),
        ({"kind": "sum", "total": 19}, "no 2 digits sum to 19"),
        ({"kind": "layout", "rows": 2, "cols": 2, "digits": [1]}, "1 digits for 2 x 2"),
        ({"kind": "layout", "rows": 1, "cols": 1, "digits": [True]}, "digits and nulls"),
        ({"kind": "layout", "rows": 1, "cols": 1, "digits": [10]}, "10 is not a digit"),
        ({"kind": "layout", "rows": 0, "cols": 0, "digits": []}, "expected >= 1"),
        (
            {"kind": "relation", "rows": 2, "cols": 2, "first": 1, "relation": "on", "second": 2},
            "'on'",
        ),
    ],
)
def test_bad_rules_are_refused(data, message):
    with pytest.raises(ValueError, match=message):
        rule_from_json(data)


def test_two_wordings_of_one_requirement_have_one_key():
    assert RelationRule(2, 2, 3, "above", 7).key == RelationRule(2, 2, 7, "below", 3).key
    assert RelationRule(2, 2, 3, "left of", 7).key == RelationRule(2, 2, 7, "right of", 3).key
    assert len({RelationRule(2, 2, 3, relation, 7).key for relation in RELATIONS}) == 4


def test_example_holds_what_its_task_needs():
    picture = np.zeros((1, 16, 16), np.float32)
    with pytest.raises(ValueError, match="needs 'answer'"):
        Example("understand", "a", "what", image=picture)
    with pytest.raises(ValueError, match="takes no 'image'"):
        Example("generate", "a", "draw", image=picture)
    with pytest.raises(ValueError, match="task is 'edit'"):
        Example("edit", "a", "what")  # type: ignore[arg-type]
    with pytest.raises(dataclasses.FrozenInstanceError):
        Example("generate", "a", "draw").prompt = "other"  # type: ignore[misc]


def test_overlap_is_found_by_content_not_by_name():
    def drawing(uid, prompt):
        return Example("generate", uid, prompt, rule=LAYOUT)

    train, test = [drawing("a", "3 and 7")], [drawing("b", "7 and 3")]
    check_disjoint({"train": train, "test": [drawing("c", "x") for _ in range(0)]})
    with pytest.raises(ValueError, match=r"'b' of test is also 'a' of train: the same rule"):
        check_disjoint({"train": train, "test": test})
    check_disjoint({"train": [*train, *train]})  # a repeat inside a split is no overlap


def test_what_gives_an_answer_or_a_drawing_away_is_an_overlap_and_a_wording_is_not():
    dark, light = (np.full((1, 4, 4), shade, np.float32) for shade in (0.0, 1.0))

    def question(prompt, image):
        return Example("understand", f"q {prompt}", prompt, image=image, answer="yes")

    def drawing(prompt, target=None, rule=None):
        return Example("generate", f"d {prompt}", prompt, target=target, rule=rule)

    for ours, theirs in [
        (question("is it dark", dark), question("is it dark", light)),
        (question("is it dark", dark), question("is it light", dark)),
        (drawing("a boot", dark), drawing("a boot", light)),
        (drawing("a boot", dark), drawing("a shoe", dark)),
        (drawing("a boot", dark), drawing("a boot")),
        (drawing("a boot"), drawing("a boot")),
        (drawing("a boot", rule=LAYOUT), drawing("a boot", dark)),
    ]:
        check_disjoint({"train": [ours], "test": [theirs]})
    for ours, theirs, shared in [
        (question("is it dark", dark), question("is it dark", dark.copy()), "question and picture"),
        (drawing("a boot", dark), drawing("a boot", dark.copy()), "wording and target"),
        (drawing("a boot", dark, LAYOUT), drawing("a shoe", light, LAYOUT), "rule"),
    ]:
        with pytest.raises(ValueError, match=f"also '.*' of train: the same {shared}$"):
            check_disjoint({"train": [ours], "test": [theirs]})


def test_picture_hash_sees_every_pixel_and_the_shape():
    picture = np.zeros((1, 4, 4), np.float32)
    other = picture.copy()
    other[0, 3, 3] = 0.01
    hashes = {picture_hash(picture), picture_hash(other), picture_hash(picture.reshape(1, 2, 8))}
    assert len(hashes) == 3
