"""Guidance of N velocities of L tokens with C channels, renormalised as BAGEL does."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from harness.providers import Case
from torch import Tensor

from lvrpo.params.flow import GuidanceParams

SHAPES = {
    "small": {"default run": (192, 16, 4)},
    "full": {"default run": (192, 16, 4), "16 images of 1024 px": (16, 4096, 64)},
}


@pytest.mark.parametrize("renorm", ["global", "channel"])
def bench_guided_velocity(measure, direction, shape, renorm):
    velocity, without_text, without_image = torch.randn(3, *shape).unbind()

    def guide(functional: Any, **inputs: Tensor) -> Tensor:
        return functional(params=GuidanceParams(renorm=renorm), **inputs)

    case = Case(
        "guided_velocity",
        {"velocity": velocity, "without_text": without_text, "without_image": without_image},
        ("velocity",),
        call=guide,
        # Reads three velocities and writes one; the backward reads four and writes one.
        bytes_moved={"forward": 4 * velocity.nbytes, "forward+backward": 9 * velocity.nbytes},
        scales={"out0": 30.0, "dvelocity": 30.0 / velocity.numel()},
    )
    measure(case, direction)
