"""What every policy loss over tokens measures."""

from __future__ import annotations

import torch
from torch import Tensor

from lvrpo.params.metrics import Maximum, Mean, Metrics, Minimum, Total, as_scalar


class LossMetrics(Metrics):
    """What a policy loss measured: detached fp32 scalars.

    `merge` of micro-batches and `all_reduce` of ranks give those of one call over everything.
    Ratios are those before any bound, with log-ratios within +-20, so that every metric is finite.
    "Share of ratios" and means of ratios are over tokens, or over sequences with active tokens
    where `params.ratio` is "seq_mean" or "seq_sum" (but for "log_clip"). With no active token every
    metric is 0, but what is said of ratios is 1.

    Attributes:
        policy_loss: the loss without its KL and entropy terms; merged, their sum, as losses with a
            common denominator add up.
        kl: mean of the KL estimator times its `kl_factor`, without `beta`; 0 without reference.
        entropy: mean entropy, nats; 0 without `entropy`.
        clip_fraction_low: share of ratios held by the lower bound, or outside the trust region with
            a negative advantage; 0 where nothing is bounded (ratio "none", "sigmoid", "gamma").
        clip_fraction_high: share of ratios held by the upper bound, or outside the trust region
            with a positive advantage.
        clip_fraction_cap: share of ratios held by `ratio_cap`.
        kl_old: approximate KL of the policy from the one that sampled: mean of e^d - 1 - d with
            d = logp - old of a token.
        active_tokens: number of tokens that the mask lets in.
        active_sequences: number of sequences that have one.
        dropped_tokens: number of tokens that the mask lets in and that are left out, because an
            input of theirs is not finite or a weight negative. An error where values are read.
        ratio_min: smallest ratio, of tokens for "log_clip".
        ratio_max: largest ratio.
        clip_fraction_low_min: smallest share of a sequence's ratios that the lower bound holds.
        clip_fraction_high_max: largest share of a sequence's ratios that the upper bound holds.
        kl_old_max: largest mean of `kl_old` over a sequence.
    """

    policy_loss = Total()
    kl = Mean("active_tokens")
    entropy = Mean("active_tokens")
    clip_fraction_low = Mean("_ratios")
    clip_fraction_high = Mean("_ratios")
    clip_fraction_cap = Mean("_ratios")
    _ratio = Total()
    _ratio_squared = Total()
    _ratios = Total()
    kl_old = Mean("active_tokens")
    active_tokens = Total()
    active_sequences = Total()
    dropped_tokens = Total()
    ratio_min = Minimum(otherwise=1.0)
    ratio_max = Maximum(otherwise=1.0)
    clip_fraction_low_min = Minimum(otherwise=0.0)
    clip_fraction_high_max = Maximum(otherwise=0.0)
    kl_old_max = Maximum(otherwise=0.0)

    @classmethod
    def from_statistics(cls, statistics: Tensor) -> LossMetrics:
        """From the vector that the op returns: sums, then extremes."""
        return cls(statistics)

    @property
    def ratio_mean(self) -> Tensor:
        """Mean ratio."""
        ratios = self.sum_of("_ratios")
        return as_scalar(torch.where(ratios == 0, 1.0, self.sum_of("_ratio") / ratios))

    @property
    def effective_sample_size(self) -> Tensor:
        """(sum of ratios)^2 / (sum of squares), over their number.

        1 on policy, 1 / number when one carries all the weight.
        """
        ratios, squares = self.sum_of("_ratios"), self.sum_of("_ratio_squared")
        size = self.sum_of("_ratio").square() / (squares * ratios)
        return as_scalar(torch.where(ratios == 0, 1.0, size))


#: What `LossMetrics.from_statistics` takes, in its order.
STATISTICS = (*LossMetrics.SUMS, *LossMetrics.EXTREMES)
