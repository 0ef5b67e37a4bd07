"""The policy loss of tokens from the logits that predict them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lvrpo.reference.gather_logprobs import gather_logprobs
from lvrpo.reference.grpo_loss import grpo_loss
from lvrpo.token_selection import EVERY_TOKEN, TokenSelection

if TYPE_CHECKING:
    from lvrpo.params.policy_loss import LossParams


def logits_grpo_loss(
    logits: Tensor,  # [R, V]
    token_ids: Tensor,  # [T]
    old_logprobs: Tensor | None,  # [T]
    advantages: Tensor,  # [B] or [T]
    cu_seqlens: Tensor,  # [B + 1]
    *,
    row_index: Tensor | None = None,  # [T] into R
    ref_logprobs: Tensor | None = None,  # [T]
    mask: Tensor | None = None,  # [T]
    policy_weights: Tensor | None = None,  # [T]
    level: str | None = None,
    denominator: float | Tensor | None = None,
    selection: TokenSelection = EVERY_TOKEN,
    params: LossParams,
    ignore_index: int = -100,
    **softmax: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See `lvrpo.logits_grpo_loss`; loss, its statistics, log-probs and entropy of tokens."""
    active = token_ids != ignore_index
    if mask is not None:
        active = active & (mask > 0)
    logprobs, row_entropy = gather_logprobs(
        logits,
        torch.where(active, token_ids, ignore_index),
        row_index,
        ignore_index=ignore_index,
        return_entropy=True,
        **softmax,
    )
    entropy = row_entropy if row_index is None else row_entropy[row_index]
    loss, statistics = grpo_loss(
        logprobs,
        old_logprobs,
        advantages,
        cu_seqlens,
        ref_logprobs=ref_logprobs,
        entropy=entropy,
        mask=active,
        policy_weights=policy_weights,
        level=level,
        denominator=denominator,
        selection=selection,
        params=params,
    )
    logprobs, entropy = (torch.where(active, x.detach(), 0.0) for x in (logprobs, entropy))
    return loss, statistics, logprobs, entropy
