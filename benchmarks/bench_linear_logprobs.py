"""Log-probs and entropy from hidden states, by how many rows of logits there are at a time."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from harness.providers import Case
from peers import loss_heads

# (rows, hidden width, vocabulary), rows of a chunk; None is the default budget
SHAPES = {
    "small": {"four chunks": ((64, 32, 1003), 16)},
    "full": {
        "default": ((512, 512, 32_768), None),
        "two chunks": ((512, 512, 32_768), 256),
        "one chunk": ((512, 512, 32_768), 512),
    },
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def bench_linear_logprobs(measure, direction, shape, dtype):
    (rows, width, vocab), chunk = shape
    inputs = {
        "hidden": torch.randn(rows, width).to(dtype),
        "weight": (torch.randn(vocab, width) * 2 / width**0.5).to(dtype),
        "token_ids": torch.randint(0, vocab, (rows,)),
    }
    budget = None if chunk is None else 4 * chunk * vocab

    def call(functional: Any, **given: Any) -> Any:
        if functional is not loss_heads.plain_linear_logprobs:
            given["memory_budget"] = budget
        return functional(**given, return_entropy=True)

    product = 2 * rows * width * vocab
    # Of a log-prob, the largest logit; of a gradient, the terms of a sum after a mean.
    logit = 5 * float(inputs["weight"].float().square().sum(dim=1).mean().sqrt())
    case = Case(
        "linear_logprobs",
        inputs,
        ("hidden", "weight"),
        call=call,
        plain=loss_heads.plain_linear_logprobs,
        # One product forward, two more for the gradients.
        flops={"forward": product, "forward+backward": 3 * product},
        scales={
            "out0": logit,
            "out1": logit,
            "dhidden": logit * float(inputs["weight"].abs().max()) / rows,
            "dweight": logit * float(inputs["hidden"].abs().max()) / rows,
        },
        shape=f"{rows}x{width}x{vocab}, {chunk or 'default'} rows at a time",
    )
    measure(case, direction)
