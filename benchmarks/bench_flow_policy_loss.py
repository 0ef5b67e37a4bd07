"""The policy objective over N trained steps of D latent elements, with a reference velocity."""

from __future__ import annotations

from typing import Any

import torch
from harness.providers import Case
from torch import Tensor

from lvrpo.models.flow import FlowSchedule
from lvrpo.params.flow import FlowLossParams

PARAMS = FlowLossParams(beta=0.01)
SCHEDULE = FlowSchedule()
COEFFS = SCHEDULE.coefficients(SCHEDULE.stochastic_steps[0])
SHAPES = {
    "small": {"default run": (384, 64)},
    "full": {"default run": (384, 64), "64 images of 1024 px": (64, 4096 * 16)},
}


def loss_only(functional: Any, **inputs: Tensor) -> Tensor:
    return functional(coeffs=COEFFS, params=PARAMS, **inputs).loss


def bench_flow_policy_loss(measure, direction, shape):
    velocity, noise = torch.randn(2, *shape).unbind()
    inputs = {
        "velocity": velocity,
        "velocity_old": velocity + 0.01 * torch.randn(shape),
        "noise": noise,
        "advantages": torch.randn(shape[0]),
        "velocity_ref": velocity + 0.01 * torch.randn(shape),
    }
    case = Case(
        "flow_policy_loss",
        inputs,
        ("velocity",),
        call=loss_only,
        # Reads four latents; the backward reads them again and writes the gradient.
        bytes_moved={"forward": 4 * velocity.nbytes, "forward+backward": 9 * velocity.nbytes},
        # The loss is a mean of terms of order 1 that cancel.
        scales={"out0": 1.0, "dvelocity": 10.0 / velocity.numel()},
    )
    measure(case, direction)
