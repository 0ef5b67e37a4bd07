"""Instruction following, r_ins: does the drawing satisfy its rule, is the answer the right one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lvrpo.data.example import Example
from lvrpo.digits.judge import DigitReader, digit_judge, read_pictures
from lvrpo.digits.pictures import Cell
from lvrpo.digits.rules import LayoutRule, digit_rule
from lvrpo.rewards.samples import Samples


@dataclass(frozen=True)
class RuleChecks:
    """What was checked, one entry per sample, NaN where there is no rule.

    Args:
        strict: [B] fp32, 1 where everything is right, else 0.
        partial: [B] fp32 in [0, 1], the share of the requirement that is met. For a text: 1 for
            the right answer, else 0.
        format: [B] fp32, 1 where a text has the form of an answer; NaN for drawings.
    """

    strict: Tensor
    partial: Tensor
    format: Tensor


def check_samples(samples: Samples, reader: DigitReader | None = None) -> RuleChecks:
    """Check every sample against its own example.

    Args:
        samples: texts and drawings.
        reader: of the drawn digits; None means the judge. Give `gold_reader()` to measure without
            the judge's blind spots.

    Raises:
        ValueError: a drawing does not have the size of its rule's canvas.
    """
    count = len(samples)
    table = torch.full((3, count), math.nan)
    seen: list[tuple[Cell, ...]] = []
    if samples.images is not None and any(example.rule for example in samples.examples):
        seen = read_pictures(reader or digit_judge(), samples.images)
    for cells, at in zip(seen, samples.image_index, strict=False):
        table[:2, at] = torch.tensor(_check_drawing(samples.examples[at], cells))
    for at, text in enumerate(samples.texts):
        if text is not None:
            table[:, at] = torch.tensor(_check_answer(samples.examples[at], text))
    return RuleChecks(*table)


def _check_drawing(example: Example, cells: Sequence[Cell]) -> tuple[float, float]:
    rule = digit_rule(example)
    if rule is None:
        return math.nan, math.nan
    if isinstance(rule, LayoutRule) and len(rule.digits) != len(cells):
        raise ValueError(
            f"drawing of {example.uid!r} has {len(cells)} cells, its rule {rule.rows} x {rule.cols}"
        )
    return float(rule.satisfied_by(cells)), rule.partial(cells)


def _check_answer(example: Example, text: str) -> tuple[float, float, float]:
    answer, given = (" ".join(words.split()) for words in (example.answer or "", text))
    right = float(given == answer)
    if answer in ("yes", "no"):
        well_formed = given in ("yes", "no")
    elif answer.isdecimal():
        well_formed = given.isdecimal()
    else:
        well_formed = bool(given)
    return right, right, float(well_formed)


@dataclass(frozen=True)
class RuleReward:
    """r_ins = strict_weight * strict + (1 - strict_weight) * partial.

    Texts score (1 - format_weight) * right + format_weight * well-formed. A drawing whose example
    has no rule scores NaN.

    Args:
        strict_weight: 1 is the paper's binary reward. A partial score tells apart the drawings of
            a group that are all wrong, which is where learning starts.
        format_weight: share of an answer's score that its mere form earns.
        reader: of the drawn digits; None means the judge.
    """

    strict_weight: float = 0.5
    format_weight: float = 0.0
    reader: DigitReader | None = None
    name: str = field(default="r_ins", init=False)
    may_be_nan: bool = field(default=True, init=False)

    def __post_init__(self) -> None:
        for name in ("strict_weight", "format_weight"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"RuleReward: {name} is {getattr(self, name)}, expected 0 to 1")

    def __call__(self, samples: Samples) -> Tensor:
        """[B] fp32 in [0, 1], NaN where there is no rule."""
        checks = check_samples(samples, self.reader)
        w, f = self.strict_weight, self.format_weight
        drawn = w * checks.strict + (1 - w) * checks.partial
        written = (1 - f) * checks.strict + f * checks.format
        return torch.where(checks.format.isnan(), drawn, written)
