"""The schedules of a run: its learning rates, and the denoising."""

from __future__ import annotations

import math

from lvrpo.models.flow import FlowSchedule
from lvrpo.trainer.config import RolloutSection, TrainConfig, WarmStartSection

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
