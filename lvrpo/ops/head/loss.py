"""A policy loss whose gradient is formed in the forward: the pass over the rows, and the hand-over.

R rows, T tokens, B sequences.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from lvrpo import checks
from lvrpo.ops.grpo_loss import loss_op
from lvrpo.ops.head.plan import Plan, Tokens
from lvrpo.ops.head.rows import HeadRows
from lvrpo.ops.head.targets import any_of


@dataclasses.dataclass(frozen=True)
class LossCall:
    """What `lvrpo::grpo_loss_fwd` takes besides log-probs and entropies; the mask is there."""

    old_logprobs: Tensor | None
    advantages: Tensor
    cu_seqlens: Tensor
    ref_logprobs: Tensor | None
    mask: Tensor
    policy_weights: Tensor | None
    numbers: Tensor
    advantage_per_token: bool
    count_empty: bool
    choices: Mapping[str, str]

    def __call__(self, rows: HeadRows) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Loss, statistics and slopes, true of the tokens whose log-probs are known."""
        return loss_op(rows.softmax.backend)(
            rows.logprobs,
            self.old_logprobs,
            self.advantages,
            self.cu_seqlens,
            self.ref_logprobs,
            rows.entropy_of_tokens(),
            self.mask,
            self.policy_weights,
            self.numbers,
            self.advantage_per_token,
            self.count_empty,
            **self.choices,
        )

    def reported(self, rows: HeadRows) -> tuple[Tensor, Tensor]:
        """Log-probs and entropy [T], 0 for a masked token."""
        entropy = torch.where(self.mask, rows.entropy_of_tokens(), 0.0)
        return torch.where(self.mask, rows.logprobs, 0.0), entropy

    def tokens(self, row_index: Tensor | None, every_active: bool, per_sequence: bool) -> Tokens:
        """Which tokens count, and which of them may have a gradient.

        Args:
            row_index: [T] or None.
            every_active: whether every active token has one.
            per_sequence: whether a token has one if another of its sequence does.
        """
        sequences = len(self.cu_seqlens) - 1
        position = torch.arange(len(self.mask), device=self.mask.device)
        sequence = torch.searchsorted(self.cu_seqlens, position, right=True) - 1
        pulls = (self.advantages if self.advantage_per_token else self.advantages[sequence]) != 0
        if self.policy_weights is not None:
            pulls = pulls & (self.policy_weights != 0)
        pulls = self.mask & (pulls | every_active)
        if per_sequence:
            pulls = self.mask & any_of(pulls, sequence, sequences)[sequence]
        return Tokens(row_index, sequence, sequences, self.mask, pulls)


def choices_by_name(
    ratio: str, surrogate: str, kl: str, kl_factor: str, kl_gradient: str, aggregation: str
) -> dict[str, str]:
    """The choices of the loss, which a composite op has as single arguments."""
    return {
        "ratio": ratio,
        "surrogate": surrogate,
        "kl": kl,
        "kl_factor": kl_factor,
        "kl_gradient": kl_gradient,
        "aggregation": aggregation,
    }


def run(
    rows: HeadRows, plan: Plan, loss_call: LossCall, entropy_bonus: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Loss, statistics, log-probs and entropy [T]; the gradients stay in the head.

    Args:
        rows: nothing known yet.
        plan: what to do.
        loss_call: the loss.
        entropy_bonus: whether the loss has a gradient by the entropy.
    """
    for chunk in plan.counted:
        rows.forward(chunk)
    for group in plan.groups:
        for chunk in group:
            logits = rows.forward(chunk)
        _, _, dlogprobs, dentropy = loss_call(rows)
        of_rows = rows.sum_over_rows(dentropy) if entropy_bonus else None
        # From the back: the last chunk's logits are still there.
        for chunk in reversed(group):
            rows.backward(chunk, dlogprobs, of_rows, logits if chunk == group[-1] else None)
    loss, statistics, _, _ = loss_call(rows)
    return loss, statistics, *loss_call.reported(rows)


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
    by_one = checks.check_values(dloss) and float(dloss) == 1.0
    scaled = []
    while gradients:  # emptied, so that no two copies outlive the loop
        gradient = gradients.pop(0)
        scaled.append((gradient if by_one else gradient.mul_(dloss)).to(ctx.dtype))
    return scaled
