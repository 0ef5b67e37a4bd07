"""Inputs of flow_policy_loss that several of its test files share."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lvrpo.models.flow import FlowSchedule
from lvrpo.params.flow import FlowLossMetrics, FlowLossParams

OPTIONAL = ("velocity_ref", "mask", "policy_weights", "denominator")
# Wide enough that both sides clip and both sides pass.
PARAMS = FlowLossParams(clip_low=0.05, clip_high=0.3, adv_clip=1.5, beta=0.2, log_ratio_scale=0.5)


def params_of(variant: str) -> FlowLossParams:
    # Without its division by the std the log-ratio of "guard" is smaller.
    scale = 10.0 if variant == "guard" else PARAMS.log_ratio_scale
    # Some samples saturate.
    return dataclasses.replace(PARAMS, variant=variant, log_ratio_scale=scale, log_ratio_limit=0.7)


def make_inputs(
    shape: tuple[int, ...], dtype: torch.dtype, params: FlowLossParams = PARAMS
) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(len(shape))
    wide = torch.float64 if dtype == torch.float64 else torch.float32

    def randn(*size: int) -> Tensor:
        return torch.randn(size, generator=generator).to(wide)

    velocity = randn(*shape).to(dtype)
    steps = torch.arange(shape[0]) * 3 % 9
    # Policies so far apart that a log-ratio is of order 1 whatever the number of elements.
    apart = 2 / math.sqrt(velocity[0].numel()) if params.log_ratio_scale != "mean" else 2.0
    weights = torch.arange(shape[0]).add(1).remainder(4).to(wide) / 2
    return {
        "velocity": velocity,
        "velocity_old": velocity.to(wide) + apart * randn(*shape),
        "noise": randn(*shape),
        "coeffs": FlowSchedule(10, 3.0).coefficients(steps, dtype=wide),
        "advantages": randn(shape[0]),
        "velocity_ref": velocity.to(wide) + apart * randn(*shape),
        "mask": torch.arange(shape[0]) % 5 != 3,
        "policy_weights": weights,
        "denominator": torch.tensor(3.7, dtype=wide),
        "params": params,
    }


def as_tuple(function: Callable[..., Any], **fixed: Any) -> Callable[..., tuple[Tensor, ...]]:
    def run(**inputs: Any) -> tuple[Tensor, ...]:
        loss, metrics = function(**inputs, **fixed)
        found = FlowLossMetrics.of(metrics) if isinstance(metrics, dict) else metrics
        return loss, *found.as_dict().values()

    return run
