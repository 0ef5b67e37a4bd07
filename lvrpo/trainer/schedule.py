"""The schedules of a run: its learning rates, and the denoising."""

from __future__ import annotations

import dataclasses
import math

from lvrpo import random
from lvrpo.models.flow import FlowSchedule, Guidance
from lvrpo.params.flow import GuidanceParams
from lvrpo.trainer.config import EvalSection, RolloutSection, TrainConfig, WarmStartSection

#: Policy steps done at the last change of the schedule, and the learning rate before it.
Bridge = tuple[int, float] | None


def warm_start_rate(section: WarmStartSection, done: int) -> float:
    """The rate of supervised training after `done` steps: a climb of 5 %, then a cosine to 2 %."""
    share = (done + 1) / max(1, section.steps)
    warmup = min(1.0, share / 0.05)
    return section.lr * warmup * (0.02 + 0.98 * (1 + math.cos(math.pi * share)) / 2)


def learning_rate(config: TrainConfig, done: int, bridge: Bridge = None) -> float:
    """The rate of every update of the policy step after `done` finished ones.

    It climbs over `optimizer.warmup_steps` and falls linearly to `final_lr_fraction` of
    `optimizer.lr` at `run.steps`. Where the schedule of a run was changed, the new one holds at
    once if it is lower; if it is higher, it is reached from the rate before over `warmup_steps`.

    Args:
        config: in force.
        done: policy steps.
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


def flow_guidance(section: RolloutSection | EvalSection) -> Guidance | None:
    """How a section guides drawings; None at a scale of 1."""
    if section.guidance == 1:
        return None
    params = GuidanceParams(
        text_scale=section.guidance,
        image_scale=section.guidance_image,
        renorm=section.guidance_renorm,
        renorm_min=section.guidance_renorm_min,
    )
    return Guidance(params, until=section.guidance_until)


def flow_schedule(rollout: RolloutSection, first: int = 0) -> FlowSchedule:
    """The schedule that a configuration describes: a window of stochastic steps, the rest ODE.

    Args:
        rollout: section in force.
        first: step of the window, in [0, `last_window(rollout)`]; 0 is what is evaluated.
    """
    return FlowSchedule(
        num_steps=rollout.denoise_steps,
        shift=rollout.shift,
        dynamics=rollout.dynamics,
        noise_level=rollout.noise_level,
        window=(first, first + rollout.stochastic_steps - 1),
    )


def last_window(rollout: RolloutSection) -> int:
    """The first step of the last window whose steps all draw noise; 0 where windows do not move."""
    if rollout.window == "first":
        return 0
    everywhere = dataclasses.replace(flow_schedule(rollout), window=None)
    return max(0, len(everywhere.stochastic_steps) - rollout.stochastic_steps)


def every_window(rollout: RolloutSection) -> FlowSchedule:
    """The schedule whose stochastic steps are all that any policy step may train."""
    last = last_window(rollout) + rollout.stochastic_steps - 1
    return dataclasses.replace(flow_schedule(rollout), window=(0, last))


def window_start(config: TrainConfig, step: int) -> int:
    """The first stochastic step of the denoising of one policy step.

    A sliding window moves on by one every `rollout.window_interval` policy steps and stays at the
    end of the denoising when it is there; a random one is drawn for each of them.

    Args:
        config: in force.
        step: counted through both phases; with the run's seed it fixes the draw.
    """
    rollout = config.rollout
    last = last_window(rollout)
    if rollout.window == "random":
        return int(random.stream(config.run.seed, "window", step).integers(last + 1))
    return min(last, (step - config.warm_start.steps - 1) // rollout.window_interval)
