"""The policy loss of tokens from the hidden states that predict them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from lvrpo.reference.linear_logprobs import project
from lvrpo.reference.logits_grpo_loss import logits_grpo_loss

if TYPE_CHECKING:
    from lvrpo.params.policy_loss import LossParams


def linear_grpo_loss(
    hidden: Tensor,  # [R, H]
    weight: Tensor,  # [V, H]
    token_ids: Tensor,  # [T]
    old_logprobs: Tensor | None,  # [T]
    advantages: Tensor,  # [B] or [T]
    cu_seqlens: Tensor,  # [B + 1]
    *,
    bias: Tensor | None = None,  # [V]
    params: LossParams,
    **others: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See `lvrpo.linear_grpo_loss`; loss, its statistics, log-probs and entropy of tokens."""
    return logits_grpo_loss(
        project(hidden, weight, bias),
        token_ids,
        old_logprobs,
        advantages,
        cu_seqlens,
        params=params,
        **others,
    )
