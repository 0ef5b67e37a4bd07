"""Which estimator turns rewards into advantages: the choices, and published estimators by name."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal, get_args

from torch import Tensor

from lvrpo.params._validate import check_choices, from_preset

Combine = Literal["decoupled", "sum"]
Baseline = Literal["mean", "leave_one_out", "length", "second_best", "none"]
Scale = Literal["group", "leave_one_out", "batch", "nonzero", "none"]
Whiten = Literal["none", "sequence", "token"]
#: By parameter: the names that it has.
ADVANTAGE_CHOICES: dict[str, tuple[str, ...]] = {
    "combine": get_args(Combine),
    "baseline": get_args(Baseline),
    "scale": get_args(Scale),
    "whiten": get_args(Whiten),
}
#: What kernels take as one tensor of numbers, in its order.
ADVANTAGE_NUMBERS = ("ddof", "eps", "std_floor", "clip")


@dataclasses.dataclass(frozen=True)
class AdvantageParams:
    """How rewards become advantages; the defaults are the preset "decoupled".

    Attributes:
        combine: "decoupled" divides every reward by its own spread before the weighted sum (GDPO);
            "sum" adds the rewards up first and divides by the spread of the sum (LVRPO, Eq 3).
        baseline: what is subtracted: the group's mean, the mean of the group's other samples, the
            mean weighted by `lengths` (OPO), the runner-up, for the best sample alone (pass@k), or
            nothing.
        scale: what divides: the standard deviation of the group, of the group's other samples
            (which leaves a sample alone where the others agree), or of the batch; the fraction of
            the batch's rewards that are not zero (GPG); or nothing.
        ddof: 1 divides the sum of squares by n - 1, 0 by n.
        eps: added to every divisor.
        std_floor: every divisor is at least this, the whitening's too. Without it a group in which
            the rewards agree up to noise gets full-size advantages made of that noise. In units of
            reward: the default is 1 % of a reward in [0, 1].
        whiten: divide the result by its standard deviation over the batch's samples ("sequence")
            or tokens ("token", every sample counts `lengths` times), after subtracting its mean.
            True and False stand for "sequence" and "none".
        clip: bound of the advantage's magnitude, or None.
    """

    combine: Combine = "decoupled"
    baseline: Baseline = "mean"
    scale: Scale = "group"
    ddof: int = 1
    eps: float = 1e-4
    std_floor: float = 0.01
    whiten: Whiten | bool = "sequence"
    clip: float | None = None

    def __post_init__(self) -> None:
        if isinstance(self.whiten, bool):
            object.__setattr__(self, "whiten", "sequence" if self.whiten else "none")
        check_choices(self, ADVANTAGE_CHOICES)
        if self.ddof not in (0, 1):
            raise ValueError(f"AdvantageParams: ddof is {self.ddof}, expected 0 or 1")
        for name in ("eps", "std_floor"):
            value = getattr(self, name)
            if not 0 <= value < math.inf:
                raise ValueError(f"AdvantageParams: {name} is {value}, expected finite and >= 0")
        if self.clip is not None and not self.clip > 0:
            raise ValueError(f"AdvantageParams: clip is {self.clip}, expected > 0, or None")
        self._check_combination()

    def _check_combination(self) -> None:
        if self.baseline == "second_best" and self.combine == "decoupled":
            raise ValueError(
                "AdvantageParams: combine is 'decoupled' with baseline 'second_best', expected "
                "'sum': the best sample of a group is the one with the largest sum of rewards"
            )
        if self.baseline == "none" and self.scale in ("group", "leave_one_out", "batch"):
            raise ValueError(
                f"AdvantageParams: scale is {self.scale!r} with baseline 'none', expected 'none' "
                "or 'nonzero': rewards that agree have no spread to divide by and are not zero"
            )

    @property
    def needs_lengths(self) -> bool:
        """Whether the estimator counts the tokens of a sample."""
        return self.baseline == "length" or self.whiten == "token"

    def choices(self) -> dict[str, str]:
        """The parameters that are names."""
        return {name: getattr(self, name) for name in ADVANTAGE_CHOICES}

    def numbers(self) -> dict[str, float]:
        """The parameters that are numbers, as kernels take them: no clip is an infinite one."""
        named = {name: getattr(self, name) for name in ADVANTAGE_NUMBERS}
        return named | {"clip": math.inf if self.clip is None else self.clip}

    @classmethod
    def preset(cls, name: str, **changes: Any) -> AdvantageParams:
        """A published estimator by name, with single fields changed by keyword.

        "paper" is LVRPO's Eq 3, "decoupled" GDPO with a floor, "dr_grpo" the group mean alone,
        "rloo" leave-one-out; docs/ops/normalize_advantages.md has the formula of each.
        """
        return from_preset(cls, ADVANTAGE_PRESETS, name, changes)


def sums_to_zero(baseline: str, scale: str, whiten: str) -> bool:
    """Whether the advantages of every group do, so that the batch has no mean to subtract."""
    divides_alike = scale != "leave_one_out"
    return baseline in ("mean", "leave_one_out") and divides_alike and whiten != "token"


_SUM = {"combine": "sum", "std_floor": 0.0, "whiten": "none"}
_UNSCALED = {"combine": "sum", "scale": "none", "whiten": "none"}
ADVANTAGE_PRESETS: dict[str, dict[str, Any]] = {
    "paper": _SUM,
    "decoupled": {},
    "dr_grpo": _UNSCALED,
    "rloo": _UNSCALED | {"baseline": "leave_one_out"},
    "grpo": _SUM,
    "grpo_batch": _SUM | {"scale": "batch"},
    "grpo_leave_one_out": _SUM
    | {"baseline": "leave_one_out", "scale": "leave_one_out", "eps": 1e-6},
    "gdpo": {"std_floor": 0.0},
    "gdpo_token": {"std_floor": 0.0, "whiten": "token"},
    "reinforce_pp": _SUM | {"baseline": "none", "scale": "none", "whiten": "token"},
    "reinforce_pp_baseline": _SUM | {"scale": "none", "whiten": "token"},
    "opo": _UNSCALED | {"baseline": "length"},
    "gpg": _SUM | {"scale": "nonzero", "eps": 0.0},
    "pass_at_k": _SUM | {"baseline": "second_best"},
}


#: The rows of the table of `AdvantageStats`, which kernels fill.
ADVANTAGE_STATS = ("share", "constant_groups", "mean", "std", "applicable")


@dataclasses.dataclass(frozen=True)
class AdvantageStats:
    """What each of the K rewards did; [K] tensors, NaN for a reward that applied to no sample.

    A sample that no reward scored counts in none of them but `applicable`.

    Attributes:
        table: [5, K], the rows below.
        all_zero: bool scalar, every advantage is zero and the batch teaches nothing.
    """

    table: Tensor
    all_zero: Tensor

    @property
    def share(self) -> Tensor:
        """Part of the advantages' variance that comes from the reward.

        The covariance of its contribution with the advantage over the variance of the advantage,
        both about zero. Sums to 1, or is 0 throughout when every advantage is. Negative where a
        reward opposes the others.
        """
        return self.table[0]

    @property
    def constant_groups(self) -> Tensor:
        """Fraction of the groups it applied to in which it did not vary."""
        return self.table[1]

    @property
    def mean(self) -> Tensor:
        """Of the raw reward over the samples it applied to."""
        return self.table[2]

    @property
    def std(self) -> Tensor:
        """Of the raw reward likewise."""
        return self.table[3]

    @property
    def applicable(self) -> Tensor:
        """Fraction of all samples it applied to; never NaN unless the batch is empty."""
        return self.table[4]


@dataclasses.dataclass(frozen=True)
class Advantages:
    """Result of `normalize_advantages`.

    Attributes:
        values: [B], the advantage of every sample.
        per_reward: [B, K], what each reward contributed; its rows add up to `values`.
        stats: per-reward diagnostics of the batch.
    """

    values: Tensor
    per_reward: Tensor
    stats: AdvantageStats
