"""Calls of the launchers on tensors without memory: every kernel in every form of it."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from lvrpo.dtypes import numbers_by_name
from lvrpo.kernels import flow_policy_loss as kernels
from lvrpo.params.flow import FLOW_NUMBERS, KL_FORMS, VARIANTS, FlowLossParams


def call(samples, elements, dtype, params, *, bare=False, shared=False, drawn=False) -> None:
    """Forward and backward, with noise that is stored or drawn."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32

    def of(*shape, kind=wide, wanted=True):
        return torch.empty(shape, dtype=kind, device="meta") if wanted else None

    reference = of(samples, elements, wanted=not bare)
    noise = of(samples, 2, kind=torch.int64) if drawn else of(samples, elements)
    latents = of(samples, elements, kind=dtype), of(samples, elements), noise
    steps = [of(1 if shared else samples) for _ in range(3)]
    loss, _, _, directions = kernels.flow_policy_loss_fwd(
        *(*latents, reference, *steps, of(samples)),
        of(samples, kind=torch.bool, wanted=not bare),
        of(samples, wanted=not bare),
        of(wanted=not bare),
        numbers_by_name(FLOW_NUMBERS, params.numbers()),
        **params.choices(),
    )
    reference = reference if params.beta > 0 else None
    kernels.flow_policy_loss_bwd(loss, *latents, reference, directions)


def every_form() -> None:
    for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
        call(64, 65_536, dtype, FlowLossParams(beta=0.1))
        call(64, 65_536, dtype, FlowLossParams(), bare=True)
        call(64, 65_536, dtype, FlowLossParams(beta=0.1), drawn=True)
    for variant in VARIANTS:
        call(64, 65_536, torch.float32, FlowLossParams(variant=variant))
    for kl in KL_FORMS:
        call(64, 65_536, torch.float32, FlowLossParams(kl=kl, beta=0.1))
    call(64, 35, torch.float32, FlowLossParams(beta=0.1))


def one_training_run() -> Iterator[None]:
    """What changes from step to step: how many steps, how large, and scheduled numbers."""
    for samples, elements, clip, shared in (
        (1, 1024, 1e-4, True),
        (17, 65_536, 1e-3, False),
        (300, 16_384, 1.0, True),
    ):
        params = FlowLossParams(clip_low=clip, clip_high=clip, beta=clip, tau=clip)
        for drawn in (False, True):
            yield call(samples, elements, torch.bfloat16, params, shared=shared, drawn=drawn)
