"""GenEval's prompts and rules: whoever draws what is asked for is right, and nobody else."""

from __future__ import annotations

import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lvrpo.data.jsonl import JsonlExamples
from lvrpo.rewards.boxes import Box
from lvrpo.rewards.geneval import (
    Detection,
    GenevalReward,
    GenevalRule,
    Thresholds,
    geneval_rule,
    kept_objects,
    relations,
)
from lvrpo.rewards.reward import RewardError, Samples
from lvrpo.rewards.score import score

#: One line of each kind, in the form of the published file.
LINES = [
    {"tag": "single_object", "include": [{"class": "bench", "count": 1}]},
    {"tag": "two_object", "include": [{"class": "cup", "count": 1}, {"class": "dog", "count": 1}]},
    {
        "tag": "counting",
        "include": [{"class": "dog", "count": 2}],
        "exclude": [{"class": "dog", "count": 3}],
    },
    {"tag": "colors", "include": [{"class": "cup", "count": 1, "color": "red"}]},
    {
        "tag": "position",
        "include": [
            {"class": "cup", "count": 1},
            {"class": "dog", "count": 1, "position": ["left of", 0]},
        ],
    },
    {
        "tag": "color_attr",
        "include": [
            {"class": "cup", "count": 1, "color": "red"},
            {"class": "dog", "count": 1, "color": "blue"},
        ],
    },
]
SIDE = 64


@pytest.fixture
def examples(tmp_path):
    path = tmp_path / "evaluation_metadata.jsonl"
    lines = [json.dumps(line | {"prompt": f"a photo of {line['tag']}"}) for line in LINES]
    path.write_text("\n".join(lines) + "\n")
    return list(JsonlExamples(path, (3, SIDE, SIDE)))


def thing(label, x, y, confidence=0.95, size=8.0):
    return Detection(Box(x, y, x + size, y + size, label), confidence)


CUP, DOG, BENCH = thing("cup", 40, 20), thing("dog", 8, 20), thing("bench", 20, 20)
#: What is in the drawing, the colour of all cups and dogs, and which prompts are then right.
SCENES = [
    ([BENCH], "red", "single_object"),
    ([CUP, DOG], "red", "two_object colors position"),
    ([CUP, DOG], "", "two_object position"),
    ([CUP, thing("dog", 50, 20)], "red", "two_object colors"),
    ([DOG, thing("dog", 40, 40)], "", "counting"),
    ([DOG, thing("dog", 40, 40), thing("dog", 40, 10)], "", ""),
    ([DOG, thing("dog", 40, 40), thing("dog", 40, 10, 0.5)], "", "counting"),
    ([DOG, thing("dog", 40, 40, 0.5)], "", ""),
    ([thing("bench", 0, 0, 0.31)], "", "single_object"),
    ([thing("bench", 0, 0, 0.29)], "", ""),
    ([], "red", ""),
]


@pytest.mark.parametrize(("found", "color", "right"), SCENES)
def test_scenes_by_hand(examples, found, color, right):
    reward = GenevalReward(
        lambda images: [found[::-1]] * len(images), lambda image, objects: [color] * len(objects)
    )
    samples = Samples.of_images(examples, torch.zeros(len(examples), 3, SIDE, SIDE))
    scores = score([reward], samples)[:, 0].tolist()
    rightly = [example.kind for example, given in zip(examples, scores, strict=True) if given]
    assert rightly == right.split()
    assert set(scores) <= {0.0, 1.0}


def test_each_object_has_its_own_colour(examples):
    def colors(image, objects):
        return ["red" if each.box.label == "cup" else "blue" for each in objects]

    reward = GenevalReward(lambda images: [[CUP, DOG]] * len(images), colors)
    given = reward(Samples.of_images(examples, torch.zeros(len(examples), 3, SIDE, SIDE)))
    assert given[-1] == 1
    partial = GenevalReward(lambda images: [[CUP]] * len(images), colors, strict_weight=0.5)
    given = partial(Samples.of_images(examples, torch.zeros(len(examples), 3, SIDE, SIDE)))
    assert given.tolist() == [0, 0.25, 0.25, 1, 0.25, 0.25]


def test_the_published_lines_are_prompts(examples):
    assert [example.kind for example in examples] == [line["tag"] for line in LINES]
    assert {example.task for example in examples} == {"generate"}
    assert examples[0].uid == "evaluation_metadata:1"
    assert [geneval_rule(example).tag for example in examples] == [line["tag"] for line in LINES]
    assert geneval_rule(examples[2]).exclude[0].count == 3


@given(st.floats(0, 2 * math.pi), st.floats(20, 60), st.integers(1, 10), st.integers(1, 10))
def test_relations_are_those_of_the_angle(angle, distance, size, other):
    """Of squares that are far apart for their sizes, but for what the margin takes off."""
    x, y = 100 + distance * math.cos(angle), 100 + distance * math.sin(angle)
    first = Box(x - size / 2, y - size / 2, x + size / 2, y + size / 2)
    second = Box(100 - other / 2, 100 - other / 2, 100 + other / 2, 100 + other / 2)
    along = {
        "right of": math.cos(angle),
        "left of": -math.cos(angle),
        "below": math.sin(angle),
        "above": -math.sin(angle),
    }
    shift = 0.1 * (size + other) / distance
    sure = {name for name, share in along.items() if share - shift > 0.5 + 1e-9}
    maybe = {name for name, share in along.items() if share - shift > 0.5 - 1e-9}
    assert sure <= relations(first, second) <= maybe
    mirrored = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
    assert {mirrored[each] for each in relations(second, first)} == relations(first, second)


def test_what_lies_upon_each_other_has_no_relation():
    assert relations(Box(0, 0, 10, 10), Box(1, 1, 11, 11)) == set()
    assert relations(Box(0, 0, 10, 10), Box(0, 0, 10, 10)) == set()
    assert relations(Box(0, 0, 10, 10), Box(1, 1, 11, 11), margin=0.0) == {"left of", "above"}


def test_what_counts_as_found():
    rule = GenevalRule((), tag="single_object")
    many = [thing("dog", 0, 0, 0.4 + i / 100) for i in range(20)]
    kept = kept_objects(many, rule, Thresholds())["dog"]
    assert [each.confidence for each in kept] == sorted((d.confidence for d in many), reverse=True)[
        :16
    ]
    apart = [thing("dog", 0, 0, 0.9), thing("dog", 1, 0, 0.8), thing("dog", 40, 0, 0.7)]
    assert len(kept_objects(apart, rule, Thresholds())["dog"]) == 3
    alone = kept_objects(apart, rule, Thresholds(overlap=0.5))["dog"]
    assert [each.confidence for each in alone] == [0.9, 0.7]


def test_a_rule_that_cannot_be_read_is_named(tmp_path):
    good = {"class": "cup", "count": 1}
    wrong = {
        "include of 'data:1' is {'class'": {"include": good},
        "is empty, expected at least one object": {"include": []},
        r"include\[0\] of 'data:1' is {'class': 'cup'}, expected": {"include": [{"class": "cup"}]},
        "count is 0, expected an integer >= 1": {"include": [good | {"count": 0}]},
        "position is 'near', expected one of": {
            "include": [good, good | {"position": ["near", 0]}]
        },
        "relative to 1, expected 0 to 0": {"include": [good, good | {"position": ["above", 1]}]},
    }
    path = tmp_path / "data.jsonl"
    for message, columns in wrong.items():
        path.write_text(json.dumps({"prompt": "x", "tag": "t"} | columns))
        with pytest.raises(ValueError, match=message):
            geneval_rule(JsonlExamples(path, (3, 8, 8))[0])


def test_what_it_cannot_score(examples, tmp_path):
    texts = GenevalReward(lambda images: [])
    path = tmp_path / "data.jsonl"
    path.write_text('{"task": "generate", "prompt": "draw"}')
    plain = JsonlExamples(path, (3, 8, 8))[:]
    assert texts(Samples.of_images(plain, torch.zeros(1, 3, 8, 8))).isnan().all()
    with pytest.raises(RewardError, match="returned 0 lists for 1 drawings"):
        score([texts], Samples.of_images(examples[:1], torch.zeros(1, 3, SIDE, SIDE)))
    colourless = GenevalReward(lambda images: [[CUP]])
    with pytest.raises(RewardError, match="asks for red cup, and GenevalReward has no classify"):
        score([colourless], Samples.of_images(examples[3:4], torch.zeros(1, 3, SIDE, SIDE)))
    with pytest.raises(ValueError, match="strict_weight is 2"):
        GenevalReward(lambda images: [], strict_weight=2)
