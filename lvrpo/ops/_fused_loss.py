"""A policy loss whose gradient is formed in the forward: the pass over the rows, and the hand-over.

R rows, T tokens, B sequences.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.types import Number

from lvrpo.ops import _checks
from lvrpo.ops._linear_plan import Plan, Tokens
from lvrpo.ops._linear_rows import HeadRows
from lvrpo.ops.grpo_loss import loss_op


def loss_of(
    rows: HeadRows,
    data: tuple[Tensor | None, ...],  # old_logprobs, advantages, cu_seqlens, ref_logprobs
    token_weights: Tensor,
    loss_scalars: Sequence[Number],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Loss, metrics and slopes, true of the tokens whose log-probs are known."""
    run = loss_op(rows.softmax.backend)
    return run(rows.logprobs, *data, rows.entropy_of_tokens(), token_weights, *loss_scalars)


def reported(rows: HeadRows, token_weights: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probs and entropy [T], 0 for a token of weight 0."""
    active = token_weights != 0
    entropy = torch.where(active, rows.entropy_of_tokens(), 0.0)
    return torch.where(active, rows.logprobs, 0.0), entropy


def run(
    rows: HeadRows,
    plan: Plan,
    data: tuple[Tensor | None, ...],
    token_weights: Tensor,
    loss_scalars: Sequence[Number],
    entropy_bonus: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Loss, metrics as a vector, log-probs and entropy [T]; the gradients stay in the head.

    Args:
        rows: nothing known yet.
        plan: what to do.
        data: old_logprobs, advantages, cu_seqlens, ref_logprobs.
        token_weights: [T].
        loss_scalars: of `lvrpo::grpo_loss_fwd`.
        entropy_bonus: whether the loss has a gradient by the entropy.
    """
    for chunk in plan.counted:
        rows.forward(chunk)
    for group in plan.groups:
        for chunk in group:
            logits = rows.forward(chunk)
        _, _, dlogprobs, dentropy = loss_of(rows, data, token_weights, loss_scalars)
        of_rows = rows.sum_over_rows(dentropy) if entropy_bonus else None
        # From the back: the last chunk's logits are still there.
        for chunk in reversed(group):
            rows.backward(chunk, dlogprobs, of_rows, logits if chunk == group[-1] else None)
    loss, metrics, _, _ = loss_of(rows, data, token_weights, loss_scalars)
    return loss, metrics, *reported(rows, token_weights)


def tokens_of(
    row_index: Tensor | None,
    advantages: Tensor,  # [B] or [T]
    cu_seqlens: Tensor,
    token_weights: Tensor,
    every_active: bool,
) -> Tokens:
    """Which tokens count, and which of them can pull at the weights."""
    sequences = len(cu_seqlens) - 1
    position = torch.arange(len(token_weights), device=cu_seqlens.device)
    sequence = torch.searchsorted(cu_seqlens, position, right=True) - 1
    active = token_weights != 0
    of_token = advantages[sequence] if len(advantages) == sequences else advantages
    pulls = active & ((of_token != 0) | every_active)
    return Tokens(row_index, sequence, sequences, active, pulls)


def keep(ctx: Any, inputs: tuple[Tensor | None, ...], gradients: list[Tensor]) -> None:
    """Note for the backward the gradients, and what they are computed from; called in a forward."""
    ctx.traced = torch.compiler.is_compiling()
    if ctx.traced:
        ctx.save_for_backward(*gradients)
    else:
        ctx.save_for_backward(*inputs)
        ctx.kept = gradients


def hand_over(ctx: Any, dloss: Tensor, again: Callable[[], list[Tensor]]) -> list[Tensor]:
    """The gradients that `keep` noted, scaled and in `ctx.dtype`; from `again` the second time."""
    if ctx.traced:  # a graph may not write to what it saved
        return [(gradient * dloss).to(ctx.dtype) for gradient in ctx.saved_tensors]
    # Given away: a buffer that is as large as the weight becomes its gradient.
    gradients, ctx.kept = ctx.kept, None
    gradients = again() if gradients is None else gradients
    by_one = _checks.check_values(dloss) and float(dloss) == 1.0
    scaled = []
    while gradients:  # emptied, so that no two copies outlive the loop
        gradient = gradients.pop(0)
        scaled.append((gradient if by_one else gradient.mul_(dloss)).to(ctx.dtype))
    return scaled
