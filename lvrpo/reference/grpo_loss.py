"""The clipped policy loss on packed tokens, with its KL and entropy terms and its metrics."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

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
    tokens, sequences = len(logp), len(cu_seqlens) - 1
    position = torch.arange(tokens, device=logp.device)
    sequence = torch.searchsorted(cu_seqlens, position, right=True) - 1

    # Masking comes first: a masked token may hold anything, and 0 * NaN is NaN.
    weight = torch.ones_like(logp) if token_weights is None else token_weights.detach().to(logp)
    active = weight != 0
    logp = torch.where(active, logp, 0.0)
    old = logp if old_logprobs is None else torch.where(active, old_logprobs.to(logp), 0.0)
    log_ratio = logp - old.detach()
    advantage = advantages.detach().to(logp)
    if len(advantage) == sequences:
        advantage = advantage[sequence]

    def per_sequence(x: Tensor) -> Tensor:  # [T] -> [B]
        return x.new_zeros(sequences).index_add(0, sequence, x)

    count = per_sequence(active.to(logp))
    if params.ratio == "seq_mean":
        ratio = (per_sequence(log_ratio) / count.clamp(min=1)).exp()[sequence]
    else:
        ratio = log_ratio.exp()

    # max(-rho A, -clip(rho) A), as one clamp whose side depends on the sign of A.
    low, high = 1.0 - params.clip_low, 1.0 + params.clip_high
    cap = torch.inf if params.ratio_cap is None else params.ratio_cap
    clipped = torch.where(advantage >= 0, ratio.clamp(max=high), ratio.clamp(low, cap))
    policy = -weight * advantage * (logp if params.ratio == "none" else clipped)

    kl = torch.zeros_like(logp)
    if ref_logprobs is not None:
        kl = estimate_kl(torch.where(active, ref_logprobs.detach().to(logp), 0.0) - logp, params.kl)
    kl_term = kl * log_ratio.exp() if params.kl_factor == "ratio" else kl
    ent = torch.zeros_like(logp) if entropy is None else torch.where(active, entropy.to(logp), 0.0)

    # Every aggregation is one factor per sequence.
    total = count.sum()
    if params.aggregation == "token_mean":
        factor = torch.ones_like(count) / (denominator or total.clamp(min=1))
    else:
        factor = torch.ones_like(count) / (denominator or max(sequences, 1))
        if params.aggregation == "seq_mean_token_mean":
            factor = factor / count.clamp(min=1)
        elif params.aggregation == "seq_mean_token_sum_norm":
            assert params.max_length is not None
            factor = factor / params.max_length

    def aggregate(x: Tensor) -> Tensor:
        return (factor * per_sequence(torch.where(active, x, 0.0))).sum()

    policy_loss = aggregate(policy)
    loss = policy_loss - params.entropy_coef * aggregate(ent)
    if params.beta != 0:  # a reference given for the metric alone may overflow
        loss = loss + params.beta * aggregate(kl_term)

    with torch.no_grad():
        none = total == 0

        def mean(x: Tensor) -> Tensor:
            return torch.where(active, x.double(), 0.0).sum() / total.clamp(min=1)

        def extreme(x: Tensor, sign: float) -> Tensor:
            seen = torch.where(active, sign * x, -torch.inf)
            return sign * torch.cat([seen, seen.new_full((1,), -torch.inf)]).amax()

        metrics = (
            policy_loss,
            mean(kl),
            mean(ent),
            mean((advantage < 0) & (ratio < low)),
            mean((advantage > 0) & (ratio > high)),
            mean((advantage < 0) & (ratio > cap)),
            torch.where(none, 1.0, extreme(ratio, -1.0)),
            torch.where(none, 1.0, extreme(ratio, 1.0)),
            torch.where(none, 1.0, mean(ratio)),
            torch.where(none, 1.0, mean(ratio) ** 2 / mean(ratio.double().square())),
            total,
        )
        return loss, torch.stack([x.to(logp.dtype) for x in metrics])


def estimate_kl(d: Tensor, kind: str) -> Tensor:
    """KL(policy || reference) of one sampled token, from d = log reference - log policy."""
    if kind == "k1":
        return -d
    if kind == "abs":
        return d.abs()
    if kind == "k2":
        return d.square() / 2
    # expm1, because e^d - 1 in fp32 keeps nothing of a small d's square.
    return torch.expm1(d) - d
