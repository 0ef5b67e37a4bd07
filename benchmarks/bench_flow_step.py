"""One stochastic step of the sampler over N latents of D elements."""

from __future__ import annotations

from typing import Any

import torch
from harness.providers import Case
from torch import Tensor

from lvrpo.models.flow import FlowSchedule

SCHEDULE = FlowSchedule()
COEFFS = SCHEDULE.coefficients(SCHEDULE.stochastic_steps[0])
SHAPES = {
    "small": {"default run": (192, 64)},
    "full": {"default run": (192, 64), "64 images of 1024 px": (64, 4096 * 16)},
}


def step(functional: Any, velocity: Tensor, x_t: Tensor, noise: Tensor) -> Any:
    return functional(velocity, x_t, COEFFS, noise)


def bench_flow_step(measure, direction, shape):
    velocity, x_t, noise = torch.randn(3, *shape).unbind()
    case = Case(
        "flow_step",
        {"velocity": velocity, "x_t": x_t, "noise": noise},
        ("velocity",),
        call=step,
        # Reads three latents and writes one; the backward reads two and writes one.
        bytes_moved={"forward": 4 * x_t.nbytes, "forward+backward": 7 * x_t.nbytes},
        scales={"out0": 10.0, "out1": 10.0, "dvelocity": 10.0 / x_t.numel()},
    )
    measure(case, direction)
