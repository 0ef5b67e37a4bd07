"""The whole head with an entropy bonus, by how many rows of logits there are at a time."""

from __future__ import annotations

from typing import Any

import torch
from harness.providers import Case
from peers import loss_heads
from torch import Tensor

from lvrpo.ops.grpo_loss import LossParams

PARAMS = LossParams(entropy_coef=0.01)
LENGTH = 32
# (rows, hidden width, vocabulary), rows of a chunk; None is the default budget
SHAPES = {
    "small": {"four chunks": ((64, 32, 1003), 16)},
    "full": {
        "default": ((512, 512, 32_768), None),
        "two chunks": ((512, 512, 32_768), 256),
        "one chunk": ((512, 512, 32_768), 512),
    },
}


def plain_loss(
    hidden: Tensor,
    weight: Tensor,
    token_ids: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    cu_seqlens: Tensor,
) -> Tensor:
    """As one writes it, for sequences of one length."""
    logprobs, entropy = loss_heads.plain_linear_logprobs(hidden, weight, token_ids, True)
    ratio = (logprobs - old_logprobs).exp().view(-1, LENGTH)
    advantage = advantages[:, None]
    clipped = ratio.clamp(1 - PARAMS.clip_low, 1 + PARAMS.clip_high)
    policy = -torch.minimum(ratio * advantage, clipped * advantage).mean()
    return policy - PARAMS.entropy_coef * entropy.mean()


def bench_linear_grpo_loss(measure, shape):
    (rows, width, vocab), chunk = shape
    head = {
        "hidden": torch.randn(rows, width),
        "weight": torch.randn(vocab, width) * 2 / width**0.5,
        "token_ids": torch.randint(0, vocab, (rows,)),
    }
    inputs = {
        **head,
        "old_logprobs": loss_heads.plain_linear_logprobs(**head) + 0.1 * torch.randn(rows),
        "advantages": torch.randn(rows // LENGTH),
        "cu_seqlens": torch.arange(rows // LENGTH + 1) * LENGTH,
    }
    budget = None if chunk is None else 4 * chunk * vocab

    def call(functional: Any, **given: Any) -> Tensor:
        if functional is plain_loss:
            return plain_loss(**given)
        return functional(**given, params=PARAMS, memory_budget=budget).loss

    # The loss is a mean of terms of order 1 that cancel; of a gradient, the terms of a sum.
    logit = 5 * float(head["weight"].square().sum(dim=1).mean().sqrt())
    case = Case(
        "linear_grpo_loss",
        inputs,
        ("hidden", "weight"),
        call=call,
        plain=plain_loss,
        flops={"forward+backward": 6 * rows * width * vocab},
        scales={
            "out0": logit,
            "dhidden": logit * float(head["weight"].abs().max()) / rows,
            "dweight": logit * float(head["hidden"].abs().max()) / rows,
        },
        shape=f"{rows}x{width}x{vocab}, {chunk or 'default'} rows at a time",
    )
    measure(case, "forward+backward")
