"""Calls of the launchers on tensors without memory: every kernel in every form of it."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from lvrpo.dtypes import numbers
from lvrpo.kernels import gather_logprobs as kernels


def arguments(rows, vocab, dtype, shared, ranged):
    tokens = 3 * rows if shared else rows
    index = {"dtype": torch.int64, "device": "meta"}
    return {
        "logits": torch.empty(rows, vocab, dtype=dtype, device="meta"),
        "token_ids": torch.empty(tokens, **index),
        "row_index": torch.empty(tokens, **index) if shared else None,
        "vocab_range": torch.empty(rows, 2, **index) if ranged else None,
    }


def call(
    rows, vocab, dtype, *, shared=False, ranged=False, temperature=1.0, softcap=0.0, full=True
):
    """Forward and backward."""
    inputs = arguments(rows, vocab, dtype, shared, ranged)
    given = numbers(temperature, softcap, -100)
    logprobs, lse, entropy, _ = kernels.gather_logprobs_fwd(*inputs.values(), given, full, full)
    kernels.gather_logprobs_bwd(
        torch.empty_like(inputs["logits"]),
        logprobs,
        entropy if full else None,
        *inputs.values(),
        lse,
        entropy if full else None,
        given,
    )


def every_form() -> None:
    for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
        call(64, 151_936, dtype)
    call(64, 32_003, torch.bfloat16, shared=True, ranged=True, softcap=30.0)
    call(64, 151_936, torch.bfloat16, full=False)
    call(64, 151_674, torch.bfloat16)


def one_training_run() -> Iterator[None]:
    """What changes from step to step: lengths, and hyper-parameters that are scheduled."""
    for rows, temperature in ((1, 1.0), (16, 0.7), (4097, 1.3), (70_000, 2.0)):
        yield call(rows, 151_936, torch.bfloat16, temperature=temperature)
