"""Boxes: every notation is read back, and the measures are what all assignments give."""

from __future__ import annotations

import itertools
import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lvrpo.data.example import Example
from lvrpo.rewards.boxes import Box, BoxReward, box_iou, match_boxes, parse_boxes
from lvrpo.rewards.registry import load_reward
from lvrpo.rewards.reward import RewardError, Samples
from lvrpo.rewards.score import score

LABELS = st.text("abc déж-", min_size=1, max_size=8).map(str.strip).filter(bool)
NUMBERS = st.integers(0, 1000) | st.integers(0, 1000).map(lambda n: n / 1000)


@st.composite
def some_boxes(draw, labelled=True, least=0):
    found = []
    for _ in range(draw(st.integers(least, 4))):
        x1, x2 = sorted((draw(NUMBERS), draw(NUMBERS)))
        y1, y2 = sorted((draw(NUMBERS), draw(NUMBERS)))
        found.append(Box(x1, y1, x2, y2, draw(LABELS) if labelled else ""))
    return found


#: How models write a list of boxes.
NOTATIONS = {
    "qwen": lambda boxes: (
        "```json\n"
        + json.dumps([{"bbox_2d": box[:4], "label": box.label} for box in boxes], indent=1)
        + "\n```"
    ),
    "objects": lambda boxes: json.dumps(
        {"objects": [{"box": box[:4], "class": box.label} for box in boxes]}
    ),
    "lines": lambda boxes: "Here: " + json.dumps([{"bbox": b[:4], "name": b.label} for b in boxes]),
    "tags": lambda boxes: "".join(
        f"<ref>{b.label}</ref><box>({b.x1},{b.y1}),({b.x2},{b.y2})</box>" for b in boxes
    ),
    "special tokens": lambda boxes: "\n".join(
        f"<|object_ref_start|>{b.label}<|object_ref_end|><|box_start|>({b.x1}, {b.y1}), "
        f"({b.x2}, {b.y2})<|box_end|>"
        for b in boxes
    ),
    "nested tags": lambda boxes: "".join(
        f"<ref>{b.label}</ref><box>[[{b.x1}, {b.y1}, {b.x2}, {b.y2}]]</box>" for b in boxes
    ),
}
PLAIN = {
    "list": lambda boxes: json.dumps([list(box[:4]) for box in boxes]),
    "text": lambda boxes: " and ".join(f"[{b.x1}, {b.y1}, {b.x2}, {b.y2}]" for b in boxes),
    "bare tags": lambda boxes: " ".join(
        f"<box>{b.x1}, {b.y1}, {b.x2}, {b.y2}</box>" for b in boxes
    ),
    "tuples": lambda boxes: "; ".join(f"({b.x1},{b.y1},{b.x2},{b.y2})" for b in boxes),
}


@given(some_boxes(), st.sampled_from(sorted(NOTATIONS)))
def test_labelled_boxes_are_read_back(boxes, notation):
    if notation == "nested tags":  # a list in a list is JSON, whose labels stand outside of it
        boxes = [box._replace(label="") for box in boxes[:1]]
        assert [box[:4] for box in parse_boxes(NOTATIONS[notation](boxes))] == [
            box[:4] for box in boxes
        ]
        return
    assert parse_boxes(NOTATIONS[notation](boxes)) == boxes


@given(some_boxes(labelled=False), st.sampled_from(sorted(PLAIN)))
def test_plain_boxes_are_read_back(boxes, notation):
    assert parse_boxes(PLAIN[notation](boxes)) == boxes


@given(st.text(max_size=30) | st.text('[]{}(),"0123456789.-<box/> e', max_size=60))
def test_no_text_is_too_odd(text):
    for box in parse_boxes(text):
        assert all(map(math.isfinite, box[:4]))


@pytest.mark.parametrize(
    "text",
    ["", "none", "[1, 2, 3]", "[1, 2, 3, 4, 5]", '{"bbox": [1, 2, 3]}', "[1, 2, 3, true]", "[[",
     '{"bbox": "1, 2, 3, 4"}', "[1, 2, 3, 1e999]", "[" * 5000],
)  # fmt: skip
def test_what_has_no_boxes(text):
    assert parse_boxes(text) == []


def pixels_in(box: Box) -> set[tuple[int, int]]:
    return set(itertools.product(range(int(box.x1), int(box.x2)), range(int(box.y1), int(box.y2))))


SMALL = st.builds(Box, *[st.integers(0, 6)] * 4, label=st.just(""))


@given(st.lists(SMALL, max_size=4), st.lists(SMALL, max_size=4))
def test_iou_is_that_of_sets_of_pixels(first, second):
    found = box_iou(first, second)
    assert found.shape == (len(first), len(second))
    for (i, a), (j, b) in itertools.product(enumerate(first), enumerate(second)):
        ours, theirs = pixels_in(a), pixels_in(b)
        union = len(ours | theirs)
        assert found[i, j] == pytest.approx(len(ours & theirs) / union if union else 0)
    wider = [box._replace(x2=box.x2 + 1, y2=box.y2 + 1) for box in second]
    more = [box._replace(x2=box.x2 + 1, y2=box.y2 + 1) for box in first]
    np.testing.assert_array_equal(box_iou(first, second, pixel=1.0), box_iou(more, wider))


@given(st.lists(SMALL, max_size=4), st.lists(SMALL, max_size=4), st.floats(0.05, 1))
def test_the_assignment_is_the_best_of_all(first, second, threshold):
    iou = box_iou(first, second)
    few, many = sorted((len(first), len(second)))
    table = iou if len(first) <= len(second) else iou.T
    sums, counts = [0.0], [0]
    for columns in itertools.permutations(range(many), few):
        chosen = [table[row, column] for row, column in enumerate(columns)]
        sums.append(sum(chosen))
        counts.append(sum(each >= threshold for each in chosen))
    mean, f1 = match_boxes(first, second, threshold=threshold)
    assert mean == pytest.approx(max(sums) / many if many else 1)
    assert f1 == pytest.approx(2 * max(counts) / (few + many) if many else 1)
    assert match_boxes(second, first, threshold=threshold) == pytest.approx((mean, f1))


def test_labels_tell_boxes_apart():
    cat, dog = Box(0, 0, 4, 4, "cat"), Box(0, 0, 4, 4, "dog")
    assert match_boxes([cat], [dog]) == (0, 0)
    assert match_boxes([cat], [cat._replace(label="Cat.")]) == (1, 1)
    assert match_boxes([cat._replace(label="")], [dog]) == (1, 1)


def question(boxes):
    image = np.zeros((1, 8, 8), np.float32)
    extra = {} if boxes is None else {"boxes": boxes}
    return Example("understand", "q", "where", image=image, answer="see boxes", extra=extra)


def test_the_reward():
    example = question([{"bbox_2d": [0, 0, 4, 4], "label": "cat"}])
    right, half = '[{"bbox_2d": [0, 0, 4, 4], "label": "cat"}]', "[0, 0, 4, 2]"
    texts = [right, half, "[0, 0, 4, 4], [5, 5, 6, 6]", "nowhere", ""]
    samples = Samples.of_texts([example] * len(texts), texts)
    assert score([load_reward("boxes")], samples)[:, 0].tolist() == [1, 0.5, 0.5, 0, 0]
    f1 = load_reward("boxes", arguments={"measure": "f1", "threshold": 0.5})
    assert score([f1], samples)[:, 0].tolist() == pytest.approx([1, 1, 2 / 3, 0, 0])
    nothing = Samples.of_texts([question([])] * 2, ["there is none", right])
    assert score([BoxReward()], nothing)[:, 0].tolist() == [1, 0]
    assert torch.isnan(BoxReward()(Samples.of_texts([question(None)], [right]))).all()
    with pytest.raises(RewardError, match=r"boxes of 'q' is \[1, 2\], expected \[\[x1, y1, x2, y2"):
        score([BoxReward()], Samples.of_texts([question([1, 2])], [""]))
    for wrong in ({"measure": "giou"}, {"threshold": 0}):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))} is"):
            BoxReward(**wrong)
