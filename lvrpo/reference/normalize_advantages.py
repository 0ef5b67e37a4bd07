"""Advantages relative to the group a sample was drawn in, from one or several rewards."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from lvrpo.ops.normalize_advantages import AdvantageParams

#: A group whose rewards differ by less than this share of their size is constant: what is left
#: after subtracting the mean is rounding, and dividing it by its own spread would make it signal.
ROUNDING = 2.0**-40


def normalize_advantages(
    rewards: Tensor,  # [B, K], NaN where a reward does not apply
    offsets: Tensor,  # [P + 1]
    weights: Tensor,  # [K] fp64
    *,
    params: AdvantageParams,
) -> tuple[Tensor, ...]:
    """See `lvrpo.normalize_advantages`; values, per_reward, then the fields of its stats."""
    applies = ~rewards.isnan()
    r = rewards.detach().double().masked_fill(~applies, 0.0)
    batch, groups = len(r), len(offsets) - 1
    index = torch.arange(batch, device=r.device)
    group = torch.searchsorted(offsets, index, right=True) - 1

    def group_sum(x: Tensor) -> Tensor:  # [B, J] -> [P, J]
        return x.new_zeros(groups, x.shape[1]).index_add(0, group, x)

    def group_max(x: Tensor) -> Tensor:  # [B, J] -> [P, J], largest magnitude
        start = x.new_zeros(groups, x.shape[1])
        return start.scatter_reduce(0, group[:, None].expand_as(x), x.abs(), "amax")

    def without_rounding(x: Tensor, magnitude: Tensor) -> Tensor:
        varies = group_max(x) > ROUNDING * group_max(magnitude)
        return x * varies[group]

    def batch_std(x: Tensor, counted: Tensor) -> Tensor:
        n = counted.sum(0)
        mean = (x * counted).sum(0) / n
        squares = (counted * (x - mean)).square().sum(0)
        return (squares / (n - params.ddof).clamp(min=1)).sqrt()

    counted = applies.double()
    group_count = group_sum(counted)
    count = group_count[group]
    mean = group_sum(r)[group] / count.clamp(min=1)
    # A reward that does not apply deviates by nothing: it counts as the group's mean, not as 0.
    deviation = without_rounding(counted * (r - mean), r)

    # What is divided by its own spread: every reward, or only their weighted sum.
    if params.combine == "decoupled":
        column, raw, column_count, column_counted = deviation, r, count, counted
    else:
        column = without_rounding(
            (deviation @ weights)[:, None], (r.abs() @ weights.abs())[:, None]
        )
        raw = (r @ weights)[:, None]
        column_counted = torch.ones_like(raw)
        column_count = group_sum(column_counted)[group]
    if params.scale == "group":
        squares = group_sum(column.square())[group]
        std = (squares / (column_count - params.ddof).clamp(min=1)).sqrt()
    elif params.scale == "batch":
        std = batch_std(raw, column_counted)
    else:
        std = torch.ones_like(column)
    divisor = std if params.scale == "none" else (std + params.eps).clamp(min=params.std_floor)
    # An estimator that leaves a sample out of its own baseline: r - mean of the others.
    others = count / (count - 1).clamp(min=1) if params.baseline == "leave_one_out" else 1.0
    varies = group_max(column)[group] > 0
    per_reward = torch.where(varies, weights * others * deviation / divisor, 0.0)

    values = per_reward.sum(1)
    if params.whiten:
        # Every group sums to zero, so the batch mean is zero and only the spread is left to remove.
        std = (values.square().sum() / max(batch - params.ddof, 1)).sqrt()
        divisor = (std + params.eps).clamp(min=params.std_floor)
        per_reward = per_reward / torch.where(divisor > 0, divisor, 1.0)
        values = per_reward.sum(1)
    if params.clip is not None:
        clipped = values.clamp(-params.clip, params.clip)
        per_reward = per_reward * torch.where(values == 0, 1.0, clipped / values)[:, None]
        values = clipped

    energy = values.square().sum()
    share = (per_reward * values[:, None]).sum(0) / torch.where(energy > 0, energy, 1.0)
    constant = (group_count > 0) & (group_max(deviation) == 0)
    constant_groups = constant.double().sum(0) / (group_count > 0).double().sum(0)
    total = counted.sum(0)
    dtype = torch.float64 if rewards.dtype == torch.float64 else torch.float32
    mean_reward, std_reward = r.sum(0) / total, batch_std(r, counted)
    outputs = (values, per_reward, share, constant_groups, mean_reward, std_reward, total / batch)
    return (*(x.to(dtype) for x in outputs), (values == 0).all())
