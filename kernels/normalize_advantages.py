"""Group-relative advantages of K rewards: passes over the groups, all statistics in fp64.

Derivation: docs/ops/normalize_advantages.md. What a pass cannot know, a sum over the batch, the
pass before leaves behind as one partial result per program, and every program of the next one adds
these up in the same order. A launch of one program turns the last of them into `stats`.

Groups are ragged, and only the device knows the longest: a program takes BLOCK_G groups and walks
over their samples, as often as it needs a statistic of the walk before.
"""

import functools

import torch
import triton
import triton.language as tl

from lvrpo.kernels._advantages import (
    ESTIMATOR_CHOICES,
    ROUNDING,
    STATS,
    as_scalars,
    batch_divisor,
    group_means,
    group_statistics,
    groups_of,
    load_rewards,
    load_tokens,
    merge,
    merge_lanes,
    part_of,
    reduce_moments,
    reduce_row,
    reduce_whitening,
    sample_of,
    scored_of,
    store_statistics,
)
from lvrpo.kernels._launch import LaunchConfig, cdiv, launch
from lvrpo.kernels._primitives import as_scalar, positions
from lvrpo.params.advantages import ADVANTAGE_NUMBERS, ADVANTAGE_STATS, sums_to_zero

# The names that these kernels have arithmetic for, by the parameter of `AdvantageParams`.
CHOICES = ESTIMATOR_CHOICES | {
    "combine": ("decoupled", "sum"),
    "whiten": ("none", "sequence", "token"),
}
SHARE_ROW, CONSTANT_ROW, MEAN_ROW, STD_ROW, APPLICABLE_ROW = positions(
    ADVANTAGE_STATS, "share", "constant_groups", "mean", "std", "applicable"
)
TILE = 256  # numbers in a tile: 2 fp64 per thread, so that four programs share an SM
# Every program adds up what all programs of the pass before left behind: more of them would add
# longer than they work.
MAX_PROGRAMS = 512
# What comes in whatever slice of a batch, and is read sample by sample.
SLICED = ["rewards_ptr", "offsets_ptr", "weights_ptr", "lengths_ptr"]


@triton.jit(
    do_not_specialize=["batch", "groups", "programs"], do_not_specialize_on_alignment=SLICED
)
def _batch_kernel(
    partial_ptr,  # [programs, 3, BLOCK_K] count, mean, squares of the column
    rewards_ptr,  # [B, K]
    offsets_ptr,  # [P + 1]
    weights_ptr,  # [K]
    means_ptr,  # [programs, 3, BLOCK_K] the same of the rewards, or None
    batch,
    groups,
    rewards,
    programs,
    DECOUPLED: tl.constexpr,
    NONZERO: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Moments over the batch of every reward, or of their sum, or of whether it is not zero."""
    k = tl.arange(0, BLOCK_K)
    weight = tl.load(weights_ptr + k, mask=k < rewards, other=0.0)[None, :]
    if means_ptr is not None:
        _, batch_mean, _ = reduce_moments(means_ptr, programs, 3, BLOCK_K)
    lanes = tl.full([BLOCK_G, BLOCK_K], 1.0, tl.float64)
    n, mean, squares = lanes * 0.0, lanes * 0.0, lanes * 0.0
    program = tl.program_id(0)
    for block in range(program, tl.cdiv(groups, BLOCK_G), programs):
        walk = groups_of(offsets_ptr, block, groups, batch, BLOCK_G)
        if means_ptr is not None:
            count, missing = group_means(rewards_ptr, walk, rewards, BLOCK_K)
            missing = tl.where(count > 0, missing, batch_mean[None, :])
        for step in range(walk[2]):
            sample, inside = sample_of(walk, step)
            x, counted = load_rewards(rewards_ptr, sample, inside, rewards, BLOCK_K)
            magnitude = tl.abs(x)
            if not DECOUPLED:
                if means_ptr is not None:
                    x = tl.where(counted > 0, x, missing)
                magnitude = tl.sum(tl.abs(weight) * magnitude, axis=1)[:, None]
                # The sum stands in every lane, so that a consumer need not know what it reads.
                x = tl.sum(weight * x, axis=1)[:, None] * lanes
                counted = scored_of(counted)[:, None] * lanes
            if NONZERO:
                x = (tl.abs(x) > ROUNDING * magnitude).to(tl.float64)
            n, mean, squares = merge(n, mean, squares, counted, x, 0.0)
    n, mean, squares = merge_lanes(n, mean, squares)
    row = partial_ptr + program * (3 * BLOCK_K) + k
    tl.store(row, n)
    tl.store(row + BLOCK_K, mean)
    tl.store(row + 2 * BLOCK_K, squares)


@triton.jit(
    do_not_specialize=["batch", "groups", "programs"], do_not_specialize_on_alignment=SLICED
)
def _measure_kernel(
    partial_ptr,  # [programs, 4 + BLOCK_K] tokens, squares, lowest, highest, mean by reward
    rewards_ptr,  # [B, K]
    offsets_ptr,  # [P + 1]
    weights_ptr,  # [K]
    lengths_ptr,  # [B] or None
    spread_ptr,  # [programs, 3, BLOCK_K] of _batch_kernel, or None
    batch,
    groups,
    rewards,
    programs,
    ddof: tl.float64,
    eps: tl.float64,
    std_floor: tl.float64,
    DECOUPLED: tl.constexpr,
    BASELINE: tl.constexpr,
    SCALE: tl.constexpr,
    BY_TOKEN: tl.constexpr,
    CENTRED: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """The moments of the advantages that whitening removes."""
    scalars = as_scalars(ddof, eps, std_floor)
    k = tl.arange(0, BLOCK_K)
    weight = tl.load(weights_ptr + k, mask=k < rewards, other=0.0)[None, :]
    divisor = batch_divisor(spread_ptr, programs, scalars, SCALE, BLOCK_K)
    zeros = tl.zeros([BLOCK_G], tl.float64)
    tokens, squares, low, high = zeros, zeros, zeros + float("inf"), zeros - float("inf")
    mean = tl.zeros([BLOCK_G, BLOCK_K], tl.float64)
    program = tl.program_id(0)
    for block in range(program, tl.cdiv(groups, BLOCK_G), programs):
        walk = groups_of(offsets_ptr, block, groups, batch, BLOCK_G)
        _, known = group_statistics(
            rewards_ptr,
            lengths_ptr,
            walk,
            rewards,
            weight,
            divisor,
            scalars,
            DECOUPLED,
            BASELINE,
            SCALE,
            BLOCK_K,
        )
        for step in range(walk[2]):
            sample, inside = sample_of(walk, step)
            r, counted = load_rewards(rewards_ptr, sample, inside, rewards, BLOCK_K)
            part = part_of(step, r, counted, weight, known, scalars, DECOUPLED, BASELINE, SCALE)
            t = scored_of(counted)
            scored = t > 0
            if BY_TOKEN:
                t *= load_tokens(lengths_ptr, sample, inside)
            value = tl.sum(part, axis=1)
            low = tl.minimum(low, tl.where(scored, value, float("inf")))
            high = tl.maximum(high, tl.where(scored, value, float("-inf")))
            if CENTRED:
                squares += t * value * value
                tokens += t
            else:
                # `merge` for the value, whose mean is the sum of the rewards' means.
                share = t / tl.maximum(tokens + t, 1.0)
                apart = value - tl.sum(mean, axis=1)
                squares += apart * apart * tokens * share
                mean += (part - mean) * share[:, None]
                tokens += t
    total = tl.sum(tokens, axis=0)
    centre = tl.sum(tokens[:, None] * mean, axis=0) / tl.maximum(total, 1.0)
    apart = tl.sum(mean - centre[None, :], axis=1)
    row = partial_ptr + program * (4 + BLOCK_K)
    tl.store(row, total)
    tl.store(row + 1, tl.sum(squares + tokens * apart * apart, axis=0))
    tl.store(row + 2, tl.min(low, axis=0))
    tl.store(row + 3, tl.max(high, axis=0))
    tl.store(row + 4 + k, centre)


@triton.jit
def _zero_outside(
    values_ptr,  # [B]
    per_reward_ptr,  # [B, K]
    offsets_ptr,  # [P + 1]
    batch,
    groups,
    rewards,
    programs,
    BLOCK_G: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Zeros for samples that no group has, where nobody checked that there are none."""
    k = tl.arange(0, BLOCK_K)
    begin = tl.load(offsets_ptr)
    end = tl.load(offsets_ptr + groups)
    for block in range(tl.program_id(0), tl.cdiv(batch, BLOCK_G), programs):
        sample = as_scalar(block, tl.int64) * BLOCK_G + tl.arange(0, BLOCK_G)
        outside = (sample < batch) & ((sample < begin) | (sample >= end))
        to = sample[:, None] * rewards + k[None, :]
        zeros = tl.zeros([BLOCK_G, BLOCK_K], per_reward_ptr.dtype.element_ty)
        tl.store(per_reward_ptr + to, zeros, mask=outside[:, None] & (k < rewards)[None, :])
        zeros = tl.zeros([BLOCK_G], values_ptr.dtype.element_ty)
        tl.store(values_ptr + sample, zeros, mask=outside)


@triton.jit(
    do_not_specialize=["batch", "groups", "programs"], do_not_specialize_on_alignment=SLICED
)
def _write_kernel(
    values_ptr,  # [B]
    per_reward_ptr,  # [B, K]
    partial_ptr,  # [programs, STATS, BLOCK_K]
    rewards_ptr,  # [B, K]
    offsets_ptr,  # [P + 1]
    weights_ptr,  # [K]
    lengths_ptr,  # [B] or None
    spread_ptr,  # [programs, 3, BLOCK_K] of _batch_kernel, or None
    measured_ptr,  # [programs, 4 + BLOCK_K] of _measure_kernel, or None
    batch,
    groups,
    rewards,
    programs,
    ddof: tl.float64,
    eps: tl.float64,
    std_floor: tl.float64,
    clip: tl.float64,
    DECOUPLED: tl.constexpr,
    BASELINE: tl.constexpr,
    SCALE: tl.constexpr,
    CENTRED: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """The advantages, and what every program knows of the batch's statistics."""
    scalars = as_scalars(ddof, eps, std_floor)
    clip = as_scalar(clip, tl.float64)
    k = tl.arange(0, BLOCK_K)
    weight = tl.load(weights_ptr + k, mask=k < rewards, other=0.0)[None, :]
    divisor = batch_divisor(spread_ptr, programs, scalars, SCALE, BLOCK_K)
    if measured_ptr is not None:
        shift, unit = reduce_whitening(measured_ptr, programs, scalars, CENTRED, BLOCK_K)
    _zero_outside(
        *(values_ptr, per_reward_ptr, offsets_ptr, batch, groups, rewards, programs),
        BLOCK_G,
        BLOCK_K,
    )
    zeros = tl.zeros([BLOCK_G, BLOCK_K], tl.float64)
    n, mean, squares, share = zeros, zeros, zeros, zeros
    constant = tl.zeros([BLOCK_G, BLOCK_K], tl.int32)
    seen = tl.zeros([BLOCK_G, BLOCK_K], tl.int32)
    energy = tl.zeros([BLOCK_G], tl.float64)
    nonzero = tl.zeros([BLOCK_G], tl.int32)
    program = tl.program_id(0)
    for block in range(program, tl.cdiv(groups, BLOCK_G), programs):
        walk = groups_of(offsets_ptr, block, groups, batch, BLOCK_G)
        moments, known = group_statistics(
            rewards_ptr,
            lengths_ptr,
            walk,
            rewards,
            weight,
            divisor,
            scalars,
            DECOUPLED,
            BASELINE,
            SCALE,
            BLOCK_K,
        )
        count, group_mean, group_squares, varies = moments
        applied = (count > 0).to(tl.int32)
        seen += applied
        constant += tl.where(varies, 0, applied)
        n, mean, squares = merge(n, mean, squares, count, group_mean, group_squares)
        for step in range(walk[2]):
            sample, inside = sample_of(walk, step)
            r, counted = load_rewards(rewards_ptr, sample, inside, rewards, BLOCK_K)
            part = part_of(step, r, counted, weight, known, scalars, DECOUPLED, BASELINE, SCALE)
            mask = inside[:, None] & (k < rewards)[None, :]
            if measured_ptr is not None:
                part = (part - shift[None, :]) * unit
                part = tl.where(mask & (scored_of(counted) > 0)[:, None], part, 0.0)
            value = tl.sum(part, axis=1)
            clipped = tl.minimum(tl.maximum(value, -clip), clip)
            part = part * tl.where(clipped == value, 1.0, clipped / value)[:, None]
            out_dtype = values_ptr.dtype.element_ty
            to = sample[:, None] * rewards + k[None, :]
            tl.store(per_reward_ptr + to, part.to(out_dtype), mask=mask)
            tl.store(values_ptr + sample, clipped.to(out_dtype), mask=inside)
            energy += clipped * clipped
            nonzero += (clipped != 0.0).to(tl.int32)
            share += part * clipped[:, None]
    row = partial_ptr + program * (STATS * BLOCK_K) + k
    store_statistics(row, merge_lanes(n, mean, squares), constant, seen, share, energy, nonzero)


@triton.jit(do_not_specialize=["batch", "programs"])
def _stats_kernel(
    stats_ptr,  # [ADVANTAGE_STATS, K]
    all_zero_ptr,  # []
    partial_ptr,  # [programs, STATS, BLOCK_K]
    batch,
    rewards,
    programs,
    ddof: tl.float64,
    BLOCK_K: tl.constexpr,
):
    k = tl.arange(0, BLOCK_K)
    count, mean, squares = reduce_moments(partial_ptr, programs, STATS, BLOCK_K)
    constant = reduce_row(partial_ptr, programs, 3, BLOCK_K)
    seen = reduce_row(partial_ptr, programs, 4, BLOCK_K)
    share = reduce_row(partial_ptr, programs, 5, BLOCK_K)
    energy = reduce_row(partial_ptr, programs, 6, BLOCK_K)
    nonzero = reduce_row(partial_ptr, programs, 7, BLOCK_K)
    std = tl.sqrt(squares / tl.maximum(count - as_scalar(ddof, tl.float64), 1.0))
    missing = float("nan")
    dtype = stats_ptr.dtype.element_ty
    out, mask = stats_ptr + k, k < rewards
    of_energy = share / tl.where(energy > 0, energy, 1.0)
    tl.store(out + SHARE_ROW * rewards, of_energy.to(dtype), mask=mask)
    seldom = tl.where(seen > 0, constant / tl.maximum(seen, 1.0), missing)
    tl.store(out + CONSTANT_ROW * rewards, seldom.to(dtype), mask=mask)
    mean = tl.where(count > 0, mean, missing)
    tl.store(out + MEAN_ROW * rewards, mean.to(dtype), mask=mask)
    std = tl.where(count > 0, std, missing)
    tl.store(out + STD_ROW * rewards, std.to(dtype), mask=mask)
    applicable = tl.where(batch > 0, count / tl.maximum(batch, 1), missing)
    tl.store(out + APPLICABLE_ROW * rewards, applicable.to(dtype), mask=mask)
    tl.store(all_zero_ptr, tl.max(nonzero, axis=0) == 0)


def normalize_advantages(
    rewards,
    offsets,
    weights,
    lengths,
    numbers,
    combine,
    baseline,
    scale,
    whiten,
):
    """Launcher; contract in `lvrpo.ops.normalize_advantages`."""
    named = dict(zip(ADVANTAGE_NUMBERS, numbers.tolist(), strict=True))
    clip = named.pop("clip")
    decoupled = combine == "decoupled"
    batch, count = rewards.shape
    groups = offsets.shape[0] - 1
    config = _config(count)
    block_k = config.blocks["BLOCK_K"]
    programs = min(cdiv(groups, config.blocks["BLOCK_G"]), MAX_PROGRAMS)
    inputs = {
        "rewards_ptr": rewards.contiguous(),
        "offsets_ptr": offsets.contiguous(),
        "weights_ptr": weights.contiguous(),
        "batch": batch,
        "groups": groups,
        "rewards": count,
        "programs": programs,
    }

    def fresh(*shape, dtype=torch.float64):
        return rewards.new_empty(shape, dtype=dtype)

    estimator = inputs | {
        "lengths_ptr": None if lengths is None else lengths.contiguous(),
        "spread_ptr": _spread(inputs, config, decoupled, scale),
        **named,
        "DECOUPLED": decoupled,
        "BASELINE": baseline,
        "SCALE": scale,
        "CENTRED": sums_to_zero(baseline, scale, whiten),
    }
    measured = None
    if whiten != "none":
        measured = fresh(programs, 4 + block_k)
        launch(
            _measure_kernel,
            (programs,),
            config,
            partial_ptr=measured,
            BY_TOKEN=whiten == "token",
            **estimator,
        )
    dtype = torch.float64 if rewards.dtype == torch.float64 else torch.float32
    values, per_reward = fresh(batch, dtype=dtype), fresh(batch, count, dtype=dtype)
    partial = fresh(programs, STATS.value, block_k)
    launch(
        _write_kernel,
        (programs,),
        config,
        values_ptr=values,
        per_reward_ptr=per_reward,
        partial_ptr=partial,
        measured_ptr=measured,
        clip=clip,
        **estimator,
    )
    return values, per_reward, *_stats(partial, values, batch, count, named["ddof"])


@functools.cache
def _config(count):
    block_k = triton.next_power_of_2(count)
    blocks = {"BLOCK_G": max(1, TILE // block_k), "BLOCK_K": block_k}
    return LaunchConfig(blocks, num_warps=4, num_stages=1)


@functools.cache
def _stats_config(block_k):
    return LaunchConfig({"BLOCK_K": block_k}, num_warps=4, num_stages=1)


def _spread(inputs, config, decoupled, scale):
    """What _batch_kernel leaves behind, where a sum over the batch divides every group."""
    if scale not in ("batch", "nonzero"):
        return None
    rewards, programs = inputs["rewards_ptr"], inputs["programs"]

    def column(**choice):
        shape = (programs, 3, config.blocks["BLOCK_K"])
        partial = rewards.new_empty(shape, dtype=torch.float64)
        launch(_batch_kernel, (programs,), config, partial_ptr=partial, **inputs, **choice)
        return partial

    means = None
    if scale == "batch" and not decoupled and rewards.shape[1] > 1:
        # A sum counts a reward that nobody in the group has as the mean of the batch.
        means = column(means_ptr=None, DECOUPLED=True, NONZERO=False)
    return column(means_ptr=means, DECOUPLED=decoupled, NONZERO=scale == "nonzero")


def _stats(partial, values, batch, count, ddof):
    stats = values.new_empty(len(ADVANTAGE_STATS), count)
    all_zero = values.new_empty((), dtype=torch.bool)
    programs, _, block_k = partial.shape
    launch(
        _stats_kernel,
        (1,),
        _stats_config(block_k),
        stats_ptr=stats,
        all_zero_ptr=all_zero,
        partial_ptr=partial,
        batch=batch,
        rewards=count,
        programs=programs,
        ddof=ddof,
    )
    return stats, all_zero
