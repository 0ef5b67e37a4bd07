"""The schedules of a run: its learning rates, and the denoising with its rounding error."""

from __future__ import annotations

import math

import torch

from lvrpo.models.flow import FlowSchedule, noise_floor
from lvrpo.trainer.config import RolloutSection, TrainConfig, WarmStartSection
from lvrpo.trainer.objective import Objective

#: Policy updates done at the last change of the schedule, and the learning rate before it.
Bridge = tuple[int, float] | None


def warm_start_rate(section: WarmStartSection, done: int) -> float:
    """The rate of supervised training after `done` steps: a climb of 5 %, then a cosine to 2 %."""
    share = (done + 1) / max(1, section.steps)
    warmup = min(1.0, share / 0.05)
    return section.lr * warmup * (0.02 + 0.98 * (1 + math.cos(math.pi * share)) / 2)


def learning_rate(config: TrainConfig, done: int, bridge: Bridge = None) -> float:
    """The rate of the policy update after `done` finished ones.

    It climbs over `optimizer.warmup_steps` and falls linearly to `final_lr_fraction` of
    `optimizer.lr` at `run.steps`. Where the schedule of a run was changed, the new one holds at
    once if it is lower; if it is higher, it is reached from the rate before over `warmup_steps`.

    Args:
        config: in force.
        done: policy updates.
        bridge: from a schedule that was changed on the way.
    """
    section = config.optimizer
    progress = done / max(1, config.run.steps)
    decayed = 1 - (1 - section.final_lr_fraction) * progress
    lr = section.lr * min(1.0, (done + 1) / max(1, section.warmup_steps)) * decayed
    if bridge is not None:
        at, before = bridge
        share = min(1.0, max(1, done - at + 1) / max(1, section.warmup_steps))
        lr = min(lr, before + (lr - before) * share)
    return lr


def flow_schedule(rollout: RolloutSection) -> FlowSchedule:
    """The schedule that a configuration describes: the first steps stochastic, the rest ODE."""
    return FlowSchedule(
        num_steps=rollout.denoise_steps,
        shift=rollout.shift,
        dynamics=rollout.dynamics,
        noise_level=rollout.noise_level,
        window=(0, rollout.stochastic_steps - 1),
    )


def noise_floor_note(config: TrainConfig, elements: int) -> str:
    """The image log-ratio that rounding alone makes, next to the clip range it competes with.

    A picture's latents hold `elements` numbers.
    """
    schedule = flow_schedule(config.rollout)
    params = Objective.from_config(config).image
    clip = min(params.clip_low, params.clip_high)
    floors = {
        dtype: float(
            noise_floor(schedule, elements, float(torch.finfo(kind).eps), params=params).max()
        )
        for dtype, kind in (("fp32", torch.float32), ("bf16", torch.bfloat16))
    }
    line = ", ".join(f"{dtype} {floor:.1e}" for dtype, floor in floors.items())
    note = f"noise floor of the image log-ratio: {line}; clip range {clip:g}"
    if clip < 3 * floors["fp32"]:
        note += " - WARNING: below 3x the fp32 floor, the clip cuts noise"
    return note
