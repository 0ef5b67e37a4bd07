"""The clipped policy objective of flow-matching steps, with a KL term to a reference velocity."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lvrpo.reference._log_ratio import LOG_RATIO_LIMIT, saturate
from lvrpo.reference._precision import widen
from lvrpo.reference.flow_step import per_sample

if TYPE_CHECKING:
    from lvrpo.ops.flow_policy_loss import FlowLossParams
    from lvrpo.ops.flow_step import StepCoefficients


def flow_policy_loss(
    velocity: Tensor,  # [N, ...]
    velocity_old: Tensor,  # [N, ...]
    noise: Tensor,  # [N, ...]
    coeffs: StepCoefficients,  # [N] or [1]
    advantages: Tensor,  # [N]
    *,
    velocity_ref: Tensor | None = None,  # [N, ...]
    sample_weights: Tensor | None = None,  # [N]
    denominator: Tensor | None = None,  # []
    params: FlowLossParams,
) -> tuple[Tensor, dict[str, Tensor]]:
    """See `lvrpo.flow_policy_loss`; metrics by their field names."""
    v = widen(velocity)
    weights = v.new_ones(len(v)) if sample_weights is None else sample_weights.detach().to(v)
    # The op refuses a deterministic step where it may look at values; elsewhere it has no weight.
    active = (weights > 0) & (coeffs.std > 0)
    weights = torch.where(active, weights, 0.0)
    total = weights.sum() if denominator is None else denominator.detach().to(v)

    def latent(x: Tensor) -> Tensor:  # a sample without weight may hold anything, NaN included
        return torch.where(active.reshape(-1, *[1] * (v.dim() - 1)), x.to(v.dtype), 0.0)

    def weighted_mean(x: Tensor) -> Tensor:
        summed = torch.where(active, weights * x, 0.0).sum()
        return torch.where(total > 0, summed / total, 0.0)

    std = torch.where(active, coeffs.std.to(v.dtype), 1.0)
    abs_dt = torch.where(active, coeffs.dt.to(v.dtype).abs(), 1.0)
    s, c_v = per_sample(std, v), per_sample(coeffs.c_v, v)
    a = torch.where(active, advantages.detach().to(v.dtype), 0.0)
    if params.adv_clip is not None:
        a = a.clamp(-params.adv_clip, params.adv_clip)
    v, z = latent(v), latent(noise.detach())

    dmu = c_v * (v - latent(velocity_old.detach()))
    kl_old = element_mean(dmu**2 / (2 * s**2))
    if params.variant == "guard":
        log_ratio = element_mean(z * dmu)
    else:
        log_ratio = element_mean(z * dmu / s - dmu**2 / (2 * s**2))
    if params.log_ratio_scale != "mean":
        log_ratio = log_ratio * (params.log_ratio_scale * v[0].numel() if len(v) else 1.0)
    ratio = saturate(log_ratio, LOG_RATIO_LIMIT).exp()

    if params.variant == "dppo":
        diverged = kl_old >= params.tau
        low, high = diverged & (a < 0) & (ratio < 1), diverged & (a > 0) & (ratio > 1)
        policy = torch.where(low | high, 0.0, -a * ratio)
    else:
        low = (a < 0) & (ratio < 1 - params.clip_low)
        high = (a > 0) & (ratio > 1 + params.clip_high)
        clipped = ratio.clamp(1 - params.clip_low, 1 + params.clip_high)
        policy = torch.maximum(-a * ratio, -a * clipped)
        if params.variant == "guard":
            policy = policy / abs_dt

    if velocity_ref is None:
        kl = dict.fromkeys(("velocity_mse", "gaussian", "no_dt", "dmu2"), torch.zeros_like(policy))
    else:
        kl = distances(v - latent(velocity_ref.detach()), c_v, s, abs_dt)
    loss = weighted_mean(policy + params.beta * kl[params.kl])

    lowest, highest = extremes(ratio, active)
    metrics = {
        "policy_loss": weighted_mean(policy),
        **{f"kl_{name}": weighted_mean(value) for name, value in kl.items()},
        "kl_old": weighted_mean(kl_old),
        "ratio_mean": weighted_mean(ratio),
        "ratio_min": lowest,
        "ratio_max": highest,
        "abs_log_ratio": weighted_mean(log_ratio.abs()),
        "clip_fraction_low": weighted_mean(low.to(v.dtype)),
        "clip_fraction_high": weighted_mean(high.to(v.dtype)),
        "active_samples": active.sum(),
    }
    return loss, {name: value.detach().float() for name, value in metrics.items()}


def element_mean(x: Tensor) -> Tensor:
    """[N, ...] to [N]."""
    return x.flatten(1).mean(dim=1)


def distances(dv: Tensor, c_v: Tensor, s: Tensor, abs_dt: Tensor) -> dict[str, Tensor]:
    """The KL forms by name, [N] each, of policies whose velocities differ by `dv`."""
    gaussian = element_mean((c_v * dv) ** 2 / (2 * s**2))
    return {
        "velocity_mse": element_mean(dv**2),
        "gaussian": gaussian,
        "no_dt": gaussian * abs_dt,
        "dmu2": element_mean((c_v * dv) ** 2),
    }


def extremes(ratio: Tensor, active: Tensor) -> tuple[Tensor, Tensor]:
    """Smallest and largest active ratio; 1 when none is."""
    infinity = ratio.new_full((1,), torch.inf)
    lowest = torch.cat([ratio.masked_fill(~active, torch.inf), infinity]).amin()
    highest = torch.cat([ratio.masked_fill(~active, -torch.inf), -infinity]).amax()
    nobody = ~active.any()
    return lowest.masked_fill(nobody, 1.0), highest.masked_fill(nobody, 1.0)
