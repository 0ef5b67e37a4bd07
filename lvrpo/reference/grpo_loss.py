"""The policy loss on packed tokens, with its KL and entropy terms and its statistics."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lvrpo.dtypes import widen
from lvrpo.params.log_ratio import LOG_RATIO_LIMIT
from lvrpo.params.loss_metrics import STATISTICS
from lvrpo.reference._log_ratio import saturate
from lvrpo.reference._policy_terms import (
    Sequences,
    Tokens,
    excess,
    held,
    kl_factor_level,
    kl_terms,
    level_of,
    surrogate,
)
from lvrpo.token_selection import EVERY_TOKEN, TokenSelection, usable_tokens

if TYPE_CHECKING:
    from lvrpo.params.policy_loss import LossParams


def grpo_loss(
    logprobs: Tensor,  # [T]
    old_logprobs: Tensor | None,  # [T]
    advantages: Tensor,  # [B] or [T]
    cu_seqlens: Tensor,  # [B + 1]
    *,
    mask: Tensor | None = None,  # [T] bool
    policy_weights: Tensor | None = None,  # [T]
    level: str | None = None,
    ref_logprobs: Tensor | None = None,  # [T]
    entropy: Tensor | None = None,  # [T]
    denominator: float | Tensor | None = None,
    selection: TokenSelection = EVERY_TOKEN,
    params: LossParams,
) -> tuple[Tensor, Tensor]:
    """See `lvrpo.grpo_loss`; the loss, and what `LossMetrics.from_statistics` takes."""
    logp = widen(logprobs)
    tokens, batch = len(logp), len(cu_seqlens) - 1
    position = torch.arange(tokens, device=logp.device)
    sequence = torch.searchsorted(cu_seqlens, position, right=True) - 1

    def as_data(x: Tensor) -> Tensor:
        return x.detach().to(logp)

    advantage = as_data(advantages)
    if level == "sequence" or (level is None and len(advantage) == batch):
        advantage = advantage[sequence]
    old = logp.detach() if old_logprobs is None else as_data(old_logprobs)
    ref = None if ref_logprobs is None else as_data(ref_logprobs)
    weight = torch.ones_like(logp) if policy_weights is None else as_data(policy_weights)
    ent = torch.zeros_like(logp) if entropy is None else entropy.to(logp)

    # Leaving out comes first: such a token may hold anything, and 0 * NaN is NaN.
    asked = torch.ones_like(logp, dtype=torch.bool) if mask is None else mask > 0
    active = usable_tokens(asked, weight, advantage, logp, old, ent, ref)
    logp, old, ent = (torch.where(active, x, 0.0) for x in (logp, old, ent))
    # Without old log-probs the ratio is 1, and its gradient that of the log-prob.
    log_ratio = logp - (logp.detach() if old_logprobs is None else old)

    # Counted as integers: a float32 stops at 2^24 tokens.
    counted = torch.zeros_like(cu_seqlens[1:]).index_add(0, sequence, active.long())
    sequences = Sequences(sequence, counted.to(logp))
    count, total = sequences.count, counted.sum().to(logp)

    unbounded = level_of(log_ratio, advantage, sequences, params)
    high, kept = selection.of(logp, ent, advantage, active, cu_seqlens)
    pulls = kept & (weight != 0) & (advantage != 0)
    bounded = saturate(torch.where(pulls, unbounded, 0.0), params.log_ratio_limit)
    x = Tokens(logp, log_ratio, bounded, torch.where(pulls, advantage, 0.0))
    policy = torch.where(pulls, weight, 0.0) * surrogate(x, params)

    kl = torch.zeros_like(logp)
    if ref is not None:
        ref = torch.where(active, ref, 0.0)
        factor_level = kl_factor_level(log_ratio, sequences, params)
        kl = kl_terms(logp, ref, factor_level, params, params.log_ratio_limit)

    # Every aggregation is one factor per sequence.
    outer = {"token_mean": total, "token_sum": torch.ones_like(total)}.get(
        params.aggregation, total.new_tensor(batch) if params.count_empty else (count > 0).sum()
    )
    if denominator is None:
        outer = outer.clamp(min=1)
    else:  # 0 is that of a step with nothing to divide
        outer = torch.zeros_like(total) + denominator
        outer = torch.where(outer > 0, outer, torch.inf)
    factor = torch.ones_like(count) / outer
    if params.aggregation == "seq_mean_token_mean":
        factor = factor / count.clamp(min=1)
    elif params.aggregation == "seq_mean_token_sum_norm":
        assert params.max_length is not None
        factor = factor / params.max_length

    def aggregate(x: Tensor) -> Tensor:
        return (factor * sequences.sum(torch.where(active, x, 0.0))).sum()

    policy_loss, bonus = aggregate(policy), aggregate(ent)
    if params.entropy_aggregation == "token_mean":
        bonus = torch.where(high, ent, 0.0).sum() / high.sum().clamp(min=1)
    loss = policy_loss - params.entropy_coef * bonus
    if params.beta != 0:  # a reference given for the statistics alone may overflow
        loss = loss + params.beta * aggregate(kl)

    measured = _Measured(active, asked, advantage, unbounded, ent, ref)
    statistics = _statistics(logp, log_ratio, sequences, measured, params)
    statistics["policy_loss"] = policy_loss
    return loss, torch.stack([statistics[name].detach().double() for name in STATISTICS])


@dataclasses.dataclass(frozen=True)
class _Measured:
    """What statistics are made of besides log-probs, all [T]: which tokens count, and which the
    mask lets in; advantages; the log of the ratio at its level; entropy; reference log-probs.
    """

    active: Tensor
    asked: Tensor
    advantage: Tensor
    level: Tensor
    entropy: Tensor
    ref: Tensor | None


@torch.no_grad()
def _statistics(
    logp: Tensor, log_ratio: Tensor, sequences: Sequences, x: _Measured, params: LossParams
) -> dict[str, Tensor]:
    """What `LossMetrics.from_statistics` takes, by name, but for `policy_loss`."""
    # They have a limit whether or not the loss has one.
    limit = min(LOG_RATIO_LIMIT, params.log_ratio_limit or LOG_RATIO_LIMIT)
    kl = torch.zeros_like(logp)
    if x.ref is not None:
        factor_level = kl_factor_level(log_ratio, sequences, params)
        kl = kl_terms(logp, x.ref, factor_level, params, limit)
    kl_old = excess(saturate(log_ratio, limit))
    seen = Tokens(logp, log_ratio, saturate(x.level, params.log_ratio_limit), x.advantage)
    low, high, cap = (x.active & by for by in held(seen, params))
    # A clip per token happens inside the sequence's ratio: what it clips is the tokens' own.
    ratio = saturate(log_ratio if params.surrogate == "log_clip" else x.level, limit).exp()
    some, tokens = sequences.count > 0, sequences.count.sum()

    def of_tokens(y: Tensor) -> Tensor:
        return torch.where(x.active, y.double(), 0.0).sum()

    def of_ratios(y: Tensor) -> Tensor:
        # What a sequence has one of counts once.
        if not params.one_ratio_per_sequence:
            return of_tokens(y)
        return sequences.mean(torch.where(x.active, y.double(), 0.0)).sum()

    def of_sequences(y: Tensor) -> Tensor:
        return sequences.mean(torch.where(x.active, y.to(logp), 0.0))

    def largest(y: Tensor, on: Tensor) -> Tensor:
        found = torch.where(on, y.double(), -torch.inf)
        return torch.cat([found, found.new_full((1,), -torch.inf)]).amax()

    return {
        "kl": of_tokens(kl),
        "entropy": of_tokens(x.entropy),
        "clip_fraction_low": of_ratios(low),
        "clip_fraction_high": of_ratios(high),
        "clip_fraction_cap": of_ratios(cap),
        "_ratio": of_ratios(ratio),
        "_ratio_squared": of_ratios(ratio.double().square()),
        "_ratios": some.sum() if params.one_ratio_per_sequence else tokens,
        "kl_old": of_tokens(kl_old),
        "active_tokens": tokens,
        "active_sequences": some.sum(),
        "dropped_tokens": (x.asked & ~x.active).sum(),
        "ratio_min": largest(-ratio, x.active),
        "ratio_max": largest(ratio, x.active),
        "clip_fraction_low_min": largest(-of_sequences(low), some),
        "clip_fraction_high_max": largest(of_sequences(high), some),
        "kl_old_max": largest(of_sequences(kl_old), some),
    }
