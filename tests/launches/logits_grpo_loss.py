"""Calls of the launchers on tensors without memory: every kernel in every form of it."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from presets import LOSS_FORMS, loss_preset

from lvrpo.dtypes import numbers, numbers_by_name
from lvrpo.kernels import logits_grpo_loss as kernels
from lvrpo.ops.grpo_loss import LossParams
from lvrpo.ops.head.rows import OUTSIDE
from lvrpo.params.policy_loss import LOSS_NUMBERS


def call(
    tokens: int,
    params: LossParams,
    dtype: torch.dtype = torch.bfloat16,
    *,
    vocab: int = 151_936,
    bare: bool = False,
    ranged: bool = False,
    temperature: float = 1.0,
    softcap: float | None = None,
    widened: bool = False,
) -> None:
    sums = torch.float64 if dtype == torch.float64 else torch.float32
    sequences = 1 + tokens // 100

    def of(count: int, wanted: bool = True, kind: torch.dtype = sums) -> torch.Tensor | None:
        return torch.empty(count, dtype=kind, device="meta") if wanted else None

    logits = torch.empty(tokens, vocab, dtype=dtype, device="meta")
    choices = {kind: name for kind, name in params.choices().items() if kind != "aggregation"}
    kernels.logits_grpo_loss_rows(
        torch.empty_like(logits, dtype=sums if widened else dtype),
        logits,
        of(tokens, kind=torch.int64),
        torch.empty(tokens, 2, dtype=torch.int64, device="meta") if ranged else None,
        of(tokens, not bare),
        of(tokens),
        of(sequences + 1, kind=torch.int64),
        of(tokens, not bare),
        of(tokens, kind=torch.bool),
        of(tokens, not bare),
        of(tokens),
        numbers(temperature, softcap or 0.0, OUTSIDE),
        numbers_by_name(LOSS_NUMBERS, params.numbers()),
        **choices,
    )


def every_form() -> None:
    for name in (name for name, form in LOSS_FORMS.items() if not form.sequence_level):
        params = loss_preset(name, beta=0.1, entropy_coef=0.01)
        call(64, params)
        if name in ("grpo", "dppo_kl"):
            call(64, params, torch.float64)
            call(64, params, torch.float32)
            call(64, params, torch.float16, widened=True)
    for kl in ("k1", "k2", "abs"):
        call(64, LossParams(kl=kl, kl_factor="ratio", kl_gradient="k2"))
    call(64, LossParams(), bare=True)
    call(64, LossParams(beta=0.1, entropy_coef=0.1), vocab=151_674)
    for dtype in (torch.bfloat16, torch.float64):
        call(64, LossParams(entropy_coef=0.1), dtype, ranged=True, softcap=30.0, vocab=32_003)
    call(64, LossParams(entropy_coef=0.1), ranged=True)
    for narrow, wide in (
        *((torch.bfloat16, torch.float32), (torch.float16, torch.float32)),
        (torch.float64, torch.float64),
    ):
        factor = torch.empty((), dtype=wide, device="meta")
        for dtype, wanted in ((narrow, narrow), (wide, narrow)):
            gradient = torch.empty(64, 151_674, dtype=dtype, device="meta")
            kernels.scale_gradient(gradient, factor, wanted)
            kernels.scale_gradient(gradient[:, :-7], factor, wanted)


def one_training_run() -> Iterator[None]:
    """What changes from step to step: lengths, and hyper-parameters that are scheduled."""
    for tokens, beta, clip, temperature in (
        (1, 0.0, 0.1, 1.0),
        (64, 0.1, 0.2, 0.7),
        (4097, 0.3, 0.3, 1.3),
        (70_000, 1.0, 1.0, 2.0),
    ):
        params = LossParams(beta=beta, clip_low=clip, entropy_coef=0.01 + beta)
        factor = torch.empty((), dtype=torch.float32, device="meta")
        gradient = torch.empty(tokens, 151_936, dtype=torch.bfloat16, device="meta")
        kernels.scale_gradient(gradient, factor, torch.bfloat16)
        yield call(tokens, params, temperature=temperature)
