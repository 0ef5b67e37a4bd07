"""The parameters of `sampler_weights` and what it returns."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal, NamedTuple, get_args

from torch import Tensor

from lvrpo.params._validate import check_choices, from_preset

Weight = Literal["none", "token", "seq_sum", "seq_mean"]
Outside = Literal["truncate", "zero"]
Statistic = Literal["ratio", "k2", "k3"]
Level = Literal["token", "seq_sum", "seq_mean", "seq_any"]


def _check_bounds(params: Any) -> None:
    owner = type(params).__name__
    if not 0 <= params.low < math.inf:
        raise ValueError(f"{owner}: low is {params.low}, expected finite and >= 0")
    if not params.high >= params.low or params.high == 0:
        raise ValueError(f"{owner}: high is {params.high}, expected > 0 and >= low = {params.low}")


@dataclasses.dataclass(frozen=True)
class Rejection:
    """Which tokens are left out altogether: those whose statistic is outside [low, high].

    Attributes:
        statistic: with d = o - u: "ratio", exp(d), which is k1 = -d in the unit of a ratio; "k2",
            d^2 / 2; "k3", e^d - 1 - d.
        level: "token", each by its own statistic; "seq_sum" and "seq_mean", whole sequences by the
            sum or mean of d, or of k2 or k3; "seq_any", whole sequences in which any token is
            outside, which with `high` alone is the sequence's maximum and with `low` alone a veto.
        low: smallest value that stays.
        high: largest value that stays.
    """

    statistic: Statistic
    level: Level
    low: float = 0.0
    high: float = math.inf

    def __post_init__(self) -> None:
        check_choices(self, {"statistic": get_args(Statistic), "level": get_args(Level)})
        _check_bounds(self)


@dataclasses.dataclass(frozen=True)
class SamplerCorrectionParams:
    """Which correction; the defaults are the preset "tis".

    Attributes:
        weight: the importance ratio a token is weighted by: "token", exp(o - u) of its own;
            "seq_sum", the product over its sequence; "seq_mean", the geometric mean over it;
            "none", 1.
        low: lower bound of that ratio.
        high: its upper bound.
        outside: what happens to a ratio outside the bounds: "truncate" moves it to the bound,
            "zero" drops the token.
        reject: further conditions; a token stays if all of them keep it.
        normalize: divide the bounded weights by their mean over this call, before any rejection:
            over the active tokens, or over the sequences where `weight` is one number for each.
            Weights with a mean below 1e-8 stay as they are.
    """

    weight: Weight = "token"
    low: float = 0.0
    high: float = 2.0
    outside: Outside = "truncate"
    reject: tuple[Rejection, ...] = ()
    normalize: bool = False

    def __post_init__(self) -> None:
        check_choices(self, {"weight": get_args(Weight), "outside": get_args(Outside)})
        _check_bounds(self)
        if not isinstance(self.reject, tuple) or not all(
            isinstance(rejection, Rejection) for rejection in self.reject
        ):
            raise ValueError(
                f"SamplerCorrectionParams: reject is {self.reject!r}, expected a tuple of Rejection"
            )

    @classmethod
    def preset(cls, name: str, **changes: Any) -> SamplerCorrectionParams:
        """A published correction by name, with single fields changed by keyword.

        "tis", "icepop", "seq_mask_tis", "veto", and the four modes of TRL by TRL's names:
        "token_truncate", "token_mask", "sequence_truncate", "sequence_mask".
        """
        return from_preset(cls, SAMPLER_CORRECTION_PRESETS, name, changes)


_BAND = Rejection("ratio", "seq_mean", low=0.999, high=1.002)

SAMPLER_CORRECTION_PRESETS: dict[str, dict[str, Any]] = {
    "tis": {},
    "icepop": {"low": 0.5, "high": 5.0, "outside": "zero"},
    "seq_mask_tis": {"high": math.inf, "reject": (_BAND,)},
    "veto": {"reject": (Rejection("ratio", "seq_any", low=1e-4),)},
    "token_truncate": {"high": 3.0},
    "token_mask": {"high": 3.0, "outside": "zero"},
    "sequence_truncate": {"weight": "seq_sum", "high": 3.0},
    "sequence_mask": {"weight": "seq_sum", "high": 3.0, "outside": "zero"},
}


@dataclasses.dataclass(frozen=True)
class SamplerCorrectionStats:
    """Detached scalars, finite; 0 when there are no tokens to take them over.

    `gap` to `ratio_max` are over the active tokens that the sampler scored, the others over all
    active ones.

    Attributes:
        gap: mean |o - u|, nats.
        gap_max: largest |o - u|.
        kl: KL divergence of the trainer's policy from the sampler's, estimated by the mean of k3,
            in which o - u above 20 counts as 20.
        ratio_mean: mean of the ratio of `params.weight` before any bound but e^20 ("none": the
            token's).
        ratio_min: its minimum.
        ratio_max: its maximum.
        truncated: fraction of tokens whose ratio was moved to a bound.
        dropped: fraction of tokens that ended with weight 0.
        effective_sample_size: (sum of weights)^2 / (sum of squares), over the number of tokens.
        active_tokens: tokens that the mask lets in.
        compared_tokens: those of them that have a log-prob of the sampler.
    """

    gap: Tensor
    gap_max: Tensor
    kl: Tensor
    ratio_mean: Tensor
    ratio_min: Tensor
    ratio_max: Tensor
    truncated: Tensor
    dropped: Tensor
    effective_sample_size: Tensor
    active_tokens: Tensor
    compared_tokens: Tensor


class SamplerCorrection(NamedTuple):
    """Result of `sampler_weights`.

    Attributes:
        weights: factors >= 0 in the shape of the tokens, 0 where one is masked or dropped.
        stats: detached scalars.
    """

    weights: Tensor
    stats: SamplerCorrectionStats
