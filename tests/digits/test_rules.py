from __future__ import annotations

import itertools
import json

import pytest

from lvrpo.digits.rules import (
    RELATIONS,
    LayoutRule,
    RelationRule,
    SumRule,
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
