"""Calls of the launcher on tensors without memory: every kernel in every form of it."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from presets import ADVANTAGE_FORMS

from lvrpo.dtypes import numbers_by_name
from lvrpo.kernels import normalize_advantages as kernels
from lvrpo.params.advantages import ADVANTAGE_NUMBERS, AdvantageParams


def call(groups, samples, rewards, dtype, params) -> None:
    index = {"dtype": torch.int64, "device": "meta"}
    kernels.normalize_advantages(
        torch.empty(samples, rewards, dtype=dtype, device="meta"),
        torch.empty(groups + 1, **index),
        torch.empty(rewards, dtype=torch.float64, device="meta"),
        torch.empty(samples, **index) if params.needs_lengths else None,
        numbers_by_name(ADVANTAGE_NUMBERS, params.numbers()),
        **params.choices(),
    )


def every_form() -> None:
    for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
        call(64, 512, 3, dtype, AdvantageParams())
    for name in ADVANTAGE_FORMS:
        call(64, 512, 3, torch.float32, AdvantageParams.preset(name))
    for rewards in (1, 12):
        call(64, 512, rewards, torch.float32, AdvantageParams(scale="batch"))


def one_training_run() -> Iterator[None]:
    """What changes from step to step: how many groups and samples, and scheduled bounds."""
    for groups, samples, clip in ((1, 8, 1.0), (16, 100, 5.0), (65_536, 524_288, 2.0)):
        params = AdvantageParams(scale="batch", clip=clip, eps=clip * 1e-4)
        yield call(groups, samples, 3, torch.float32, params)
