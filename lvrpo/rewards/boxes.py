"""Boxes in answers: reading them in the usual notations, and how well they cover the right ones."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lvrpo.data.example import Example
from lvrpo.rewards.formats import FormatLike, answer_format
from lvrpo.rewards.matching import normalized
from lvrpo.rewards.reward import Samples

#: Column with the right boxes: [[x1, y1, x2, y2], ...] or [{"bbox_2d": ..., "label": ...}, ...].
BOXES = "boxes"
#: Names of a box's corners in JSON, and of its label.
_CORNERS, _LABELS = ("bbox_2d", "bbox", "box"), ("label", "class", "name")


class Box(NamedTuple):
    """A box by two corners, in whatever unit.

    Attributes:
        x1: left.
        y1: top.
        x2: right.
        y2: bottom.
        label: of what is in it; empty where that is not said.
    """

    x1: float
    y1: float
    x2: float
    y2: float
    label: str = ""


_NUMBER = r"\s*(-?\d{1,12}(?:\.\d{0,12})?|-?\.\d{1,12})\s*"
_COMMA = ","
_FLAT = _COMMA.join([_NUMBER] * 4)
_PAIRS = rf"\({_NUMBER},{_NUMBER}\)\s*,?\s*\({_NUMBER},{_NUMBER}\)"
_TAG = r"<(?:box|\|box_start\|)>"
_BOX = re.compile(
    rf"(?:<(?:ref|\|object_ref_start\|)>(?P<label>[^<]*)<(?:/ref|\|object_ref_end\|)>\s*{_TAG}?\s*)?"
    rf"(?:{_PAIRS}|[\[(]{_FLAT}[\])]|{_TAG}{_FLAT}<)"
)


def parse_boxes(text: str) -> list[Box]:
    """The boxes of an answer, in order.

    They are JSON, maybe in a fence or behind other text, as objects with "bbox_2d", "bbox" or "box"
    and maybe a "label", or lists of four numbers; or "[x1, y1, x2, y2]", "(x1, y1), (x2, y2)" and
    "<box>x1, y1, x2, y2</box>" in a text, each maybe behind "<ref>label</ref>".

    Args:
        text: of the answer.
    """
    boxes = _boxes_in(_json_in(text))
    if boxes:
        return boxes
    found = []
    for match in _BOX.finditer(text):
        corners = [float(number) for number in match.groups()[1:] if number is not None]
        found.append(_box(corners, (match["label"] or "").strip()))
    return found


def _json_in(text: str) -> Any:
    """The first JSON list or object with a box in it."""
    decoder = json.JSONDecoder()
    for start in re.finditer(r"[\[{]", text):
        if start.start() > 20_000:
            return None
        try:
            value, _ = decoder.raw_decode(text, start.start())
        except (ValueError, RecursionError):
            continue
        # A flat list of four numbers may be the first of several in a text.
        if _boxes_in(value) and not _corners(value):
            return value
    return None


def _boxes_in(value: Any) -> list[Box]:
    if isinstance(value, Mapping):
        label = next((str(value[name]) for name in _LABELS if name in value), "")
        inner = next((value[name] for name in (*_CORNERS, "bboxes") if name in value), None)
        if inner is None:
            return [box for each in value.values() for box in _boxes_in(each)]
        return [box._replace(label=label) for box in _boxes_in(inner)]
    if isinstance(value, Sequence) and not isinstance(value, str):
        if corners := _corners(value):
            return [_box(corners)]
        return [box for each in value for box in _boxes_in(each)]
    return []


def _box(corners: Sequence[float], label: str = "") -> Box:
    x1, y1, x2, y2 = corners
    return Box(x1, y1, x2, y2, label)


def _corners(value: Any) -> list[float]:
    is_flat = isinstance(value, Sequence) and not isinstance(value, str) and len(value) == 4
    if not is_flat or not all(type(each) in (int, float) for each in value):
        return []
    try:
        corners = [float(each) for each in value]
    except OverflowError:
        return []
    return corners if all(map(math.isfinite, corners)) else []


def box_iou(first: Sequence[Box], second: Sequence[Box], *, pixel: float = 0.0) -> NDArray[Any]:
    """[N, M] intersection over union, fp64; 0 for boxes whose corners are the wrong way round.

    Args:
        first: N boxes.
        second: M boxes.
        pixel: 1 where corners are pixels that belong to the box; its sides are so much longer.
    """
    a, b = (
        np.array([box[:4] for box in boxes], np.float64).reshape(-1, 4) for boxes in (first, second)
    )
    sides = np.minimum(a[:, None, 2:], b[None, :, 2:]) - np.maximum(a[:, None, :2], b[None, :, :2])
    inside = np.clip(sides + pixel, 0, None).prod(axis=2)
    areas = [np.clip(boxes[:, 2:] - boxes[:, :2] + pixel, 0, None).prod(axis=1) for boxes in (a, b)]
    union = areas[0][:, None] + areas[1][None] - inside
    iou: NDArray[Any] = np.divide(inside, union, out=np.zeros_like(inside), where=union > 0)
    return iou


def match_boxes(
    given: Sequence[Box], right: Sequence[Box], *, threshold: float = 0.5
) -> tuple[float, float]:
    """How well boxes cover the right ones, each right one covered by one given at most.

    Boxes with different labels never match; one without a label matches any. The assignment is the
    best there is (Hungarian), for either measure.

    Args:
        given: N boxes.
        right: M boxes.
        threshold: intersection over union from which on a box is found.

    Returns:
        (sum of the intersections over unions) / max(N, M), and F1 = 2 found / (N + M). Both are 1
        where there are no boxes on either side.
    """
    from scipy.optimize import linear_sum_assignment

    if not given or not right:
        both = float(not given and not right)
        return both, both
    iou = box_iou(given, right)
    for row, box in enumerate(given):
        for column, other in enumerate(right):
            if box.label and other.label and normalized(box.label) != normalized(other.label):
                iou[row, column] = 0.0
    total = iou[linear_sum_assignment(iou, maximize=True)].sum()
    is_found = (iou >= threshold) & (iou > 0)
    found = is_found[linear_sum_assignment(is_found, maximize=True)].sum()
    return float(total / max(iou.shape)), float(2 * found / sum(iou.shape))


@dataclass(frozen=True)
class BoxReward:
    """How well the boxes of an answer cover those of the column "boxes"; NaN without the column.

    Args:
        measure: "iou" is the mean intersection over union, "f1" the F1 score at `threshold`; see
            `match_boxes`.
        threshold: of "f1".
        format: where the answer of a text stands, see `answer_format`.
    """

    measure: Literal["iou", "f1"] = "iou"
    threshold: float = 0.5
    format: FormatLike = "plain"
    name: ClassVar[str] = "boxes"
    may_be_nan: bool = field(default=True, init=False)

    def __post_init__(self) -> None:
        answer_format(self.format)
        if self.measure not in ("iou", "f1"):
            raise ValueError(f"BoxReward: measure is {self.measure!r}, expected 'iou' or 'f1'")
        if not 0 < self.threshold <= 1:
            raise ValueError(f"BoxReward: threshold is {self.threshold}, expected it in (0, 1]")

    def __call__(self, samples: Samples) -> Tensor:
        """[B] fp32 in [0, 1], NaN for drawings and where there are no right boxes to compare with.

        Raises:
            ValueError: a column "boxes" has something else.
        """
        form = answer_format(self.format)
        scores = []
        for example, text in zip(samples.examples, samples.texts, strict=True):
            right = _right_boxes(example)
            if text is None or right is None:
                scores.append(math.nan)
                continue
            given = form.answer_of(text)
            iou, f1 = match_boxes(parse_boxes(given or ""), right, threshold=self.threshold)
            score = iou if self.measure == "iou" else f1
            scores.append(0.0 if given is None else score)
        return torch.tensor(scores)


def _right_boxes(example: Example) -> list[Box] | None:
    given = example.extra.get(BOXES)
    if given is None:
        return None
    boxes = _boxes_in(given)
    if not boxes and given != []:
        raise ValueError(
            f"{BOXES} of {example.uid!r} is {given!r}, expected [[x1, y1, x2, y2], ...] or "
            '[{"bbox_2d": [...], "label": ...}, ...]'
        )
    return boxes
