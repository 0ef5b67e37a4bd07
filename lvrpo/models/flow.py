"""Flow matching: the sampling schedule, its steps as affine maps, and the training targets.

Time t runs from 1 (noise) to 0 (data): x_t = (1 - t) x_0 + t noise, and the velocity is dx/dt =
noise - x_0. Every dynamics here is affine in the velocity, x_next = c_x x + c_v v + std z, so
`lvrpo.flow_step` and `lvrpo.flow_policy_loss` take its coefficients and know nothing else of it.
"""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from lvrpo.ops.flow_step import flow_step
from lvrpo.params.flow import FlowLossParams, GuidanceParams, StepCoefficients

Dynamics = Literal["flow_sde", "dance_sde", "cps", "ode"]
DYNAMICS: tuple[str, ...] = get_args(Dynamics)


def shift_times(u: Tensor, shift: float) -> Tensor:
    """t = shift u / (1 + (shift - 1) u): a shift above 1 spends more of [0, 1] near the noise."""
    return shift * u / (1 + (shift - 1) * u)


def interpolate(x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """x_t = (1 - t) x0 + t noise, for x0 and noise [N, ...] and t [N]."""
    t = t.reshape(-1, *[1] * (x0.dim() - 1)).to(x0.dtype)
    return (1 - t) * x0 + t * noise


def velocity_target(x0: Tensor, noise: Tensor) -> Tensor:
    """noise - x0: what a velocity model regresses on at `interpolate(x0, noise, t)`."""
    return noise - x0


def drawn_noise(streams: Tensor, shape: Sequence[int], backend: str | None = None) -> Tensor:
    """The numbers of streams [N, 2] as `flow_step` draws them, fp32 [N, *shape]."""
    size = len(streams), *shape
    nothing = torch.zeros(size, dtype=torch.float32, device=streams.device)
    zero, one = nothing.new_zeros(1), nothing.new_ones(1)
    coeffs = StepCoefficients(c_x=zero, c_v=zero, std=one, t=one, dt=-one)
    return flow_step(nothing, nothing, coeffs, streams, backend=backend)[0]


@dataclass(frozen=True)
class Guidance:
    """Classifier-free guidance of a drawing, by the model's velocity without the words.

    Attributes:
        params: see `lvrpo.ops.guided_velocity`. A drawing that has pictures to be edited is guided
            by the velocity without these, too, unless `image_scale` is 1; any other has none.
        until: a time in [0, 1]. Steps from times above it are guided; BAGEL's `cfg_interval` is
            (0.4, 1).
    """

    params: GuidanceParams
    until: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.until <= 1:
            raise ValueError(f"Guidance: until is {self.until}, expected a time in [0, 1]")

    def guides(self, time: float) -> bool:
        """Whether a step from this time is guided."""
        return time > self.until


@dataclass(frozen=True)
class FlowSchedule:
    """N reverse steps from noise to data, some of them stochastic.

    Attributes:
        num_steps: N; the schedule has N + 1 times. (BAGEL's `num_timesteps` counts the times.)
        shift: of the time grid, see `shift_times`.
        dynamics: of the stochastic steps; std = sigma sqrt(-dt) unless given.
            "flow_sde": sigma = noise_level sqrt(t / (1 - t)), the Flow-GRPO sampler; at t = 1 the
            next time stands in for t in 1 - t. Converges to the right marginals.
            "dance_sde": sigma = noise_level. Converges too.
            "cps": std = t_next sin(noise_level pi / 2), noise_level in [0, 1]. Does not keep the
            marginals, but adds no noise to the last step.
            "ode": no step is stochastic.
        noise_level: see `dynamics`.
        window: (first, last) stochastic step, both included; the others are ODE steps. None: all.
    """

    num_steps: int = 10
    shift: float = 3.0
    dynamics: Dynamics = "flow_sde"
    noise_level: float = 0.7
    window: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        if self.num_steps < 1:
            raise ValueError(f"num_steps is {self.num_steps}, expected >= 1")
        if not 0 < self.shift < math.inf:
            raise ValueError(f"shift is {self.shift}, expected > 0")
        if self.dynamics not in DYNAMICS:
            raise ValueError(
                f"dynamics is {self.dynamics!r}, expected one of {', '.join(DYNAMICS)}"
            )
        highest = 1.0 if self.dynamics == "cps" else math.inf
        if not 0 <= self.noise_level <= highest or math.isinf(self.noise_level):
            raise ValueError(f"noise_level is {self.noise_level}, expected [0, {highest:g}]")
        if self.window is not None:
            first, last = self.window
            if not 0 <= first <= last < self.num_steps:
                raise ValueError(
                    f"window is {self.window}, expected 0 <= first <= last < {self.num_steps}"
                )

    @functools.cached_property
    def times(self) -> Tensor:
        """t_0 = 1 > ... > t_N = 0, fp64 [N + 1]."""
        steps = torch.arange(self.num_steps + 1, dtype=torch.float64)
        return shift_times(1 - steps / self.num_steps, self.shift)

    @functools.cached_property
    def stochastic_steps(self) -> tuple[int, ...]:
        """Indices of the steps that draw noise: those with a log-probability, which RL trains."""
        return tuple((self._table.std > 0).nonzero().flatten().tolist())

    def coefficients(
        self,
        steps: int | Sequence[int] | Tensor,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> StepCoefficients:
        """Coefficients of the named steps, each [n]; an int gives [1], which the ops broadcast.

        Args:
            steps: indices in [0, N), repeats allowed.
            dtype: fp32 or fp64 (computed in fp64 in any case).
            device: None for that of `steps`.
        """
        if not isinstance(steps, Tensor):
            steps = torch.tensor([steps] if isinstance(steps, int) else list(steps))
        index = steps.reshape(-1).to("cpu", torch.int64)
        outside = (index < 0) | (index >= self.num_steps)
        if bool(outside.any()):
            raise ValueError(
                f"steps holds {int(index[outside][0])}, expected indices in [0, {self.num_steps})"
            )
        return self._table.select(index).to(steps.device if device is None else device, dtype)

    def fingerprint(self) -> str:
        """Twelve hex digits of all that defines the schedule.

        A trajectory carries them; an update with another schedule would compute ratios of steps
        that nobody took.
        """
        floats = float(self.shift).hex(), float(self.noise_level).hex()
        key = self.num_steps, self.dynamics, *floats, self.window and tuple(self.window)
        return hashlib.blake2b(f"flow-1:{key}".encode(), digest_size=6).hexdigest()

    @functools.cached_property
    def _table(self) -> StepCoefficients:
        """Every step's coefficients, fp64 [N]."""
        t, t_next = self.times[:-1], self.times[1:]
        dt = t_next - t
        ode = StepCoefficients(torch.ones_like(t), dt, torch.zeros_like(t), t, dt)
        if self.dynamics == "ode" or self.noise_level == 0:
            return ode
        if self.dynamics == "cps":
            std = t_next * math.sin(self.noise_level * math.pi / 2)
            kept = (t_next**2 - std**2).sqrt()
            c_x = (1 - t_next) + kept
            c_v = -t * (1 - t_next) + (1 - t) * kept
        else:
            if self.dynamics == "flow_sde":
                below_one = torch.where(t < 1, t, t_next)
                sigma = self.noise_level * (t / (1 - below_one)).sqrt()
            else:
                sigma = torch.full_like(t, self.noise_level)
            std = sigma * (-dt).sqrt()
            c_x = 1 + sigma**2 * dt / (2 * t)
            c_v = dt * (1 + sigma**2 * (1 - t) / (2 * t))
        step = torch.arange(self.num_steps)
        first, last = self.window or (0, self.num_steps - 1)
        inside = (step >= first) & (step <= last)
        return StepCoefficients(
            torch.where(inside, c_x, ode.c_x),
            torch.where(inside, c_v, ode.c_v),
            torch.where(inside, std, ode.std),
            t,
            dt,
        )


def noise_floor(
    schedule: FlowSchedule,
    num_elements: int,
    relative_velocity_error: float = 2.0**-8,
    *,
    params: FlowLossParams | None = None,
) -> Tensor:
    """Standard deviation of log rho that rounding alone causes, fp64 [stochastic steps].

    A clip range below about three times this cuts noise, not policy change.

    Args:
        schedule: the sampling schedule.
        num_elements: D, the elements of one image's latent.
        relative_velocity_error: rms of the error of a recomputed velocity over its own rms, which
            is taken as 1. bf16 networks are within 0.2 % to 1 %; the default is one bf16 unit.
        params: whose log-ratio (variant and scale); None for the defaults.
    """
    params = FlowLossParams() if params is None else params
    steps = schedule.coefficients(schedule.stochastic_steps, dtype=torch.float64)
    floor = steps.c_v.abs() * relative_velocity_error / math.sqrt(num_elements)
    if params.variant != "guard":
        floor = floor / steps.std
    if params.log_ratio_scale != "mean":
        floor = floor * params.log_ratio_scale * num_elements
    return floor


def noise_floor_note(
    schedule: FlowSchedule, num_elements: int, params: FlowLossParams, precision: str = "fp32"
) -> str:
    """The largest `noise_floor` in fp32 and bf16, next to the clip range it competes with.

    Args:
        schedule: the sampling schedule.
        num_elements: of one image's latent.
        params: of the loss.
        precision: that the model computes in; a clip range below its floor is warned of.
    """
    clip = min(params.clip_low, params.clip_high)
    floors = {}
    for dtype, kind in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        floor = noise_floor(schedule, num_elements, torch.finfo(kind).eps, params=params)
        floors[dtype] = float(floor.max())
    line = ", ".join(f"{dtype} {floor:.1e}" for dtype, floor in floors.items())
    note = f"noise floor of the image log-ratio: {line}; clip range {clip:g}"
    if clip < 3 * floors[precision]:
        note += f" - WARNING: below 3x the {precision} floor, the clip cuts noise"
    return note
