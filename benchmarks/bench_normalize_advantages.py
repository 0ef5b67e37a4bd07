"""Advantages of B samples with K rewards, in groups of 8."""

from __future__ import annotations

from typing import Any

import torch
from harness.providers import Case

GROUP = 8
SHAPES = {
    "small": {"one step of the default run": (384, 3)},
    "full": {
        "one step of the default run": (384, 3),
        "a large batch": (65_536, 3),
        "65,536 groups": (524_288, 3),
    },
}


def values_and_parts(functional: Any, rewards: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    advantages = functional(rewards, GROUP)
    return advantages.values, advantages.per_reward


def bench_normalize_advantages(measure, shape):
    samples, count = shape
    rewards = torch.rand(samples, count)
    moved = 2 * rewards.nbytes + 4 * samples
    case = Case(
        "normalize_advantages",
        {"rewards": rewards},
        call=values_and_parts,
        bytes_moved={"forward": moved},
        # An advantage is a difference of rewards of order 1 over a spread of order 0.3.
        scales={"out0": 10.0, "out1": 10.0},
    )
    measure(case, "forward")
