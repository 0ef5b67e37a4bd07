"""Instruction following, r_ins: is the answer the right one, does the drawing satisfy its rule."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from lvrpo.data.example import Example
from lvrpo.rewards.parts import RewardParts, Verdicts
from lvrpo.rewards.reward import Samples


def check_answers(samples: Samples) -> Verdicts:
    """Every text against the right answers of its example, blanks aside; NaN for drawings."""
    table = torch.full((3, len(samples)), math.nan)
    for at, text in enumerate(samples.texts):
        if text is not None:
            table[:, at] = torch.tensor(_check_answer(samples.examples[at], text))
    return Verdicts(*table)


def _check_answer(example: Example, text: str) -> tuple[float, float, float]:
    given = " ".join(text.split())
    answers = [" ".join(answer.split()) for answer in example.answers]
    right = float(given in answers)
    return right, right, float(any(_has_the_form_of(answer, given) for answer in answers))


def _has_the_form_of(answer: str, given: str) -> bool:
    if answer in ("yes", "no"):
        return given in ("yes", "no")
    return given.isdecimal() if answer.isdecimal() else bool(given)


@dataclass(frozen=True)
class RuleReward:
    """r_ins = strict_weight * strict + (1 - strict_weight) * partial.

    Texts score (1 - format_weight) * right + format_weight * well-formed. A drawing whose example
    has no rule scores NaN.

    Args:
        check: says what is right; `check_answers` knows no drawing.
        strict_weight: 1 is the paper's binary reward. A partial score tells apart the drawings of
            a group that are all wrong, which is where learning starts.
        format_weight: share of an answer's score that its mere form earns.
    """

    check: Callable[[Samples], Verdicts] = check_answers
    strict_weight: float = 0.5
    format_weight: float = 0.0
    name: str = field(default="r_ins", init=False)
    may_be_nan: bool = field(default=True, init=False)
    needs: ClassVar[tuple[str, ...]] = ("rules",)

    def __post_init__(self) -> None:
        for name in ("strict_weight", "format_weight"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"RuleReward: {name} is {getattr(self, name)}, expected 0 to 1")

    @classmethod
    def from_parts(cls, parts: RewardParts) -> RuleReward:
        """The reward of a run."""
        return cls(parts.rules.check, strict_weight=parts.options["strict_weight"])

    def __call__(self, samples: Samples) -> Tensor:
        """[B] fp32 in [0, 1], NaN where there is no rule."""
        checked = self.check(samples)
        w, f = self.strict_weight, self.format_weight
        drawn = w * checked.strict + (1 - w) * checked.partial
        written = (1 - f) * checked.strict + f * checked.format
        return torch.where(checked.format.isnan(), drawn, written)
