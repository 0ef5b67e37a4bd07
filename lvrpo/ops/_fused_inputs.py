"""The arguments of a policy loss whose log-probs its op forms itself, and how its result is told.

T tokens, B sequences.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from lvrpo.ops import _checks
from lvrpo.ops._policy_loss import FusedPolicyLoss, LossMetrics, LossParams
from lvrpo.ops.grpo_loss import check_inputs, refuse_tokens


@dataclasses.dataclass(frozen=True)
class LossInputs:
    """What `grpo_loss` takes besides log-probs and entropies, checked and in one dtype.

    Attributes:
        old_logprobs: [T] or None.
        ref_logprobs: [T] or None.
        token_weights: [T], 0 for an ignored token.
        advantages: [B] or [T].
        cu_seqlens: [B + 1].
        denominator: as it was given.
    """

    old_logprobs: Tensor | None
    ref_logprobs: Tensor | None
    token_weights: Tensor
    advantages: Tensor
    cu_seqlens: Tensor
    denominator: float | Tensor | None

    def tensors(self) -> tuple[Tensor | None, ...]:
        """All of them, to choose a backend by."""
        others = self.token_weights, self.advantages, self.cu_seqlens
        return self.old_logprobs, self.ref_logprobs, *others

    def arguments(self) -> dict[str, Any]:
        """Keyword arguments of the reference and of the fused pass."""
        found = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        if isinstance(self.denominator, Tensor):
            # Dividing by a tensor afterwards keeps the op free of a read from the device.
            found["denominator"] = 1.0
        return found

    def finish(
        self, op: str, loss: Tensor, metrics: Tensor, logprobs: Tensor, entropy: Tensor
    ) -> FusedPolicyLoss:
        """The result of `op`, after naming the token that made the loss infinite or NaN."""
        if _checks.check_values(loss) and not bool(loss.detach().isfinite()):
            names = "old_logprobs", "ref_logprobs", "token_weights"
            refuse_tokens(op, logprobs, {name: getattr(self, name) for name in names})
        fields = list(metrics.unbind())
        if isinstance(self.denominator, Tensor):
            divisor = self.denominator.detach().to(logprobs.dtype).reshape(())
            loss, fields[0] = loss / divisor, fields[0] / divisor
        return FusedPolicyLoss(loss, LossMetrics(*fields), logprobs, entropy)


def loss_inputs(
    op: str,
    dtype: torch.dtype,
    token_ids: Tensor,
    logprobs: dict[str, Tensor | None],
    token_weights: Tensor | None,
    advantages: Tensor,
    cu_seqlens: Tensor,
    *,
    denominator: float | Tensor | None,
    params: LossParams,
    ignore_index: int,
) -> LossInputs:
    """Check them as `grpo_loss` does and bring them to `dtype`.

    Args:
        op: who asks.
        dtype: of the log-probs and entropies to come.
        token_ids: [T].
        logprobs: "old_logprobs" and "ref_logprobs".
        token_weights: [T] or None.
        advantages: [B] or [T].
        cu_seqlens: [B + 1].
        denominator: number, tensor or None.
        params: the loss.
        ignore_index: id of a token of weight 0.

    Raises:
        ValueError: as `grpo_loss`.
    """
    later = token_ids.new_empty(token_ids.shape, dtype=dtype)  # log-probs, entropy: not there yet
    known = logprobs | {"token_weights": token_weights, "entropy": later}
    check_inputs(op, later, advantages, cu_seqlens, known, denominator, params)
    weights = torch.ones_like(later) if token_weights is None else token_weights
    weights = torch.where(token_ids == ignore_index, 0.0, weights)
    as_data = {name: x if x is None else x.detach().to(dtype) for name, x in logprobs.items()}
    return LossInputs(
        **as_data,
        token_weights=weights.detach().to(dtype),
        advantages=advantages.detach().to(dtype),
        cu_seqlens=cu_seqlens,
        denominator=denominator,
    )
