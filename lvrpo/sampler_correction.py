"""Factors per token against the mismatch of sampler and trainer, for `token_weights` of grpo_loss.

An inference engine and the trainer give one token different log-probs even at equal weights. With u
the sampler's and o the trainer's log-prob of a sampled token, exp(o - u) is the importance ratio
that corrects it. Choosing among the published corrections: docs/sampler-correction.md.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from lvrpo._sampler_params import (
    SAMPLER_CORRECTION_PRESETS,
    Rejection,
    SamplerCorrection,
    SamplerCorrectionParams,
    SamplerCorrectionStats,
)
from lvrpo.ops import _checks
from lvrpo.reference._precision import widen

__all__ = [
    "SAMPLER_CORRECTION_PRESETS",
    "Rejection",
    "SamplerCorrection",
    "SamplerCorrectionParams",
    "SamplerCorrectionStats",
    "off_policy_sequence_mask",
    "sampler_weights",
    "top_entropy_mask",
]

_DEFAULT = SamplerCorrectionParams()


def sampler_weights(
    old_logprobs: Tensor,
    sampler_logprobs: Tensor,
    cu_seqlens: Tensor,
    *,
    mask: Tensor | None = None,
    params: SamplerCorrectionParams = _DEFAULT,
) -> SamplerCorrection:
    """Importance weights exp(old - sampler), bounded, with tokens and sequences rejected.

    No gradient flows through it. A bound is inclusive: a ratio that equals it stays as it is.

    Args:
        old_logprobs: [T] log-probs of the sampled tokens by the trainer's forward, nats, before the
            update. Both must be normalised over the same support: a sampler that reports log-probs
            after top-k or top-p is off by the log of the kept mass at every token.
        sampler_logprobs: [T] the same as the sampler reported them; NaN where it reported none,
            which counts as no mismatch.
        cu_seqlens: [B + 1] int64 offsets of the sequences; a sequence may be empty.
        mask: [T] bool, the tokens that are trained on; the others may hold anything. None: all.
        params: the correction.

    Returns:
        SamplerCorrection in fp32 (fp64 from fp64 `old_logprobs`).

    Raises:
        ValueError: shapes, dtypes or devices do not match; on a CPU also when offsets do not fit or
            a log-prob of an active token is infinite, or NaN in `old_logprobs`.
    """
    op = "sampler_weights"
    tokens = {"old_logprobs": old_logprobs, "sampler_logprobs": sampler_logprobs}
    active = _check(op, tokens, mask, cu_seqlens)
    sequences = _Sequences(cu_seqlens, active)
    old = widen(old_logprobs.detach())
    gap = _gap(old, sampler_logprobs, active)

    ratio = gap.exp()
    if params.weight in ("seq_sum", "seq_mean"):
        ratio = sequences.at_level(gap, params.weight).exp().to(old.dtype)
    inside = (ratio >= params.low) & (ratio <= params.high)
    kept = active
    for rejection in params.reject:
        kept = kept & _keeps(rejection, gap, sequences)

    if params.weight == "none":
        weights = kept.to(old.dtype)
        truncated = torch.zeros_like(kept)
    elif params.outside == "truncate":
        weights = torch.where(kept, ratio.clamp(params.low, params.high), 0.0)
        truncated = kept & ~inside
    else:
        weights = torch.where(kept & inside, ratio, 0.0)
        truncated = torch.zeros_like(kept)
    if params.normalize:
        total = weights.double().sum()
        scale = torch.where(total > 0, kept.sum() / total, 1.0)
        weights = weights * scale.to(weights.dtype)
    return SamplerCorrection(weights, _stats(gap, ratio, weights, truncated, active))


def off_policy_sequence_mask(
    logprobs: Tensor,
    sampler_logprobs: Tensor,
    advantages: Tensor,
    cu_seqlens: Tensor,
    *,
    threshold: float,
    mask: Tensor | None = None,
) -> Tensor:
    """1 for every token, but 0 for sequences with A < 0 that the policy has moved away from (OPSM).

    A sequence is dropped where its advantage is negative and the mean of sampler - logprobs over
    its active tokens is above `threshold`.

    Args:
        logprobs: [T] log-probs under the policy that is being updated, nats.
        sampler_logprobs: [T] the same as the sampler reported them, or NaN where it did not.
        advantages: [B] per sequence.
        cu_seqlens: [B + 1] int64 offsets of the sequences.
        threshold: nats per token, >= 0.
        mask: [T] bool, the tokens that are trained on; the others may hold anything. None: all.

    Returns:
        [T] zeros and ones in fp32 (fp64 from fp64 `logprobs`), 0 also where `mask` is False.

    Raises:
        ValueError: as `sampler_weights`, or the threshold is negative or NaN.
    """
    op = "off_policy_sequence_mask"
    if not threshold >= 0:
        raise ValueError(f"{op}: threshold is {threshold}, expected >= 0")
    tokens = {"logprobs": logprobs, "sampler_logprobs": sampler_logprobs}
    active = _check(op, tokens, mask, cu_seqlens)
    _checks.check_shape(op, "advantages", advantages, (cu_seqlens.shape[0] - 1,))
    _checks.check_floating(op, "advantages", advantages)
    _checks.check_same_device(op, logprobs=logprobs, advantages=advantages)
    if _checks.check_values(advantages):
        _refuse_first(op, "advantages", advantages, ~advantages.isfinite(), "a finite number")
    new = widen(logprobs.detach())
    drift = -_gap(new, sampler_logprobs, active)
    sequences = _Sequences(cu_seqlens, active)
    far = sequences.mean(drift) > threshold
    dropped = sequences.to_tokens((advantages.detach() < 0) & far)
    return (active & ~dropped).to(new.dtype)


def top_entropy_mask(entropy: Tensor, *, fraction: float, mask: Tensor | None = None) -> Tensor:
    """1 for the `fraction` of the active tokens with the largest entropy, 0 for the others.

    A token stays where its entropy is at least the (1 - fraction) quantile of the active tokens,
    linearly interpolated. The quantile is that of this call.

    Args:
        entropy: [T], nats.
        fraction: of the active tokens, in (0, 1].
        mask: [T] bool, the tokens that are trained on; the others may hold anything. None: all.

    Returns:
        [T] zeros and ones in fp32 (fp64 from fp64 `entropy`), 0 also where `mask` is False.

    Raises:
        ValueError: shapes or dtypes do not match or the fraction is outside (0, 1]; on a CPU also
            when an active token's entropy is not finite.
    """
    op = "top_entropy_mask"
    if not 0 < fraction <= 1:
        raise ValueError(f"{op}: fraction is {fraction}, expected in (0, 1]")
    active = _check(op, {"entropy": entropy}, mask)
    values = torch.where(active, widen(entropy.detach()), torch.inf)
    if values.numel() == 0:
        return values
    # torch.quantile has a size limit and would need the active tokens gathered, which waits for the
    # device.
    ascending = values.sort().values
    last = (active.sum(dim=0, keepdim=True) - 1).clamp(min=0)
    rank = (1.0 - fraction) * last.double()
    below = ascending.gather(0, rank.floor().long())
    above = ascending.gather(0, torch.minimum(rank.ceil().long(), last))
    threshold = torch.lerp(below, above, rank.frac().to(values.dtype))
    return (active & (values >= threshold)).to(values.dtype)


class _Sequences:
    """Sums over the active tokens of packed sequences, in fp64 and in the order of the tokens."""

    def __init__(self, cu_seqlens: Tensor, active: Tensor) -> None:
        tokens = active.shape[0]
        # Offsets that do not fit are refused on a CPU; where nobody reads them they stay in range.
        self.offsets = cu_seqlens.clamp(0, tokens)
        position = torch.arange(tokens, device=active.device)
        sequence = torch.searchsorted(self.offsets, position, right=True) - 1
        self.sequence = sequence.clamp(0, max(cu_seqlens.shape[0] - 2, 0))
        self.count = self.sum(active)

    def sum(self, x: Tensor) -> Tensor:
        """[T] -> [B]; 0 for an empty sequence."""
        # Unlike index_add on a GPU, the same bits every time.
        return torch.segment_reduce(x.double(), "sum", offsets=self.offsets, unsafe=True)

    def mean(self, x: Tensor) -> Tensor:
        """[T] -> [B]; 0 for a sequence without active tokens."""
        return self.sum(x) / self.count.clamp(min=1)

    def to_tokens(self, x: Tensor) -> Tensor:
        """[B] -> [T]."""
        return x[self.sequence]

    def at_level(self, x: Tensor, level: str) -> Tensor:
        """[T] -> [T]: every token's own, or what its sequence has."""
        if level == "token":
            return x
        return self.to_tokens(self.sum(x) if level == "seq_sum" else self.mean(x))


def _gap(logprobs: Tensor, sampler_logprobs: Tensor, active: Tensor) -> Tensor:
    """logprobs - sampler_logprobs, 0 where there is nothing to compare."""
    # Masking comes first: a masked token may hold anything, and 0 * NaN is NaN.
    compared = active & ~sampler_logprobs.isnan()
    return torch.where(compared, logprobs - sampler_logprobs.detach().to(logprobs.dtype), 0.0)


def _keeps(rejection: Rejection, gap: Tensor, sequences: _Sequences) -> Tensor:
    level = "token" if rejection.level == "seq_any" else rejection.level
    if rejection.statistic == "ratio":
        statistic = sequences.at_level(gap, level).exp()
    elif rejection.statistic == "k2":
        statistic = sequences.at_level(gap.square() / 2, level)
    else:
        # expm1, because e^d - 1 in fp32 keeps nothing of a small d's square.
        statistic = sequences.at_level(torch.expm1(gap) - gap, level)
    inside = (statistic >= rejection.low) & (statistic <= rejection.high)
    if rejection.level == "seq_any":
        return sequences.to_tokens(sequences.sum(~inside) == 0)
    return inside


def _stats(
    gap: Tensor, ratio: Tensor, weights: Tensor, truncated: Tensor, active: Tensor
) -> SamplerCorrectionStats:
    count = active.sum()
    none = count == 0

    def mean(x: Tensor) -> Tensor:
        return torch.where(active, x.double(), 0.0).sum() / count.clamp(min=1)

    def largest(x: Tensor) -> Tensor:
        seen = torch.where(active, x, -torch.inf)
        return torch.cat([seen, seen.new_full((1,), -torch.inf)]).amax()

    spread = mean(weights.double().square())
    scalars = SamplerCorrectionStats(
        gap=mean(gap.abs()),
        gap_max=largest(gap.abs()),
        kl=mean(torch.expm1(gap) - gap),
        ratio_mean=mean(ratio),
        ratio_min=-largest(-ratio),
        ratio_max=largest(ratio),
        truncated=mean(truncated),
        dropped=mean(weights == 0),
        effective_sample_size=torch.where(spread > 0, mean(weights) ** 2 / spread, 0.0),
        active_tokens=count,
    )
    fields = {
        field.name: torch.where(none, 0.0, getattr(scalars, field.name)).to(gap.dtype)
        for field in dataclasses.fields(scalars)
    }
    return SamplerCorrectionStats(**fields)


def _check(
    op: str, tokens: dict[str, Tensor], mask: Tensor | None, cu_seqlens: Tensor | None = None
) -> Tensor:
    """Refuses what does not fit; the active tokens as bool [T]."""
    first = next(iter(tokens.values()))
    for name, tensor in tokens.items():
        _checks.check_shape(op, name, tensor, ("T",) if tensor is first else (first.shape[0],))
        _checks.check_floating(op, name, tensor)
    if mask is None:
        active = torch.ones_like(first, dtype=torch.bool)
    else:
        _checks.check_shape(op, "mask", mask, (first.shape[0],))
        if mask.dtype != torch.bool:
            raise ValueError(f"{op}: mask is {mask.dtype}, expected torch.bool")
        active = mask
    _checks.check_same_device(op, **tokens, mask=mask, cu_seqlens=cu_seqlens)
    if cu_seqlens is not None:
        _checks.check_offsets(op, "cu_seqlens", cu_seqlens, first.shape[0])
    if _checks.check_values(first):
        for name, tensor in tokens.items():
            bad = tensor.isinf() if name == "sampler_logprobs" else ~tensor.isfinite()
            _refuse_first(op, name, tensor, active & bad, "a finite number where the mask is True")
    return active


def _refuse_first(op: str, name: str, values: Tensor, bad: Tensor, expected: str) -> None:
    if bool(bad.any()):
        at = int(bad.nonzero()[0])
        raise ValueError(f"{op}: {name}[{at}] is {float(values[at])}, expected {expected}")
