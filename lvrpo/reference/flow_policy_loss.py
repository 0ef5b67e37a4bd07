"""The clipped policy objective of flow-matching steps, with a KL term to a reference velocity."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lvrpo.dtypes import number, widen
from lvrpo.reference._log_ratio import saturate
from lvrpo.reference._philox import as_noise
from lvrpo.reference.flow_step import per_sample

if TYPE_CHECKING:
    from lvrpo.params.flow import FlowLossParams, StepCoefficients


def flow_policy_loss(
    velocity: Tensor,  # [N, ...]
    velocity_old: Tensor,  # [N, ...]
    noise: Tensor,  # [N, ...], or int64 [N, 2]
    coeffs: StepCoefficients,  # [N] or [1]
    advantages: Tensor,  # [N]
    *,
    velocity_ref: Tensor | None = None,  # [N, ...]
    mask: Tensor | None = None,  # [N] bool
    policy_weights: Tensor | None = None,  # [N]
    denominator: Tensor | None = None,  # []
    params: FlowLossParams,
) -> tuple[Tensor, dict[str, Tensor]]:
    """See `lvrpo.flow_policy_loss`; the sums and extremes of its metrics, by their names."""
    v = widen(velocity)
    # What the op refuses where it may look at values has no weight where it may not.
    active = ((coeffs.std > 0) & (coeffs.std < torch.inf)).expand(len(v))
    active = active if mask is None else active & mask
    total = (active.sum() if denominator is None else denominator.detach()).to(v)

    def kept(x: Tensor, otherwise: float = 0.0) -> Tensor:  # what does not count may hold NaN
        return torch.where(active.reshape(-1, *[1] * (x.dim() - 1)), x.to(v.dtype), otherwise)

    def mean(x: Tensor) -> Tensor:
        summed = torch.where(active, x, 0.0).sum()
        return torch.where(total > 0, summed / torch.where(total > 0, total, 1.0), 0.0)

    abs_dt, c_v = kept(coeffs.dt.abs(), 1.0), per_sample(kept(coeffs.c_v), v)
    # In units of a power of two next to the std: exact, and no square of a small std is 0.
    std = kept(coeffs.std, 1.0)
    mantissa, _ = torch.frexp(std)
    s, unit = per_sample(mantissa, v), per_sample(std / mantissa, v)
    far = torch.finfo(v.dtype).max ** 0.75

    def bounded(
        shift: Tensor,
    ) -> Tensor:  # z times it is finite; of its square the limit takes care
        return shift.clamp(-far, far)

    a = kept(advantages.detach())
    weights = torch.ones_like(a) if policy_weights is None else policy_weights.detach().to(a)
    pushes = active & (weights > 0) & (weights < torch.inf) & a.isfinite()
    if params.adv_clip is not None:
        most = number(params.adv_clip, a)
        a = a.clamp(-most, most)
    v, z = kept(v), kept(as_noise(noise, v))

    dv = v - kept(velocity_old.detach())
    dmu = bounded(c_v * dv / unit)
    kl_old = element_mean(dmu**2 / (2 * s**2))
    if params.variant == "guard":
        log_ratio = element_mean(z * bounded(c_v * dv))
        pushes = pushes & (abs_dt > 0)
    else:
        log_ratio = element_mean(z * dmu / s - dmu**2 / (2 * s**2))
    if params.log_ratio_scale != "mean":
        log_ratio = log_ratio * (params.log_ratio_scale * v[0].numel() if len(v) else 1.0)
    exponent = saturate(log_ratio, params.log_ratio_limit)
    if params.log_ratio_limit is None or params.log_ratio_limit > 88:  # past what fp32 can hold
        exponent = exponent.double()
    ratio = exponent.detach().exp()

    if params.variant == "dppo":
        diverged = kl_old >= params.tau
        low, high = diverged & (a < 0) & (ratio < 1), diverged & (a > 0) & (ratio > 1)
        at_low = at_high = number(0.0, v)
    else:
        at_low, at_high = (number(1 + x, v) for x in (-params.clip_low, params.clip_high))
        low, high = (a < 0) & (ratio < at_low), (a > 0) & (ratio > at_high)
    # Where the gradient is cut no exponential is taken: infinity times 0 would be its gradient.
    free = torch.where(pushes & ~low & ~high & (a != 0), exponent, 0.0).exp()
    policy = -a * torch.where(low, at_low, torch.where(high, at_high, free))
    if params.variant == "guard":
        policy = policy / torch.where(pushes, abs_dt, 1.0)
    if policy_weights is not None:
        policy = policy * weights
    policy = torch.where(pushes, policy, 0.0)

    if velocity_ref is None:
        kl = dict.fromkeys(("velocity_mse", "gaussian", "no_dt", "dmu2"), torch.zeros_like(policy))
    else:
        dv = v - kept(velocity_ref.detach())
        gaussian = element_mean(bounded(c_v * dv / unit) ** 2 / (2 * s**2))
        kl = {
            "velocity_mse": element_mean(dv**2),
            "gaussian": gaussian,
            "no_dt": gaussian * abs_dt,
            "dmu2": element_mean((c_v * dv) ** 2),
        }
    loss = mean(policy + params.beta * kl[params.kl] if params.beta > 0 else policy)

    sums = {
        "policy_loss": policy,
        **{f"kl_{name}": value for name, value in kl.items()},
        "kl_old": kl_old,
        "ratio_mean": ratio.clamp(max=torch.finfo(ratio.dtype).max),
        "abs_log_ratio": log_ratio.abs(),
        "clip_fraction_low": low,
        "clip_fraction_high": high,
        "active_samples": active,
    }
    lowest, highest = extremes(sums["ratio_mean"], active)
    values = {name: torch.where(active, x.detach().double(), 0.0).sum() for name, x in sums.items()}
    return loss.to(v.dtype), values | {"ratio_min": lowest, "ratio_max": highest}


def element_mean(x: Tensor) -> Tensor:
    """[N, ...] to [N]."""
    return x.flatten(1).mean(dim=1)


def extremes(ratio: Tensor, active: Tensor) -> tuple[Tensor, Tensor]:
    """Smallest and largest active ratio; infinity and its negative when none is."""
    infinity = ratio.new_full((1,), torch.inf)
    lowest = torch.cat([ratio.masked_fill(~active, torch.inf), infinity]).amin()
    highest = torch.cat([ratio.masked_fill(~active, -torch.inf), -infinity]).amax()
    return lowest, highest
