"""The policy loss on packed tokens, with its KL and entropy terms and its metrics."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lvrpo.reference._policy_terms import (
    Sequences,
    Tokens,
    held,
    kl_terms,
    ratio_of,
    surrogate,
)
from lvrpo.reference._precision import widen

if TYPE_CHECKING:
    from lvrpo.ops._policy_loss import LossParams


def grpo_loss(
    logprobs: Tensor,  # [T]
    old_logprobs: Tensor | None,  # [T]
    advantages: Tensor,  # [B] or [T]
    cu_seqlens: Tensor,  # [B + 1]
    *,
    ref_logprobs: Tensor | None = None,  # [T]
    entropy: Tensor | None = None,  # [T]
    token_weights: Tensor | None = None,  # [T]
    denominator: float | None = None,
    params: LossParams,
) -> tuple[Tensor, Tensor]:
    """See `lvrpo.grpo_loss`; the loss, and a vector of the fields of its metrics."""
    logp = widen(logprobs)
    tokens, batch = len(logp), len(cu_seqlens) - 1
    position = torch.arange(tokens, device=logp.device)
    sequence = torch.searchsorted(cu_seqlens, position, right=True) - 1

    # Masking comes first: a masked token may hold anything, and 0 * NaN is NaN.
    weight = torch.ones_like(logp) if token_weights is None else token_weights.detach().to(logp)
    active = weight != 0
    logp = torch.where(active, logp, 0.0)
    old = logp if old_logprobs is None else torch.where(active, old_logprobs.to(logp), 0.0)
    log_ratio = logp - old.detach()
    advantage = advantages.detach().to(logp)
    if len(advantage) == batch:
        advantage = advantage[sequence]

    # Counted as integers: a float32 stops at 2^24 tokens.
    counted = torch.zeros_like(cu_seqlens[1:]).index_add(0, sequence, active.long())
    count, total = counted.to(logp), counted.sum().to(logp)
    sequences = Sequences(sequence, count)
    ratio = ratio_of(log_ratio, advantage, sequences, params)
    x = Tokens(logp, log_ratio, ratio, advantage)
    policy = weight * surrogate(x, params)

    kl = kl_term = torch.zeros_like(logp)
    if ref_logprobs is not None:
        ref = torch.where(active, ref_logprobs.detach().to(logp), 0.0)
        kl, kl_term = kl_terms(logp, ref, log_ratio, params)
    ent = torch.zeros_like(logp) if entropy is None else torch.where(active, entropy.to(logp), 0.0)

    # Every aggregation is one factor per sequence.
    outer = {"token_mean": total, "token_sum": torch.ones_like(total)}.get(
        params.aggregation, total.new_tensor(batch) if params.count_empty else (count > 0).sum()
    )
    factor = torch.ones_like(count) / (denominator or outer.clamp(min=1))
    if params.aggregation == "seq_mean_token_mean":
        factor = factor / count.clamp(min=1)
    elif params.aggregation == "seq_mean_token_sum_norm":
        assert params.max_length is not None
        factor = factor / params.max_length

    def aggregate(x: Tensor) -> Tensor:
        return (factor * sequences.sum(torch.where(active, x, 0.0))).sum()

    policy_loss = aggregate(policy)
    loss = policy_loss - params.entropy_coef * aggregate(ent)
    if params.beta != 0:  # a reference given for the metric alone may overflow
        loss = loss + params.beta * aggregate(kl_term)

    with torch.no_grad():
        none = total == 0

        def mean(x: Tensor) -> Tensor:
            return torch.where(active, x.double(), 0.0).sum() / total.clamp(min=1)

        def extreme(x: Tensor, sign: float) -> Tensor:
            on = torch.where(active, sign * x, -torch.inf)
            return sign * torch.cat([on, on.new_full((1,), -torch.inf)]).amax()

        # A clip per token happens inside the sequence's ratio: what it clips is the tokens' own.
        seen = log_ratio.exp() if params.surrogate == "log_clip" else ratio

        metrics = (
            policy_loss,
            mean(kl),
            mean(ent),
            *(mean(tokens_held) for tokens_held in held(x, params)),
            torch.where(none, 1.0, extreme(seen, -1.0)),
            torch.where(none, 1.0, extreme(seen, 1.0)),
            torch.where(none, 1.0, mean(seen)),
            torch.where(none, 1.0, mean(seen) ** 2 / mean(seen.double().square())),
            total,
        )
        return loss, torch.stack([x.to(logp.dtype) for x in metrics])
