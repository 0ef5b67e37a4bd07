"""What every policy loss over tokens shares: its parameters, its metrics, its result."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal, NamedTuple, get_args

from torch import Tensor

from lvrpo.params._validate import check_choices, from_preset
from lvrpo.params.from_trl import fields_from_trl
from lvrpo.params.from_verl import fields_from_verl
from lvrpo.params.log_ratio import LOG_RATIO_LIMIT
from lvrpo.params.loss_metrics import LossMetrics

Ratio = Literal["none", "token", "seq_mean", "seq_mean_token", "seq_sum"]
Surrogate = Literal[
    "clip", "detached", "sigmoid", "gamma", "total_variation", "binary_kl", "log_clip"
]
KL = Literal["k1", "k2", "k3", "abs"]
KLFactor = Literal["none", "ratio", "detached_ratio", "sequence_ratio"]
KLGradient = Literal["own", "k2"]
Aggregation = Literal[
    "token_mean",
    "seq_mean_token_mean",
    "seq_mean_token_sum",
    "seq_mean_token_sum_norm",
    "token_sum",
]
EntropyAggregation = Literal["token_mean"]
#: By parameter: the names that it has.
LOSS_CHOICES: dict[str, tuple[str, ...]] = {
    "ratio": get_args(Ratio),
    "surrogate": get_args(Surrogate),
    "kl": get_args(KL),
    "kl_factor": get_args(KLFactor),
    "kl_gradient": get_args(KLGradient),
    "aggregation": get_args(Aggregation),
}
#: What kernels take as one tensor of numbers, in its order. `shape_pos` and `shape_neg` are what a
#: surrogate has besides the clip, for positive advantages and for the others.
LOSS_NUMBERS = (
    *("clip_low", "clip_high", "ratio_cap", "log_ratio_limit"),
    *("shape_pos_0", "shape_pos_1", "shape_neg_0", "shape_neg_1"),
    *("beta", "kl_log_ratio_limit", "kl_limit", "entropy_coef"),
    *("max_length", "denominator"),
)
#: The ratios that each surrogate is defined for.
SURROGATE_RATIOS: dict[str, tuple[str, ...]] = {
    "clip": get_args(Ratio),
    "detached": ("token", "seq_mean"),
    "sigmoid": ("token", "seq_mean"),
    "gamma": ("seq_sum",),
    "total_variation": ("token",),
    "binary_kl": ("token",),
    "log_clip": ("seq_mean",),
}


@dataclasses.dataclass(frozen=True)
class LossParams:
    """Which policy loss; the defaults are the preset "grpo".

    Attributes:
        ratio: what the advantage multiplies: "token", exp(logp - old) of the token; "seq_mean", the
            exponential of its mean over the sequence (GSPO); "seq_mean_token", the same value whose
            gradient runs through the token's own log-prob, for advantages per token (GSPO-token);
            "seq_sum", the exponential of its sum, the ratio of whole sequences; "none", the
            log-prob itself (REINFORCE, not clipped).
        surrogate: what is made of the ratio: "clip", the lesser of ratio and clipped ratio times
            the advantage; "detached", the clipped ratio as a constant weight of the log-prob
            (CISPO); "sigmoid", a smooth gate in place of the clip (SAPO); "gamma", w^k e^(-l w) of
            the sequence's ratio w as a constant weight (VESPO); "total_variation" and "binary_kl",
            the ratio as a constant weight inside a trust region and 0 outside (DPPO); "log_clip",
            log-ratios clipped per token before the mean over the sequence (GMPO).
        clip_low: a ratio below 1 - clip_low gets no gradient where the advantage is negative;
            infinity for no bound. For "detached" the lower bound of the weight; for a trust region
            how far a token may move down; for "log_clip" the bound of a token's log-ratio.
        clip_high: likewise above 1 + clip_high where the advantage is positive. For "detached",
            whose weight is at most 1 + clip_high, it may be negative, down to -1.
        ratio_cap: a ratio above it gets no gradient where the advantage is negative (dual clip,
            two-sided clip); one below 1 + clip_high changes places with it, as in TRL; for a trust
            region the largest weight; None for no bound.
        log_ratio_limit: log-ratios stop at plus or minus this inside every exponential, where their
            gradient is 0: the log of the ratio at its level, that of `kl_factor`, and ref - logp of
            k3 from above. e^20 is past every bound that a loss has, so that the default changes no
            token that is trained on; None for no limit, with which a loss may overflow. "gamma" and
            "sigmoid" have the limit 20 by definition.
        gate_pos: steepness of "sigmoid" where the advantage is positive.
        gate_neg: the same where it is not.
        gamma_pos: k and l of "gamma" where the advantage is positive.
        gamma_neg: the same where it is not.
        beta: coefficient of the KL divergence to the reference policy.
        kl: its estimator, with d = ref - logp: k1 = -d, k2 = d^2 / 2, k3 = e^d - d - 1, abs = |d|.
        kl_factor: "ratio" multiplies the estimator by exp(logp - old) of the token, differentiated
            too, which makes it unbiased on samples of an older policy; "detached_ratio", by the
            same as a constant; "sequence_ratio", by the exponential of the mean of logp - old over
            the sequence, whatever `ratio` is, differentiated (TRL's bias-corrected KL of GSPO).
        kl_gradient: "k2" keeps the estimator's value and differentiates k2 in its place, which is
            the unbiased gradient.
        kl_log_ratio_limit: d is clamped to plus or minus this; None for no bound.
        kl_limit: likewise the estimator's value.
        entropy_coef: coefficient of the entropy bonus.
        entropy_aggregation: how the bonus becomes a scalar: None, as the other terms do, by
            `aggregation` and the call's `denominator`; "token_mean", the mean over the active
            tokens of the call whatever the loss, or over those that `top_entropy` keeps (TRL).
        aggregation: from tokens to a scalar: "token_mean", over all tokens; "token_sum";
            "seq_mean_token_mean", per sequence, then over all B sequences; "seq_mean_token_sum",
            sum instead of the inner mean; "seq_mean_token_sum_norm", that sum over `max_length`.
        max_length: constant divisor of "seq_mean_token_sum_norm".
        count_empty: whether a sequence without active tokens counts in a mean over sequences.
    """

    ratio: Ratio = "token"
    surrogate: Surrogate = "clip"
    clip_low: float = 0.2
    clip_high: float = 0.2
    ratio_cap: float | None = None
    log_ratio_limit: float | None = LOG_RATIO_LIMIT
    gate_pos: float = 1.0
    gate_neg: float = 1.05
    gamma_pos: tuple[float, float] = (2.0, 3.0)
    gamma_neg: tuple[float, float] = (3.0, 2.0)
    beta: float = 0.0
    kl: KL = "k3"
    kl_factor: KLFactor = "none"
    kl_gradient: KLGradient = "own"
    kl_log_ratio_limit: float | None = None
    kl_limit: float | None = None
    entropy_coef: float = 0.0
    entropy_aggregation: EntropyAggregation | None = None
    aggregation: Aggregation = "seq_mean_token_mean"
    max_length: int | None = None
    count_empty: bool = True

    def __post_init__(self) -> None:
        check_choices(self, LOSS_CHOICES)
        if not self.clip_low >= 0:
            raise ValueError(f"LossParams: clip_low is {self.clip_low}, expected >= 0")
        self._check_clip_high()
        if not 0 <= self.beta < math.inf:
            raise ValueError(f"LossParams: beta is {self.beta}, expected finite and >= 0")
        if not -math.inf < self.entropy_coef < math.inf:
            raise ValueError(f"LossParams: entropy_coef is {self.entropy_coef}, expected finite")
        if self.entropy_aggregation not in (None, *get_args(EntropyAggregation)):
            raise ValueError(
                f"LossParams: entropy_aggregation is {self.entropy_aggregation!r}, expected one of "
                f"{', '.join(get_args(EntropyAggregation))}, or None for that of the loss"
            )
        for name in ("log_ratio_limit", "kl_log_ratio_limit", "kl_limit"):
            limit = getattr(self, name)
            if limit is not None and not limit > 0:
                raise ValueError(f"LossParams: {name} is {limit}, expected > 0, or None")
        self._check_surrogate()
        self._check_max_length()

    def _check_clip_high(self) -> None:
        least = -min(1.0, self.clip_low) if self.surrogate == "detached" else 0.0
        if not self.clip_high >= least:
            which = ' for surrogate "detached" and this clip_low' if least else ""
            raise ValueError(
                f"LossParams: clip_high is {self.clip_high}, expected >= {least:g}{which}"
            )

    def _check_surrogate(self) -> None:
        allowed = SURROGATE_RATIOS[self.surrogate]
        if self.ratio not in allowed:
            raise ValueError(
                f"LossParams: ratio is {self.ratio!r}, but surrogate {self.surrogate!r} is defined "
                f"for {', '.join(allowed)}"
            )
        for name in ("gate_pos", "gate_neg"):
            if not 0 < getattr(self, name) < math.inf:
                value = getattr(self, name)
                raise ValueError(f"LossParams: {name} is {value}, expected finite and > 0")
        for name in ("gamma_pos", "gamma_neg"):
            value = getattr(self, name)
            if len(value) != 2 or not all(0 < x < math.inf for x in value):
                raise ValueError(f"LossParams: {name} is {value}, expected two numbers > 0")
            object.__setattr__(self, name, tuple(value))  # a list has no hash
        if self.ratio_cap is None:
            return
        if self.ratio == "none":
            raise ValueError(f'LossParams: ratio_cap is {self.ratio_cap}, but ratio is "none"')
        if self.surrogate not in ("clip", "total_variation", "binary_kl"):
            raise ValueError(
                f"LossParams: ratio_cap is {self.ratio_cap}, but surrogate is {self.surrogate!r}, "
                "which does not use it"
            )
        if not self.ratio_cap > 0:
            raise ValueError(f"LossParams: ratio_cap is {self.ratio_cap}, expected > 0, or None")

    def _check_max_length(self) -> None:
        needs_length = self.aggregation == "seq_mean_token_sum_norm"
        if needs_length and (self.max_length is None or self.max_length < 1):
            raise ValueError(
                f"LossParams: max_length is {self.max_length}, expected >= 1 for aggregation "
                '"seq_mean_token_sum_norm"'
            )
        if self.max_length is not None and not needs_length:
            raise ValueError(
                f"LossParams: max_length is {self.max_length}, but aggregation is "
                f"{self.aggregation!r}, which does not use it"
            )

    def choices(self) -> dict[str, str]:
        """The parameters that are names."""
        return {name: getattr(self, name) for name in LOSS_CHOICES}

    def numbers(self, denominator: float | None = None) -> dict[str, float]:
        """The parameters that are numbers, as kernels take them, by the names of `LOSS_NUMBERS`.

        An absent bound is infinite, and a `denominator` of None, for the op's own count, -1. A
        bonus that is aggregated by itself is not theirs.
        """
        high, cap = self.clip_high, _or_infinity(self.ratio_cap)
        if self.surrogate == "clip" and cap < 1 + high:  # see `ratio_cap`
            high, cap = cap - 1, 1 + high
        shape: tuple[float, ...] = (0.0, 0.0, 0.0, 0.0)
        if self.surrogate == "sigmoid":
            shape = (self.gate_pos, 0.0, self.gate_neg, 0.0)
        elif self.surrogate == "gamma":
            shape = (*self.gamma_pos, *self.gamma_neg)
        return {
            "clip_low": self.clip_low,
            "clip_high": high,
            "ratio_cap": cap,
            "log_ratio_limit": _or_infinity(self.log_ratio_limit),
            "shape_pos_0": shape[0],
            "shape_pos_1": shape[1],
            "shape_neg_0": shape[2],
            "shape_neg_1": shape[3],
            "beta": self.beta,
            "kl_log_ratio_limit": _or_infinity(self.kl_log_ratio_limit),
            "kl_limit": _or_infinity(self.kl_limit),
            "entropy_coef": 0.0 if self.entropy_aggregation else self.entropy_coef,
            "max_length": self.max_length or 1,
            "denominator": -1.0 if denominator is None else denominator,
        }

    @property
    def sequence_level(self) -> bool:
        """Whether the gradient of a token depends on the log-probs of its whole sequence."""
        return self.ratio.startswith("seq_") or self.shares_kl

    @property
    def shares_kl(self) -> bool:
        """Whether the KL of a token moves the log-probs of its whole sequence."""
        return self.kl_factor == "sequence_ratio" and self.beta != 0

    @property
    def one_ratio_per_sequence(self) -> bool:
        """Whether the tokens of a sequence share a ratio, and what clips it, as one."""
        return self.needs_sequence_advantages and self.surrogate != "log_clip"

    @property
    def needs_sequence_advantages(self) -> bool:
        """Whether the loss is defined for one advantage per sequence only."""
        return self.ratio in ("seq_mean", "seq_sum")

    @classmethod
    def preset(cls, name: str, **changes: Any) -> LossParams:
        """A published loss by name, with single fields changed by keyword.

        The names are those of `LOSS_PRESETS`; "dr_grpo" needs `max_length`, and those of
        `PRESET_DATA` are the published losses with that data only.
        """
        return from_preset(cls, LOSS_PRESETS, name, changes)

    @classmethod
    def from_trl(cls, config: Any) -> LossParams:
        """The loss of TRL's GRPOTrainer, by its options.

        What TRL divides by and the factors of its tokens are arguments of a loss op:
        docs/integrations.md has them by option.

        Args:
            config: a `trl.GRPOConfig` of TRL 1.16.

        Raises:
            ValueError: an option cannot be honoured; the message names it and says what to do.
        """
        return cls(**fields_from_trl(config))

    @classmethod
    def from_verl(cls, config: Any, response_length: int | None = None) -> LossParams:
        """The loss of verl's actor, by its options.

        What verl divides by, and the factors of its tokens, are arguments of a loss op:
        docs/integrations.md has them by option.

        Args:
            config: an `ActorConfig` of verl 0.9, or whatever has its fields.
            response_length: columns of the padded responses, which verl divides by where
                `loss_agg_mode` is "seq-mean-token-sum-norm" and `loss_scale_factor` is None.

        Raises:
            ValueError: an option cannot be honoured; the message names it and says what to do.
        """
        return cls(**fields_from_verl(config, response_length))


def _or_infinity(bound: float | None) -> float:
    return math.inf if bound is None else bound


LOSS_PRESETS: dict[str, dict[str, Any]] = {
    "grpo": {},
    "dr_grpo": {"aggregation": "seq_mean_token_sum_norm"},
    "bnpo": {"aggregation": "token_mean"},
    # DAPO's mean runs over the tokens of the whole optimiser step: pass that count as denominator.
    "dapo": {"aggregation": "token_mean", "clip_high": 0.28},
    "gspo": {"ratio": "seq_mean", "clip_low": 3e-4, "clip_high": 4e-4},
    "gspo_token": {"ratio": "seq_mean_token", "clip_low": 3e-4, "clip_high": 4e-4},
    # No lower bound, and 5 as the upper one.
    "cispo": {
        "surrogate": "detached",
        "clip_low": math.inf,
        "clip_high": 4.0,
        "aggregation": "token_mean",
    },
    "sapo": {"surrogate": "sigmoid"},
    "vespo": {"ratio": "seq_sum", "surrogate": "gamma", "aggregation": "token_mean"},
    # GSPO's loss of a sequence times its length is its sum over tokens.
    "luspo": {
        "ratio": "seq_mean",
        "clip_low": 3e-4,
        "clip_high": 4e-4,
        "aggregation": "seq_mean_token_sum",
    },
    "gmpo": {"ratio": "seq_mean", "surrogate": "log_clip", "clip_low": 0.4, "clip_high": 0.4},
    "rloo": {"ratio": "seq_sum"},
    "gpg": {"ratio": "none", "aggregation": "token_mean"},
    "dppo_tv": {
        "surrogate": "total_variation",
        "clip_low": 0.15,
        "clip_high": 0.15,
        "ratio_cap": 20.0,
        "aggregation": "token_mean",
    },
    "dppo_kl": {
        "surrogate": "binary_kl",
        "clip_low": 0.05,
        "clip_high": 0.05,
        "ratio_cap": 20.0,
        "aggregation": "token_mean",
    },
    "reinforce": {"ratio": "none", "aggregation": "token_mean"},
    "dro": {"ratio": "none", "kl": "k2", "beta": 1.0, "aggregation": "token_mean"},
    "clip_cov": {"aggregation": "token_mean"},
    "kl_cov": {
        "clip_low": math.inf,
        "clip_high": math.inf,
        "kl": "abs",
        "beta": 1.0,
        "aggregation": "token_mean",
    },
}
#: Presets that are half of a published loss, and what is the other: data of its own.
PRESET_DATA: dict[str, str] = {
    "dro": "the old log-probs as ref_logprobs",
    "clip_cov": "clip_cov_weights as policy_weights",
    "kl_cov": "kl_cov_reference as ref_logprobs",
}


class PolicyLoss(NamedTuple):
    """Result of `grpo_loss`.

    Attributes:
        loss: scalar to call backward on.
        metrics: detached scalars from the same pass.
    """

    loss: Tensor
    metrics: LossMetrics


class FusedPolicyLoss(NamedTuple):
    """Result of the ops that form the log-probs of `grpo_loss` themselves.

    Attributes:
        loss: scalar to call backward on.
        metrics: detached scalars from the same pass.
        logprobs: detached log-probs of the tokens in their shape, nats; 0 for a masked token.
        entropy: detached entropy where each token was sampled, nats; 0 for a masked token.
    """

    loss: Tensor
    metrics: LossMetrics
    logprobs: Tensor
    entropy: Tensor
