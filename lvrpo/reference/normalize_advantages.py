"""Advantages relative to the group a sample was drawn in, from one or several rewards."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lvrpo.dtypes import number
from lvrpo.params.advantages import ADVANTAGE_STATS, sums_to_zero

if TYPE_CHECKING:
    from lvrpo.params.advantages import AdvantageParams

#: A group whose rewards differ by less than this share of their size is constant: what is left
#: after subtracting the mean is rounding, and dividing it by its own spread would make it signal.
ROUNDING = 2.0**-40


def normalize_advantages(
    rewards: Tensor,  # [B, K], NaN (or infinite) where a reward does not apply
    offsets: Tensor,  # [P + 1]
    weights: Tensor,  # [K] fp64
    lengths: Tensor | None = None,  # [B], tokens of a sample
    *,
    params: AdvantageParams,
) -> tuple[Tensor, ...]:
    """See `lvrpo.normalize_advantages`; values, per_reward, `ADVANTAGE_STATS`, all_zero."""
    groups = _Groups(offsets, len(rewards))
    applies = rewards.isfinite()
    scored = applies.any(dim=1, keepdim=True)
    r = rewards.detach().double().masked_fill(~applies, 0.0)
    counted = applies.double()
    count = groups.sum(counted)
    mean = groups.sum(r) / count.clamp(min=1)
    # A reward that does not apply deviates by nothing: it counts as the group's mean, not as 0.
    deviation = groups.without_rounding(counted * (r - mean), r)

    # What is divided by its own spread: every reward, or only their weighted sum.
    if params.combine == "decoupled":
        column, size, column_counted = deviation, r.abs(), counted
    else:
        size = (r.abs() @ weights.abs())[:, None]
        column = groups.without_rounding((deviation @ weights)[:, None], size)
        column_counted = scored.double()
    column_count = groups.sum(column_counted)

    def std(squares: Tensor, n: Tensor) -> Tensor:
        return (squares / (n - params.ddof).clamp(min=1)).sqrt()

    squares = groups.sum(column.square())
    if params.scale == "group":
        spread = std(squares, column_count)
    elif params.scale == "leave_one_out":
        present = torch.where(applies, r, mean) * (groups.max(deviation) > 0)
        combine = (
            torch.eye(len(weights)).to(r) if params.combine == "decoupled" else weights[:, None]
        )
        others = _squares_of_others(groups, column, column_counted, present, combine, size)
        spread = std(others, column_count - 1)
    elif params.scale == "batch":
        batch_mean = (r.sum(0) / counted.sum(0)).nan_to_num()
        filled = torch.where(applies, r, torch.where(count > 0, mean, batch_mean))
        raw = r if params.combine == "decoupled" else (filled @ weights)[:, None]
        raw_mean = (raw * column_counted).sum(0) / column_counted.sum(0)
        spread = std((column_counted * (raw - raw_mean)).square().sum(0), column_counted.sum(0))
    elif params.scale == "nonzero":
        raw = r if params.combine == "decoupled" else (r @ weights)[:, None]
        spread = (raw.abs() > ROUNDING * size).double().sum(0) / column_counted.sum(0)
    divisor = torch.ones_like(column)
    if params.scale != "none":
        divisor = _floored(spread, params)
    if params.scale == "leave_one_out":
        divisor = torch.where(spread > 0, divisor, 1.0)

    above = deviation
    if params.baseline == "leave_one_out":
        above = count / (count - 1).clamp(min=1) * deviation
    elif params.baseline == "length":
        assert lengths is not None
        tokens = lengths.double()[:, None] * counted
        above = counted * (deviation - groups.sum(tokens * deviation) / groups.sum(tokens).clamp(1))
    elif params.baseline == "second_best":
        above = deviation * groups.lead(column.masked_fill(~scored, -math.inf), size)
    elif params.baseline == "none":
        above = r
    varies = (groups.max(column) > 0) | (params.baseline == "none")
    per_reward = torch.where(varies, weights * above / divisor, 0.0)

    per_reward = _whiten(per_reward, scored, lengths, params)
    values = per_reward.sum(1)
    if params.clip is not None:
        bound = number(params.clip, values)
        clipped = values.clamp(-bound, bound)
        per_reward = per_reward * torch.where(values == 0, 1.0, clipped / values)[:, None]
        values = clipped

    energy = values.square().sum()
    share = (per_reward * values[:, None]).sum(0) / torch.where(energy > 0, energy, 1.0)
    constant = groups.each(((groups.max(deviation) == 0) & (count > 0)).double())
    constant_groups = constant.sum(0) / groups.each((count > 0).double()).sum(0)
    total = counted.sum(0)
    mean_reward = r.sum(0) / total
    std_reward = std((counted * (r - mean_reward)).square().sum(0), total)
    stats = {
        "share": share,
        "constant_groups": constant_groups,
        "mean": mean_reward,
        "std": std_reward,
        "applicable": total / len(rewards),
    }
    dtype = torch.float64 if rewards.dtype == torch.float64 else torch.float32
    results = values, per_reward, *(stats[name] for name in ADVANTAGE_STATS)
    return (*(x.to(dtype) for x in results), (values == 0).all())


def _squares_of_others(
    groups: _Groups,
    column: Tensor,  # [B, J], deviations from the group's mean
    counted: Tensor,  # [B, J], 1 for the samples that have one
    rewards: Tensor,  # [B, K], those that vary
    combine: Tensor,  # [K, J], from rewards to columns
    size: Tensor,  # [B, J]
) -> Tensor:
    """Sum of squares of the group's other samples about their own mean, [B, J].

    A sample that is not the farthest from the mean owns at most 3/4 of the squares; what it leaves
    of them has all digits. The farthest may own all but rounding: its others are centred without
    it.
    """
    count = groups.sum(counted)
    own = column.square() * count / (count - 1).clamp(min=1)
    farthest = groups.first(column.abs() == groups.max(column))
    rest = counted * ~farthest
    centre = groups.sum(rest * rewards) / groups.sum(rest).clamp(min=1)
    apart = groups.without_rounding((rest * (rewards - centre)) @ combine, rest * size)
    without_farthest = groups.sum(apart.square())
    left = torch.where(farthest, without_farthest, groups.sum(column.square()) - own)
    return torch.where(count > 2, left, 0.0)


def _whiten(
    per_reward: Tensor, scored: Tensor, lengths: Tensor | None, params: AdvantageParams
) -> Tensor:
    """Divided by the standard deviation of its row sums over scored samples, after their mean."""
    if params.whiten == "none":
        return per_reward
    values = per_reward.sum(1)
    tokens = scored[:, 0].double()
    if params.whiten == "token":
        assert lengths is not None
        tokens = tokens * lengths
    if not sums_to_zero(params.baseline, params.scale, str(params.whiten)):
        before = _largest(values)
        per_reward = scored * (per_reward - (tokens @ per_reward) / tokens.sum().clamp(min=1))
        values = per_reward.sum(1)
        varies = _largest(values) > ROUNDING * before
        values, per_reward = values * varies, per_reward * varies
    std = (tokens * values.square()).sum() / (tokens.sum() - params.ddof).clamp(min=1)
    return per_reward / _floored(std.sqrt(), params)


def _floored(spread: Tensor, params: AdvantageParams) -> Tensor:
    """What a spread makes of a divisor: never 0."""
    divisor = (spread + params.eps).clamp(min=number(params.std_floor, spread))
    return torch.where(divisor > 0, divisor, 1.0)


def _largest(x: Tensor) -> Tensor:
    return torch.cat([x.new_zeros(1), x.abs()]).amax()


class _Groups:
    """Statistics over the group of every sample: [B, J] -> [B, J]."""

    def __init__(self, offsets: Tensor, batch: int) -> None:
        self.offsets = offsets
        self.count = len(offsets) - 1
        samples = torch.arange(batch, device=offsets.device)
        self.index = torch.searchsorted(offsets, samples, right=True) - 1

    def each(self, x: Tensor) -> Tensor:
        """[B, J] -> [P, J], what all samples of a group agree on; 0 for an empty group."""
        first = self.offsets[:-1].clamp(max=max(len(x) - 1, 0))
        empty = self.offsets.diff() == 0
        padded = x if len(x) else x.new_zeros(1, x.shape[1])
        return padded[first].masked_fill(empty[:, None], 0.0)

    def sum(self, x: Tensor) -> Tensor:
        """The sum over the sample's group."""
        return x.new_zeros(self.count, x.shape[1]).index_add(0, self.index, x)[self.index]

    def first(self, x: Tensor) -> Tensor:
        """Whether the sample is the first of its group for which `x` holds."""
        place = -torch.arange(len(x), device=x.device, dtype=torch.float64)[:, None]
        place = torch.where(x, place, -math.inf)
        return x & (place == self.largest(place))

    def largest(self, x: Tensor) -> Tensor:
        """The maximum over the sample's group."""
        start = x.new_full((self.count, x.shape[1]), -math.inf)
        index = self.index[:, None].expand_as(x)
        return start.scatter_reduce(0, index, x, "amax")[self.index]

    def max(self, x: Tensor) -> Tensor:
        """The largest magnitude in the sample's group."""
        return self.largest(x.abs())

    def without_rounding(self, x: Tensor, size: Tensor) -> Tensor:
        """`x`, or 0 where all of the group's is rounding next to numbers of this size."""
        return x * (self.max(x) > ROUNDING * self.max(size))

    def lead(self, total: Tensor, size: Tensor) -> Tensor:
        """(best - second best) / best for the group's best sample, 0 for the others."""
        best = self.largest(total)
        is_best = total == best
        second = self.largest(total.masked_fill(is_best, -math.inf))
        lead = best - second.where(second.isfinite(), best)
        lead = lead * (self.sum(is_best.double()) == 1) * (lead > ROUNDING * self.max(size))
        return torch.where(is_best & (best > 0), lead / best.where(best > 0, 1.0), 0.0)
