"""Log-probs and entropy of every row: R rows of logits over a vocabulary V."""

from __future__ import annotations

import pytest
import torch
from harness.providers import Case

SHAPES = {
    "small": {"64 rows, odd vocabulary": (64, 3203)},
    "full": {
        "a byte vocabulary": (8192, 259),
        "512 rows, 32k": (512, 32_003),
        "256 rows, Qwen": (256, 151_936),
        "one row, Qwen": (1, 151_936),
    },
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def bench_gather_logprobs(measure, direction, shape, dtype):
    rows, vocab = shape
    logits = (torch.randn(rows, vocab) * 3).to(dtype)
    inputs = {
        "logits": logits,
        "token_ids": torch.randint(0, vocab, (rows,)),
        "return_entropy": True,
    }
    # A log-prob is a difference of numbers as large as the largest logit.
    largest = 1 + float(logits.abs().max())
    case = Case(
        "gather_logprobs",
        inputs,
        ("logits",),
        # The backward reads the logits again and writes their gradient.
        bytes_moved={"forward": logits.nbytes, "forward+backward": 3 * logits.nbytes},
        scales={"out0": largest, "out1": largest, "dlogits": largest / rows},
    )
    measure(case, direction)
