"""Calls of the launchers on tensors without memory: every kernel in every form of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import torch
from presets import LOSS_FORMS, loss_preset

from lvrpo.dtypes import numbers_by_name
from lvrpo.kernels import grpo_loss as kernels
from lvrpo.ops.grpo_loss import LossParams
from lvrpo.params.policy_loss import LOSS_NUMBERS


def call(
    tokens: int,
    sequences: int,
    params: LossParams,
    dtype: torch.dtype = torch.float32,
    *,
    bare: bool = False,
    per_token: bool = False,
    denominator: float | None = None,
) -> None:
    def of(count: int, wanted: bool = True, kind: torch.dtype = dtype) -> torch.Tensor | None:
        return torch.empty(count, dtype=kind, device="meta") if wanted else None

    kernels.grpo_loss_fwd(
        of(tokens),
        of(tokens, not bare),
        of(tokens if per_token else sequences),
        of(sequences + 1, kind=torch.int64),
        of(tokens, not bare),
        of(tokens, not bare),
        of(tokens, not bare, torch.bool),
        of(tokens, not bare),
        numbers_by_name(LOSS_NUMBERS, params.numbers(denominator)),
        per_token,
        params.count_empty,
        **params.choices(),
    )


def every_form() -> None:
    for name in LOSS_FORMS:
        params = loss_preset(name, beta=0.1, entropy_coef=0.01)
        call(5000, 64, params)
        if name in ("grpo", "dppo_kl", "gpg"):
            call(5000, 64, params, torch.float64)
    for kl in ("k1", "k2", "abs"):
        call(5000, 64, LossParams(kl=kl, kl_factor="ratio", kl_gradient="k2", count_empty=False))
    for params in (LossParams(), loss_preset("gspo"), loss_preset("gmpo", kl="k1")):
        call(5000, 64, dataclasses.replace(params, beta=0.1, kl_factor="sequence_ratio"))
    for name in ("cispo", "sapo"):
        call(5000, 64, loss_preset(name, ratio="seq_mean"))
    call(5000, 64, LossParams(aggregation="token_sum"), bare=True, per_token=True)
    call(5000, 64, LossParams(kl_factor="sequence_ratio"), bare=True)


def one_training_run() -> Iterator[None]:
    """What changes from step to step: lengths, and hyper-parameters that are scheduled."""
    for tokens, sequences, beta, clip in (
        (1, 1, 0.0, 0.1),
        (5000, 16, 0.1, 0.2),
        (10**6, 512, 1, 1),
    ):
        params = LossParams(beta=beta, clip_low=clip, entropy_coef=0.01 * beta)
        yield call(tokens, sequences, params, denominator=float(tokens))
