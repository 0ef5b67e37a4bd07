"""Factors per token against the mismatch of sampler and trainer, for `policy_weights` of a loss.

An inference engine and the trainer give one token different log-probs even at equal weights. With u
the sampler's and o the trainer's log-prob of a sampled token, exp(o - u) is the importance ratio
that corrects it. Choosing among the published corrections: docs/sampler-correction.md.

T packed tokens of B sequences, or [B, C] padded ones, whose sequences are the rows.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from lvrpo._sampler_inputs import (
    Numbers,
    Sequences,
    advantage_inputs,
    entropy_inputs,
    token_inputs,
)
from lvrpo.dtypes import number, widen
from lvrpo.params.log_ratio import LOG_RATIO_LIMIT
from lvrpo.params.sampler_correction import (
    SAMPLER_CORRECTION_PRESETS,
    Rejection,
    SamplerCorrection,
    SamplerCorrectionParams,
    SamplerCorrectionStats,
)
from lvrpo.token_selection import is_near_sampler, quantile

__all__ = [
    "SAMPLER_CORRECTION_PRESETS",
    "Rejection",
    "SamplerCorrection",
    "SamplerCorrectionParams",
    "SamplerCorrectionStats",
    "off_policy_sequence_mask",
    "sampler_weights",
    "top_entropy_mask",
    "top_entropy_threshold",
]

_DEFAULT = SamplerCorrectionParams()
#: Weights whose mean is below this are not normalised: there would be nothing but noise in them.
SMALLEST_MEAN = 1e-8


def sampler_weights(
    old_logprobs: Numbers,
    sampler_logprobs: Numbers,
    cu_seqlens: Tensor | Sequence[int] | None = None,
    *,
    mask: Numbers | None = None,
    params: SamplerCorrectionParams = _DEFAULT,
) -> SamplerCorrection:
    """Importance weights exp(old - sampler), bounded, with tokens and sequences rejected.

    No gradient flows through it. A bound is inclusive: a ratio that equals it stays as it is. A
    log-ratio above 20 is decided upon as it is, and counts as 20 in weights and statistics, which
    are finite therefore.

    Args:
        old_logprobs: [T] or [B, C] log-probs of the sampled tokens by the trainer's forward, nats,
            before the update. Both must be normalised over the same support: a sampler that reports
            log-probs after top-k or top-p is off by the log of the kept mass at every token.
        sampler_logprobs: the same, in the same shape, as the sampler reported them; NaN (None in a
            list) where it reported none, which is no mismatch.
        cu_seqlens: [B + 1] offsets of packed sequences, any integers; a sequence may be empty. None
            for padded tokens.
        mask: in the shape of the tokens, of any dtype: what is above 0 is trained on; the other
            tokens may hold anything. None: all.
        params: the correction.

    Returns:
        SamplerCorrection in fp32 (fp64 from fp64 `old_logprobs`): factors for `policy_weights` of a
        loss, whose `mask` is the one given here.

    Raises:
        ValueError: shapes, dtypes or devices do not match; on a CPU also when offsets do not fit or
            a log-prob of an active token is infinite, or NaN in `old_logprobs`. Where values are
            not read, such a token is taken as masked.
    """
    op = "sampler_weights"
    given = {"old_logprobs": old_logprobs, "sampler_logprobs": sampler_logprobs}
    layout, (old, sampler), active = token_inputs(op, given, cu_seqlens, mask)
    sequences = Sequences(layout, active)
    old = widen(old)
    compared = active & ~sampler.isnan()
    gap = _gap(old, sampler, compared)

    by_sequence = params.weight in ("seq_sum", "seq_mean")
    level = sequences.at_level(gap, params.weight) if by_sequence else gap
    # What is decided may overflow, and is on the right side of every bound then.
    inside = _is_within(level.exp().to(old.dtype), params.low, params.high)
    ratio = level.clamp(max=LOG_RATIO_LIMIT).exp().to(old.dtype)
    kept = active
    for rejection in params.reject:
        kept = kept & _keeps(rejection, gap, sequences)

    truncated = torch.zeros_like(kept)
    if params.weight == "none":
        bounded = torch.ones_like(ratio)
    elif params.outside == "truncate":
        bounded = ratio.clamp(number(params.low, ratio), number(params.high, ratio))
        truncated = kept & ~inside
    else:
        bounded = torch.where(inside, ratio, 0.0)
    if params.normalize:
        mean = sequences.mean_weight(torch.where(active, bounded, 0.0), by_sequence)
        bounded = bounded * torch.where(mean > SMALLEST_MEAN, 1 / mean, 1.0).to(bounded.dtype)
    weights = torch.where(kept, bounded, 0.0)
    stats = _stats(gap, ratio, weights, truncated, active, compared)
    return SamplerCorrection(layout.restore(weights), stats)


def off_policy_sequence_mask(
    logprobs: Numbers,
    sampler_logprobs: Numbers,
    advantages: Numbers,
    cu_seqlens: Tensor | Sequence[int] | None = None,
    *,
    threshold: float,
    mask: Numbers | None = None,
) -> Tensor:
    """1 for every token, but 0 where A < 0 in sequences that the policy has moved away from (OPSM).

    A token is dropped where its advantage is negative and the mean of sampler - logprobs over the
    active tokens of its sequence is above `threshold`; with one advantage per sequence, whole
    sequences are.

    Args:
        logprobs: [T] or [B, C] log-probs under the policy that is being updated, nats.
        sampler_logprobs: the same as the sampler reported them, or NaN where it did not.
        advantages: [B] or [B, 1] per sequence, or in the shape of the tokens.
        cu_seqlens: [B + 1] offsets of packed sequences, any integers. None for padded tokens.
        threshold: nats per token, >= 0.
        mask: in the shape of the tokens, of any dtype: what is above 0 is trained on; the other
            tokens may hold anything. None: all.

    Returns:
        Zeros and ones in the shape of the tokens and fp32 (fp64 from fp64 `logprobs`), 0 also where
        `mask` is: factors for `policy_weights` of a loss.

    Raises:
        ValueError: as `sampler_weights`; the threshold is negative or NaN; advantages [n] may be
            [B] as well as [T]; on a CPU also when one of them is not finite. Where values are not
            read, such an advantage drops what it is for.
    """
    op = "off_policy_sequence_mask"
    if not threshold >= 0:
        raise ValueError(f"{op}: threshold is {threshold}, expected >= 0")
    given = {"logprobs": logprobs, "sampler_logprobs": sampler_logprobs}
    layout, (new, sampler), active = token_inputs(op, given, cu_seqlens, mask)
    advantage, has_advantage = advantage_inputs(layout, advantages, new, active)
    new = widen(new)
    near = is_near_sampler(new, sampler, advantage, active, layout.offsets, threshold)
    kept = has_advantage & near
    return layout.restore(kept.to(new.dtype))


def top_entropy_threshold(
    entropy: Numbers, *, fraction: float, mask: Numbers | None = None
) -> Tensor:
    """The entropy that the `fraction` of the active tokens with the largest ones has at least.

    It is the (1 - fraction) quantile of the active tokens of this call, linearly interpolated. Take
    it once of a whole batch, and `top_entropy_mask` of its parts chooses the tokens that it would
    of the whole.

    Args:
        entropy: of any shape, nats.
        fraction: of the active tokens, in [0, 1]; at 0 it is the largest entropy.
        mask: in the shape of `entropy`, of any dtype: what is above 0 is trained on; the other
            tokens may hold anything. None: all.

    Returns:
        Scalar in fp32 (fp64 from fp64 `entropy`); infinite without active tokens.

    Raises:
        ValueError: shapes or dtypes do not match or the fraction is outside [0, 1]; on a CPU also
            when an active token's entropy is not finite. Where values are not read, such a token
            is taken as masked.
    """
    op = "top_entropy_threshold"
    values, active = entropy_inputs(op, entropy, mask)
    return _threshold(op, values, active, fraction)


def top_entropy_mask(
    entropy: Numbers,
    *,
    fraction: float | None = None,
    threshold: Tensor | float | None = None,
    mask: Numbers | None = None,
) -> Tensor:
    """1 for the active tokens with the largest entropy, 0 for the others.

    A token stays where its entropy is at least the threshold: the one given, or the
    `top_entropy_threshold` of this call.

    Args:
        entropy: of any shape, nats.
        fraction: of the active tokens, in [0, 1]; this or `threshold`.
        threshold: nats, a number or a scalar tensor.
        mask: in the shape of `entropy`, of any dtype: what is above 0 is trained on; the other
            tokens may hold anything. None: all.

    Returns:
        Zeros and ones in the shape of `entropy` and fp32 (fp64 from fp64 `entropy`), 0 also where
        `mask` is: factors for `policy_weights` of a loss.

    Raises:
        ValueError: as `top_entropy_threshold`; both or neither of `fraction` and `threshold` are
            given, or the threshold is NaN or not one number.
    """
    op = "top_entropy_mask"
    values, active = entropy_inputs(op, entropy, mask)
    if (fraction is None) == (threshold is None):
        raise ValueError(
            f"{op}: fraction is {fraction} and threshold is {threshold}, expected one of them"
        )
    if isinstance(threshold, Tensor):
        if threshold.numel() != 1:
            shape = tuple(threshold.shape)
            raise ValueError(f"{op}: threshold has shape {shape}, expected one number")
        threshold = threshold.detach().reshape(())
    elif threshold is None:
        assert fraction is not None
        threshold = _threshold(op, values, active, fraction)
    elif threshold != threshold:
        raise ValueError(f"{op}: threshold is {threshold}, expected a number")
    return (active & (values >= threshold)).to(values.dtype)


def _gap(logprobs: Tensor, sampler_logprobs: Tensor, compared: Tensor) -> Tensor:
    """logprobs - sampler_logprobs, 0 where there is nothing to compare."""
    # Not multiplied: a masked token may hold anything, and 0 * NaN is NaN.
    return torch.where(compared, logprobs - sampler_logprobs.to(logprobs.dtype), 0.0)


def _is_within(x: Tensor, low: float, high: float) -> Tensor:
    return (x >= low) & (x <= high)


def _keeps(rejection: Rejection, gap: Tensor, sequences: Sequences) -> Tensor:
    level = "token" if rejection.level == "seq_any" else rejection.level
    if rejection.statistic == "ratio":
        statistic = sequences.at_level(gap, level).exp()
    elif rejection.statistic == "k2":
        statistic = sequences.at_level(gap.square() / 2, level)
    else:
        # expm1, because e^d - 1 in fp32 keeps nothing of a small d's square.
        statistic = sequences.at_level(torch.expm1(gap) - gap, level)
    inside = _is_within(statistic, rejection.low, rejection.high)
    if rejection.level == "seq_any":
        return sequences.to_tokens(sequences.sum(~inside) == 0)
    return inside


def _stats(
    gap: Tensor,
    ratio: Tensor,
    weights: Tensor,
    truncated: Tensor,
    active: Tensor,
    compared: Tensor,
) -> SamplerCorrectionStats:
    def mean(x: Tensor, among: Tensor) -> Tensor:
        return torch.where(among, x.double(), 0.0).sum() / among.sum().clamp(min=1)

    def largest(x: Tensor) -> Tensor:
        seen = torch.where(compared, x, -torch.inf)
        found = torch.cat([seen, seen.new_full((1,), -torch.inf)]).amax()
        return torch.where(compared.any(), found, 0.0)

    limited = gap.clamp(max=LOG_RATIO_LIMIT)
    spread = mean(weights.double().square(), active)
    scalars = SamplerCorrectionStats(
        gap=mean(gap.abs(), compared),
        gap_max=largest(gap.abs()),
        kl=mean(torch.expm1(limited) - limited, compared),
        ratio_mean=mean(ratio, compared),
        ratio_min=-largest(-ratio),
        ratio_max=largest(ratio),
        truncated=mean(truncated, active),
        dropped=mean(weights == 0, active),
        effective_sample_size=torch.where(spread > 0, mean(weights, active) ** 2 / spread, 0.0),
        active_tokens=active.sum(),
        compared_tokens=compared.sum(),
    )
    fields = {
        field.name: getattr(scalars, field.name).to(gap.dtype)
        for field in dataclasses.fields(scalars)
    }
    return SamplerCorrectionStats(**fields)


def _threshold(op: str, values: Tensor, active: Tensor, fraction: float) -> Tensor:
    if not 0 <= fraction <= 1:
        raise ValueError(f"{op}: fraction is {fraction}, expected in [0, 1]")
    return quantile(values, active, 1.0 - fraction)
