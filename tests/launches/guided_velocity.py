"""Calls of the launchers on tensors without memory: every kernel in every form of it."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from lvrpo.dtypes import numbers_by_name
from lvrpo.kernels import guided_velocity as kernels
from lvrpo.params.flow import GUIDANCE_NUMBERS, RENORMS, GuidanceParams


def call(samples, tokens, channels, dtype, params, *, has_image=True, interval=True) -> None:
    """Forward and backward."""

    def latents(kind=dtype):
        return torch.empty(samples, tokens, channels, dtype=kind, device="meta")

    guided = torch.empty(samples, dtype=torch.bool, device="meta") if interval else None
    branches = latents(), latents(), latents() if has_image else None
    saved = *branches, guided, numbers_by_name(GUIDANCE_NUMBERS, params.numbers())
    out = kernels.guided_velocity_fwd(*saved, **params.choices())
    kernels.guided_velocity_bwd(torch.empty_like(out), *saved, has_image, **params.choices())


def every_form() -> None:
    for renorm in RENORMS:
        for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
            call(16, 4096, 64, dtype, GuidanceParams(renorm=renorm))
    for renorm in ("global", "channel"):
        for channels in (12, 1000):
            params = GuidanceParams(renorm=renorm)
            call(16, 4, channels, torch.float32, params, has_image=False, interval=False)


def one_training_run() -> Iterator[None]:
    """What changes from step to step: how many pictures, how large, and the scales."""
    for samples, tokens, scale in ((1, 64, 4.0), (17, 1024, 3.0), (300, 4096, 1.0)):
        for renorm in ("global", "channel"):
            params = GuidanceParams(text_scale=scale, image_scale=scale / 2, renorm=renorm)
            yield call(samples, tokens, 64, torch.bfloat16, params)
