"""Calls of the launchers on tensors without memory: every kernel in every form of it."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from lvrpo.kernels import flow_step as kernels


def call(samples, tokens, channels, dtype, *, noise="stored", shared=False) -> None:
    """Forward and backward, with noise that is "stored", "drawn" or "none"."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32

    def latents(kind=wide):
        return torch.empty(samples, tokens, channels, dtype=kind, device="meta")

    steps = [torch.empty(1 if shared else samples, dtype=wide, device="meta") for _ in range(3)]
    streams = torch.empty(samples, 2, dtype=torch.int64, device="meta")
    noise = {"stored": latents(), "drawn": streams, "none": None}[noise]
    x_next, logprob = kernels.flow_step_fwd(latents(dtype), latents(), noise, *steps)
    kernels.flow_step_bwd(x_next, logprob, noise, *steps)


def every_form() -> None:
    for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
        call(16, 4096, 64, dtype)
        call(16, 4096, 64, dtype, noise="drawn")
        call(16, 4096, 64, dtype, noise="none", shared=True)
    call(16, 5, 7, torch.float32)


def one_training_run() -> Iterator[None]:
    """What changes from step to step: how many pictures, how large, and what they share."""
    for noise in ("stored", "drawn"):
        for samples, tokens, shared in ((1, 64, True), (17, 1024, False), (300, 4096, True)):
            yield call(samples, tokens, 64, torch.bfloat16, noise=noise, shared=shared)
