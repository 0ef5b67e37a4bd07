"""The denoising schedule of a run, and how far rounding alone moves its log-ratios."""

from __future__ import annotations

import torch

from lvrpo.models.flow import FlowSchedule, noise_floor
from lvrpo.trainer.config import RolloutSection, TrainConfig
from lvrpo.trainer.update import Objective


def flow_schedule(rollout: RolloutSection) -> FlowSchedule:
    """The schedule that a configuration describes: the first steps stochastic, the rest ODE."""
    return FlowSchedule(
        num_steps=rollout.denoise_steps,
        shift=rollout.shift,
        dynamics=rollout.dynamics,  # type: ignore[arg-type]
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
