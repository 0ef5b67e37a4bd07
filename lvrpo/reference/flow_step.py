"""One reverse step of a flow-matching sampler, and the log-density of what it drew."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lvrpo.dtypes import widen
from lvrpo.reference._philox import as_noise

if TYPE_CHECKING:
    from lvrpo.params.flow import StepCoefficients


def per_sample(values: Tensor, like: Tensor) -> Tensor:
    """[N] or [1] as [N or 1, 1, ...] in the dtype of `like` [N, ...]."""
    return values.detach().to(like.dtype).reshape(-1, *[1] * (like.dim() - 1))


def flow_step(
    velocity: Tensor,  # [N, ...]
    x_t: Tensor,  # [N, ...]
    coeffs: StepCoefficients,  # [N] or [1]
    noise: Tensor | None = None,  # [N, ...], or int64 [N, 2]
) -> tuple[Tensor, Tensor]:
    """See `lvrpo.flow_step`."""
    v = widen(velocity)
    c_x, c_v, std = (per_sample(c, v) for c in (coeffs.c_x, coeffs.c_v, coeffs.std))
    mean = c_x * x_t.to(v.dtype) + c_v * v
    if noise is None:
        return mean, v.new_zeros(len(v))

    stochastic = std > 0
    z = torch.where(stochastic, as_noise(noise, v), 0.0)
    safe_std = torch.where(stochastic, std, 1.0)
    # The sample is data to its own density: mean - x_next has a gradient, and no other value.
    towards = c_x * (x_t.to(v.dtype).detach() - x_t.to(v.dtype)) + c_v * (v.detach() - v)
    standardized = z + towards / safe_std
    log_density = -(standardized**2) / 2 - safe_std.log() - math.log(2 * math.pi) / 2
    logprob = torch.where(stochastic, log_density, 0.0).flatten(1).mean(dim=1)
    return mean + torch.where(stochastic, std * z, 0.0), logprob
