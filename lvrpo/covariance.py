"""Tokens whose advantage and log-prob vary together: those that make a policy's entropy collapse.

With the means of the active tokens of a call, the covariance of a token is
(A - mean A)(logp - mean logp). Clip-Cov takes the policy gradient of some of the largest away,
KL-Cov holds the largest at the old policy. Source: Cui et al., "The Entropy Mechanism of
Reinforcement Learning for Reasoning Language Models", as verl has them.

T packed tokens of B sequences, or [B, C] padded ones, whose sequences are the rows.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lvrpo._sampler_inputs import Numbers, advantage_inputs, token_inputs
from lvrpo.dtypes import widen
from lvrpo.params.policy_loss import LossParams
from lvrpo.token_layout import TokenLayout

_CLIP_COV = LossParams.preset("clip_cov")


def clip_cov_weights(
    logprobs: Numbers,
    old_logprobs: Numbers,
    advantages: Numbers,
    cu_seqlens: Tensor | Sequence[int] | None = None,
    *,
    fraction: float = 2e-4,
    low: float = 1.0,
    high: float = 5.0,
    mask: Numbers | None = None,
    params: LossParams = _CLIP_COV,
    generator: torch.Generator | None = None,
) -> Tensor:
    """1 for the active tokens, but 0 for a few that are drawn among those of large covariance.

    They are drawn from the tokens whose covariance is between `low` and `high` and which the clip
    of the loss leaves their gradient. With them for `policy_weights`, the loss is that of Clip-Cov.

    Args:
        logprobs: [T] or [B, C] log-probs under the policy that is being updated, nats.
        old_logprobs: the same, in the same shape, under the policy that sampled the tokens.
        advantages: [B] or [B, 1] per sequence, or in the shape of the tokens.
        cu_seqlens: [B + 1] offsets of packed sequences, any integers. None for padded tokens.
        fraction: how many are drawn, of the active tokens of this call, rounded down; at least one.
        low: a token of this covariance or less is not drawn.
        high: nor one of this covariance or more.
        mask: in the shape of the tokens, of any dtype: what is above 0 is trained on; the other
            tokens may hold anything. None: all.
        params: the loss, for the bounds of its clip.
        generator: of the draw, on the device of the tokens; None for torch's own.

    Returns:
        Zeros and ones in the shape of the tokens and fp32 (fp64 from fp64 `logprobs`), 0 also where
        `mask` is.

    Raises:
        ValueError: shapes, dtypes or devices do not match, the fraction is outside [0, 1], or the
            surrogate of `params` is not "clip"; on a CPU also when offsets do not fit or a number
            of an active token is not finite. Where values are not read, such a token is taken as
            masked.
    """
    op = "clip_cov_weights"
    if params.surrogate != "clip":
        raise ValueError(f"{op}: params.surrogate is {params.surrogate!r}, expected 'clip'")
    given = {"logprobs": logprobs, "old_logprobs": old_logprobs}
    layout, tensors, advantage, active = _inputs(op, given, advantages, cu_seqlens, mask)
    logp, old = (tensor.double() for tensor in tensors)
    ratio = (logp - old).exp()
    clipped = (advantage > 0) & (ratio > 1 + params.clip_high)
    clipped = clipped | ((advantage < 0) & (ratio < 1 - params.clip_low))
    covariance = _covariance(logp, advantage, active)
    candidates = active & ~clipped & (covariance > low) & (covariance < high)
    draw = torch.rand(candidates.shape, generator=generator, device=candidates.device)
    drawn = _largest(draw, candidates, _count(op, fraction, active))
    return layout.restore((active & ~drawn).to(widen(tensors[0]).dtype))


def kl_cov_reference(
    logprobs: Numbers,
    old_logprobs: Numbers,
    advantages: Numbers,
    cu_seqlens: Tensor | Sequence[int] | None = None,
    *,
    fraction: float = 2e-4,
    mask: Numbers | None = None,
) -> Tensor:
    """`ref_logprobs` of KL-Cov: the old ones of the tokens with the largest covariances.

    The other tokens have their own log-probs, from which the KL of the preset "kl_cov" is exactly 0
    without a gradient: give them to a loss of these very `logprobs`.

    Args:
        logprobs: [T] or [B, C] log-probs under the policy that is being updated, nats.
        old_logprobs: the same, in the same shape, under the policy that sampled the tokens.
        advantages: [B] or [B, 1] per sequence, or in the shape of the tokens.
        cu_seqlens: [B + 1] offsets of packed sequences, any integers. None for padded tokens.
        fraction: how many are held, of the active tokens of this call, rounded down; at least one.
        mask: in the shape of the tokens, of any dtype: what is above 0 is trained on; the other
            tokens may hold anything. None: all.

    Returns:
        Log-probs in the shape of the tokens and the dtype of `logprobs`, without a gradient.

    Raises:
        ValueError: as `clip_cov_weights`.
    """
    op = "kl_cov_reference"
    given = {"logprobs": logprobs, "old_logprobs": old_logprobs}
    layout, (logp, old), advantage, active = _inputs(op, given, advantages, cu_seqlens, mask)
    covariance = _covariance(logp.double(), advantage, active)
    held = _largest(covariance, active, _count(op, fraction, active))
    return layout.restore(torch.where(held, old.to(logp.dtype), logp))


def _inputs(
    op: str,
    given: dict[str, Numbers],
    advantages: Numbers,
    cu_seqlens: Tensor | Sequence[int] | None,
    mask: Numbers | None,
) -> tuple[TokenLayout, list[Tensor], Tensor, Tensor]:
    """The layout, the tensors as [T], advantages [T] in fp64, and the active tokens."""
    layout, tensors, active = token_inputs(op, given, cu_seqlens, mask)
    advantage, active = advantage_inputs(layout, advantages, tensors[0], active)
    return layout, tensors, advantage.double(), active


def _covariance(logp: Tensor, advantage: Tensor, active: Tensor) -> Tensor:
    count = active.sum().clamp(min=1)
    means = (torch.where(active, x, 0.0).sum() / count for x in (logp, advantage))
    of_logp, of_advantage = (x - mean for x, mean in zip((logp, advantage), means, strict=True))
    return of_logp * of_advantage


def _count(op: str, fraction: float, active: Tensor) -> Tensor:
    """That fraction of the active tokens, at least one; not read on the host."""
    if not 0 <= fraction <= 1:
        raise ValueError(f"{op}: fraction is {fraction}, expected in [0, 1]")
    return (active.sum().double() * fraction).floor().clamp(min=1)


def _largest(values: Tensor, among: Tensor, count: Tensor) -> Tensor:
    """Which tokens have the `count` largest values of those."""
    order = torch.where(among, values, -torch.inf).argsort(descending=True, stable=True)
    rank = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
    return among & (rank < count)
