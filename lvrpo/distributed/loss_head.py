"""A linear head whose weight is there while an op runs on it, whoever shards it in between."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class LossHead(torch.nn.Module):
    """A linear head whose forward hands its weight and bias to an op; without one it is the head.

    FSDP2 (`fully_shard`) gathers the parameters of a module for as long as its forward runs, and
    in the backward gives each rank its part of the gradient. Outside a weight is the rank's part,
    on which no op can run.

        model.lm_head = LossHead(model.lm_head)  # still its logits where the model calls it
        fully_shard(model.lm_head)
        fully_shard(model)
        ...
        loss = functools.partial(lvrpo.linear_grpo_loss, token_ids=ids, ...)
        result = model.lm_head(hidden, loss)

    Everything but the hidden states is in the op: FSDP casts the tensors that a forward is given to
    the dtype of its mixed precision, which would round log-probs and advantages.

    Attributes:
        weight: [V, H], the head's own parameter.
        bias: [V], or None.
    """

    def __init__(self, head: torch.nn.Linear) -> None:
        super().__init__()
        self.weight = head.weight
        self.register_parameter("bias", head.bias)

    def forward(self, hidden: Tensor, op: Callable[..., Any] = torch.nn.functional.linear) -> Any:
        """What the op makes of hidden states [..., H], weight and bias.

        Args:
            hidden: the states.
            op: called as `op(hidden, weight, bias=bias)`; by default it makes logits.
        """
        return op(hidden, self.weight, bias=self.bias)
