"""The clipped loss over T packed tokens of equally long sequences, with a KL term."""

from __future__ import annotations

from typing import Any

import torch
from harness.providers import Case

from lvrpo.ops.grpo_loss import LossParams

PARAMS = LossParams(beta=0.04)
SHAPES = {
    "small": {"one step of the default run": (384, 12)},
    "full": {
        "one step of the default run": (384, 12),
        "64 answers of 512 tokens": (64, 512),
        "512 answers of 2048 tokens": (512, 2048),
    },
}


def loss_only(functional: Any, logprobs: torch.Tensor, **inputs: Any) -> torch.Tensor:
    return functional(logprobs, params=PARAMS, **inputs).loss


def bench_grpo_loss(measure, direction, shape):
    sequences, length = shape
    tokens = sequences * length
    logprobs = -torch.rand(tokens) * 3
    inputs = {
        "logprobs": logprobs,
        "old_logprobs": logprobs + 0.2 * torch.randn(tokens),
        "ref_logprobs": logprobs + 0.2 * torch.randn(tokens),
        "advantages": torch.randn(sequences),
        "cu_seqlens": torch.arange(sequences + 1) * length,
    }
    case = Case(
        "grpo_loss",
        inputs,
        ("logprobs",),
        call=loss_only,
        # Three log-probs are read; the backward writes one gradient from what the forward kept.
        bytes_moved={"forward": 12 * tokens, "forward+backward": 20 * tokens},
        # The loss is a mean of terms of order 1 that cancel, a gradient such a term over T.
        scales={"out0": 1.0, "dlogprobs": 10.0 / tokens},
    )
    measure(case, direction)
