"""What every policy loss over tokens shares: its parameters, its metrics, its result."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal, NamedTuple, get_args

from torch import Tensor

Ratio = Literal["none", "token", "seq_mean"]
KL = Literal["k1", "k2", "k3", "abs"]
KLFactor = Literal["none", "ratio"]
Aggregation = Literal[
    "token_mean", "seq_mean_token_mean", "seq_mean_token_sum", "seq_mean_token_sum_norm"
]


@dataclasses.dataclass(frozen=True)
class LossParams:
    """Which policy loss; the defaults are the preset "grpo".

    Attributes:
        ratio: what the advantage multiplies: "token", exp(logp - old) of the token; "seq_mean", the
            exponential of its mean over the sequence (GSPO); "none", the log-prob itself
            (REINFORCE, not clipped).
        clip_low: a ratio below 1 - clip_low gets no gradient where the advantage is negative;
            infinity for no bound.
        clip_high: likewise above 1 + clip_high where it is positive.
        ratio_cap: a ratio above it gets no gradient where the advantage is negative (dual clip,
            two-sided clip); None for no bound.
        beta: coefficient of the KL divergence to the reference policy.
        kl: its estimator, with d = ref - logp: k1 = -d, k2 = d^2 / 2, k3 = e^d - d - 1, abs = |d|.
        kl_factor: "ratio" multiplies the estimator by exp(logp - old) of the token, differentiated
            too, which makes it unbiased on samples of an older policy.
        entropy_coef: coefficient of the entropy bonus.
        aggregation: from tokens to a scalar: "token_mean", over all tokens; "seq_mean_token_mean",
            per sequence, then over all B sequences; "seq_mean_token_sum", sum instead of the inner
            mean; "seq_mean_token_sum_norm", that sum over `max_length`.
        max_length: constant divisor of "seq_mean_token_sum_norm".
    """

    ratio: Ratio = "token"
    clip_low: float = 0.2
    clip_high: float = 0.2
    ratio_cap: float | None = None
    beta: float = 0.0
    kl: KL = "k3"
    kl_factor: KLFactor = "none"
    entropy_coef: float = 0.0
    aggregation: Aggregation = "seq_mean_token_mean"
    max_length: int | None = None

    def __post_init__(self) -> None:
        choices = {"ratio": Ratio, "kl": KL, "kl_factor": KLFactor, "aggregation": Aggregation}
        for name, allowed in choices.items():
            value = getattr(self, name)
            if value not in get_args(allowed):
                expected = ", ".join(get_args(allowed))
                raise ValueError(f"LossParams: {name} is {value!r}, expected one of {expected}")
        for name in ("clip_low", "clip_high"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"LossParams: {name} is {getattr(self, name)}, expected >= 0")
        if not 0 <= self.beta < math.inf:
            raise ValueError(f"LossParams: beta is {self.beta}, expected finite and >= 0")
        if not math.isfinite(self.entropy_coef):
            raise ValueError(f"LossParams: entropy_coef is {self.entropy_coef}, expected finite")
        if self.ratio_cap is not None and not self.ratio_cap >= 1 + self.clip_high:
            raise ValueError(
                f"LossParams: ratio_cap is {self.ratio_cap}, expected at least 1 + clip_high = "
                f"{1 + self.clip_high}, or None"
            )
        if self.ratio_cap is not None and self.ratio == "none":
            raise ValueError(f'LossParams: ratio_cap is {self.ratio_cap}, but ratio is "none"')
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

    @classmethod
    def preset(cls, name: str, **changes: Any) -> LossParams:
        """A published loss by name, with single fields changed by keyword.

        "grpo", "dr_grpo" (give it `max_length`), "bnpo", "dapo", "gspo" and "reinforce".
        """
        if name not in LOSS_PRESETS:
            expected = ", ".join(LOSS_PRESETS)
            raise ValueError(f"LossParams: preset is {name!r}, expected one of {expected}")
        return cls(**LOSS_PRESETS[name] | changes)


LOSS_PRESETS: dict[str, dict[str, Any]] = {
    "grpo": {},
    "dr_grpo": {"aggregation": "seq_mean_token_sum_norm"},
    "bnpo": {"aggregation": "token_mean"},
    # DAPO's mean runs over the tokens of the whole optimiser step: pass that count as denominator.
    "dapo": {"aggregation": "token_mean", "clip_high": 0.28},
    "gspo": {"ratio": "seq_mean", "clip_low": 3e-4, "clip_high": 4e-4},
    "reinforce": {"ratio": "none", "aggregation": "token_mean"},
}


@dataclasses.dataclass(frozen=True)
class LossMetrics:
    """Detached scalars over the active tokens, in the dtype of the loss.

    Attributes:
        policy_loss: the loss without its KL and entropy terms.
        kl: mean of the KL estimator, without `beta`; 0 without reference log-probs.
        entropy: mean entropy, nats; 0 without `entropy`.
        clip_fraction_low: share of tokens held by the lower clip.
        clip_fraction_high: share of tokens held by the upper clip.
        clip_fraction_cap: share of tokens held by `ratio_cap`.
        ratio_min: smallest ratio; 1 when no token is active, like the next three.
        ratio_max: largest ratio.
        ratio_mean: mean ratio.
        effective_sample_size: (sum of ratios)^2 / (sum of squares), over the number of tokens: 1
            on policy, 1 / tokens when one token carries all the weight.
        active_tokens: number of tokens whose weight is not zero.
    """

    policy_loss: Tensor
    kl: Tensor
    entropy: Tensor
    clip_fraction_low: Tensor
    clip_fraction_high: Tensor
    clip_fraction_cap: Tensor
    ratio_min: Tensor
    ratio_max: Tensor
    ratio_mean: Tensor
    effective_sample_size: Tensor
    active_tokens: Tensor


class PolicyLoss(NamedTuple):
    """Result of `grpo_loss`.

    Attributes:
        loss: scalar to call backward on.
        metrics: detached scalars from the same pass.
    """

    loss: Tensor
    metrics: LossMetrics
