"""Device functions of `normalize_advantages`: statistics of ragged groups, and sums over programs.

Tiles are [BLOCK_G, BLOCK_K] of groups and rewards: a thread holds a group, and all groups of a
program walk over their samples in step, so that a statistic of a group needs no other thread.
"""

import triton
import triton.language as tl

from lvrpo.kernels._primitives import as_scalar

# What is left of a group after subtracting its mean is rounding below this share of its largest
# reward.
ROUNDING = tl.constexpr(2.0**-40)
# Rows of BLOCK_K numbers that every program of the last pass leaves behind: count, mean and sum of
# squares of the rewards, constant groups, groups it applies to, covariance with the advantage, sum
# of squared advantages, number of advantages that are not zero.
STATS = tl.constexpr(8)
# The names that this file has arithmetic for, by the parameter of `AdvantageParams`.
ESTIMATOR_CHOICES = {
    "baseline": ("mean", "leave_one_out", "length", "second_best", "none"),
    "scale": ("group", "leave_one_out", "batch", "nonzero", "none"),
}


@triton.jit
def groups_of(offsets_ptr, block, groups, batch, BLOCK_G: tl.constexpr):
    """First sample and number of samples of the block's groups, and the length of the longest."""
    group = as_scalar(block, tl.int64) * BLOCK_G + tl.arange(0, BLOCK_G)
    inside = group < groups
    # On a GPU nobody may have checked the offsets; they must not lead out of the batch.
    begin = tl.minimum(tl.maximum(tl.load(offsets_ptr + group, mask=inside, other=0), 0), batch)
    end = tl.minimum(tl.load(offsets_ptr + group + 1, mask=inside, other=0), batch)
    size = tl.maximum(end - begin, 0)
    return begin, size, tl.max(size, axis=0)  # a walk


@triton.jit
def sample_of(walk, step):
    """[BLOCK_G], and whether it belongs to the group."""
    begin, size, _ = walk
    return begin + step, step < size


@triton.jit
def load_rewards(rewards_ptr, sample, inside, rewards, BLOCK_K: tl.constexpr):
    """Values, 0 where a reward does not apply (or nobody could refuse an infinity), else 1."""
    k = tl.arange(0, BLOCK_K)[None, :]
    mask = inside[:, None] & (k < rewards)
    where = sample[:, None] * rewards + k
    x = tl.load(rewards_ptr + where, mask=mask, other=float("nan")).to(tl.float64)
    applies = tl.abs(x) < float("inf")
    return tl.where(applies, x, 0.0), applies.to(tl.float64)


@triton.jit
def scored_of(counted):
    """[BLOCK_G], 1 where any reward applies to the sample."""
    return tl.max(counted, axis=1)


@triton.jit
def load_tokens(lengths_ptr, sample, inside):
    if lengths_ptr is None:
        return inside.to(tl.float64)
    else:
        return tl.load(lengths_ptr + sample, mask=inside, other=0).to(tl.float64)


@triton.jit
def group_means(rewards_ptr, walk, rewards, BLOCK_K: tl.constexpr):
    """Count and mean [BLOCK_G, BLOCK_K]."""
    count = tl.zeros([walk[0].shape[0], BLOCK_K], tl.float64)
    total = tl.zeros([walk[0].shape[0], BLOCK_K], tl.float64)
    for step in range(walk[2]):
        sample, inside = sample_of(walk, step)
        r, counted = load_rewards(rewards_ptr, sample, inside, rewards, BLOCK_K)
        count += counted
        total += r
    return count, total / tl.maximum(count, 1.0)


@triton.jit
def deviation_of(r, counted, mean, varies):
    return tl.where(varies, counted * (r - mean), 0.0)


@triton.jit
def merge(n, mean, squares, more, more_mean, more_squares):
    """Count, mean and squares about the mean of two sets together."""
    total = n + more
    share = more / tl.maximum(total, 1.0)
    step = more_mean - mean
    return total, mean + step * share, squares + more_squares + step * step * n * share


@triton.jit
def merge_lanes(n, mean, squares):
    """`merge` of the first dimension."""
    total = tl.sum(n, axis=0)
    centre = tl.sum(n * mean, axis=0) / tl.maximum(total, 1.0)
    step = mean - centre[None, :]
    return total, centre, tl.sum(squares + n * step * step, axis=0)


@triton.jit
def reduce_moments(partial_ptr, programs, STRIDE: tl.constexpr, BLOCK_K: tl.constexpr):
    """Count, mean, squares about the mean [BLOCK_K] from the partial ones of every program."""
    BLOCK_P: tl.constexpr = 1024 // BLOCK_K
    k = tl.arange(0, BLOCK_K)[None, :]
    count = tl.zeros([BLOCK_K], tl.float64)
    total = tl.zeros([BLOCK_K], tl.float64)
    squares = tl.zeros([BLOCK_K], tl.float64)
    for first in range(0, programs, BLOCK_P):
        program = first + tl.arange(0, BLOCK_P)[:, None]
        row = partial_ptr + program * (STRIDE * BLOCK_K) + k
        n = tl.load(row, mask=program < programs, other=0.0)
        count += tl.sum(n, axis=0)
        total += tl.sum(n * tl.load(row + BLOCK_K, mask=program < programs, other=0.0), axis=0)
    mean = total / tl.maximum(count, 1.0)
    for first in range(0, programs, BLOCK_P):
        program = first + tl.arange(0, BLOCK_P)[:, None]
        row = partial_ptr + program * (STRIDE * BLOCK_K) + k
        n = tl.load(row, mask=program < programs, other=0.0)
        step = tl.load(row + BLOCK_K, mask=program < programs, other=0.0) - mean[None, :]
        within = tl.load(row + 2 * BLOCK_K, mask=program < programs, other=0.0)
        squares += tl.sum(within + n * step * step, axis=0)
    return count, mean, squares


@triton.jit
def reduce_row(partial_ptr, programs, ROW: tl.constexpr, BLOCK_K: tl.constexpr):
    """[BLOCK_K], one row of every program's statistics added up."""
    BLOCK_P: tl.constexpr = 1024 // BLOCK_K
    k = tl.arange(0, BLOCK_K)[None, :]
    total = tl.zeros([BLOCK_K], tl.float64)
    for first in range(0, programs, BLOCK_P):
        program = first + tl.arange(0, BLOCK_P)[:, None]
        at = program * (STATS * BLOCK_K) + ROW * BLOCK_K + k
        total += tl.sum(tl.load(partial_ptr + at, mask=program < programs, other=0.0), axis=0)
    return total


@triton.jit
def as_scalars(ddof, eps, std_floor):
    """What `part_of` and others take: a kernel's arguments, in fp64."""
    return (
        as_scalar(ddof, tl.float64),
        as_scalar(eps, tl.float64),
        as_scalar(std_floor, tl.float64),
    )


@triton.jit
def floored(spread, eps, std_floor):
    divisor = tl.maximum(spread + eps, std_floor)
    return tl.where(divisor > 0, divisor, 1.0)


@triton.jit
def std_divisor(squares, n, scalars):
    """What a standard deviation makes of the scale: never 0."""
    ddof, eps, std_floor = scalars
    return floored(tl.sqrt(squares / tl.maximum(n - ddof, 1.0)), eps, std_floor)


@triton.jit
def reduce_whitening(partial_ptr, programs, scalars, CENTRED: tl.constexpr, BLOCK_K: tl.constexpr):
    """What whitening subtracts [BLOCK_K], and its factor: 0 where only rounding would be left."""
    BLOCK_P: tl.constexpr = 1024 // BLOCK_K
    k = tl.arange(0, BLOCK_K)[None, :]
    tokens = tl.zeros([], tl.float64)
    total = tl.zeros([BLOCK_K], tl.float64)
    low = tl.full([], float("inf"), tl.float64)
    high = tl.full([], float("-inf"), tl.float64)
    for first in range(0, programs, BLOCK_P):
        program = first + tl.arange(0, BLOCK_P)
        here = program < programs
        row = partial_ptr + program * (4 + BLOCK_K)
        n = tl.load(row, mask=here, other=0.0)
        mean = tl.load(row[:, None] + 4 + k, mask=here[:, None], other=0.0)
        tokens += tl.sum(n, axis=0)
        total += tl.sum(n[:, None] * mean, axis=0)
        low = tl.minimum(low, tl.min(tl.load(row + 2, mask=here, other=float("inf")), axis=0))
        high = tl.maximum(high, tl.max(tl.load(row + 3, mask=here, other=float("-inf")), axis=0))
    shift = total / tl.maximum(tokens, 1.0)
    centre = tl.sum(shift, axis=0)
    squares = tl.zeros([], tl.float64)
    for first in range(0, programs, BLOCK_P):
        program = first + tl.arange(0, BLOCK_P)
        here = program < programs
        row = partial_ptr + program * (4 + BLOCK_K)
        n = tl.load(row, mask=here, other=0.0)
        mean = tl.load(row[:, None] + 4 + k, mask=here[:, None], other=0.0)
        step = tl.sum(mean, axis=1) - centre
        squares += tl.sum(tl.load(row + 1, mask=here, other=0.0) + n * step * step, axis=0)
    divisor = std_divisor(squares, tokens, scalars)
    kept = tl.full([], 1.0, tl.float64)
    if not CENTRED:
        largest = tl.maximum(high - centre, centre - low)
        varies = largest > ROUNDING * tl.maximum(tl.abs(low), tl.abs(high))
        kept = varies.to(tl.float64)
    return shift, kept / divisor


@triton.jit
def sum_statistics(
    rewards_ptr,
    walk,
    rewards,
    weight,
    mean,
    varies,
    BLOCK_K: tl.constexpr,
):
    """Of the weighted sum of deviations: count, squares, whether it varies; best and runner-up.

    All [BLOCK_G]. The lead of the best is what it exceeds the runner-up by, 0 where that is
    rounding.
    """
    BLOCK_G: tl.constexpr = walk[0].shape[0]
    count = tl.zeros([BLOCK_G], tl.float64)
    squares = tl.zeros([BLOCK_G], tl.float64)
    largest = tl.zeros([BLOCK_G], tl.float64)
    magnitude = tl.zeros([BLOCK_G], tl.float64)
    best = tl.full([BLOCK_G], float("-inf"), tl.float64)
    second = tl.full([BLOCK_G], float("-inf"), tl.float64)
    for step in range(walk[2]):
        sample, inside = sample_of(walk, step)
        r, counted = load_rewards(rewards_ptr, sample, inside, rewards, BLOCK_K)
        total = tl.sum(weight * deviation_of(r, counted, mean, varies), axis=1)
        scored = scored_of(counted)
        count += scored
        squares += total * total
        largest = tl.maximum(largest, tl.abs(total))
        magnitude = tl.maximum(magnitude, tl.sum(tl.abs(weight * r), axis=1))
        ranked = tl.where(scored > 0, total, float("-inf"))
        second = tl.maximum(second, tl.minimum(best, ranked))
        best = tl.maximum(best, ranked)
    second = tl.where(second == float("-inf"), best, second)
    leads = best - second > ROUNDING * magnitude
    lead = tl.where(leads, (best - second) / tl.where(best > 0, best, 1.0), 0.0)
    return count, squares, largest > ROUNDING * magnitude, lead, 0.5 * (best + second)


@triton.jit
def own_of(deviation, weight, DECOUPLED: tl.constexpr):
    """The sample's number in the column that is divided by one spread, in every lane of it."""
    own = deviation
    if not DECOUPLED:
        own = tl.sum(weight * deviation, axis=1)[:, None] + deviation * 0.0
    return own


@triton.jit
def farthest_sample(
    rewards_ptr,
    walk,
    rewards,
    weight,
    mean,
    varies,
    DECOUPLED: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Step of the sample that is farthest from the group's mean, and the squares of its others.

    They are those about their own mean, 0 where the others agree.
    """
    zeros = tl.zeros([walk[0].shape[0], BLOCK_K], tl.float64)
    far = tl.full([walk[0].shape[0], BLOCK_K], -1, tl.int64)
    largest = zeros - 1.0
    for step in range(walk[2]):
        sample, inside = sample_of(walk, step)
        r, counted = load_rewards(rewards_ptr, sample, inside, rewards, BLOCK_K)
        own = tl.abs(own_of(deviation_of(r, counted, mean, varies), weight, DECOUPLED))
        farther = (own > largest) & inside[:, None]
        far = tl.where(farther, step, far)
        largest = tl.where(farther, own, largest)
    count, total = zeros, zeros
    for step in range(walk[2]):
        r, present, _ = present_without(
            rewards_ptr, walk, step, far, rewards, mean, DECOUPLED, BLOCK_K
        )
        count += present
        total += present * r
    centre = total / tl.maximum(count, 1.0)
    squares, largest, magnitude = zeros, zeros, zeros
    for step in range(walk[2]):
        r, present, size = present_without(
            rewards_ptr, walk, step, far, rewards, mean, DECOUPLED, BLOCK_K
        )
        apart = own_of(deviation_of(r, present, centre, varies), weight, DECOUPLED)
        squares += apart * apart
        largest = tl.maximum(largest, tl.abs(apart))
        size = present * own_of(size, tl.abs(weight), DECOUPLED)
        magnitude = tl.maximum(magnitude, size)
    return far, tl.where(largest > ROUNDING * magnitude, squares, 0.0)


@triton.jit
def present_without(
    rewards_ptr,
    walk,
    step,
    far,
    rewards,
    mean,
    DECOUPLED: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Rewards of a step, a missing one as its group's mean; 1 where it is not of `far`; sizes."""
    sample, inside = sample_of(walk, step)
    r, counted = load_rewards(rewards_ptr, sample, inside, rewards, BLOCK_K)
    filled = tl.where(counted > 0, r, mean)
    present = counted
    if not DECOUPLED:
        present = scored_of(counted)[:, None] + counted * 0.0
    return filled, tl.where(far == step, 0.0, present), tl.abs(r)


@triton.jit
def group_statistics(
    rewards_ptr,
    lengths_ptr,
    walk,
    rewards,
    weight,
    divisor,
    scalars,
    DECOUPLED: tl.constexpr,
    BASELINE: tl.constexpr,
    SCALE: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """What the samples of a group have in common: `moments` for statistics, `known` for `part_of`.

    moments, by reward [BLOCK_G, BLOCK_K]: count, mean, squares about it, whether it varies.
    """
    zeros = tl.zeros([walk[0].shape[0], BLOCK_K], tl.float64)
    count, mean = group_means(rewards_ptr, walk, rewards, BLOCK_K)
    squares, largest, magnitude = zeros, zeros, zeros
    length, offset = zeros, zeros
    for step in range(walk[2]):
        sample, inside = sample_of(walk, step)
        r, counted = load_rewards(rewards_ptr, sample, inside, rewards, BLOCK_K)
        deviation = counted * (r - mean)
        squares += deviation * deviation
        largest = tl.maximum(largest, tl.abs(deviation))
        magnitude = tl.maximum(magnitude, tl.abs(r))
        if BASELINE == "length":
            t = load_tokens(lengths_ptr, sample, inside)[:, None] * counted
            length += t
            offset += t * deviation
    varies = largest > ROUNDING * magnitude
    best = walk[1], walk[1]
    if DECOUPLED:
        column = squares, count
        column_varies = varies
    else:
        sum_count, sum_squares, sum_varies, lead, middle = sum_statistics(
            rewards_ptr, walk, rewards, weight, mean, varies, BLOCK_K
        )
        column = sum_squares[:, None], sum_count[:, None]
        column_varies = sum_varies[:, None]
        best = lead, middle
    factor = tl.broadcast_to(weight, [walk[0].shape[0], BLOCK_K])
    if BASELINE != "none":
        factor = tl.where(varies & column_varies, factor, 0.0)
    if BASELINE == "leave_one_out":
        factor *= count / tl.maximum(count - 1.0, 1.0)
    if SCALE == "group":
        factor /= std_divisor(column[0], column[1], scalars)
    elif SCALE != "leave_one_out":
        factor /= divisor[None, :]
    offset /= tl.maximum(length, 1.0)
    farthest = walk[1], walk[1]
    if SCALE == "leave_one_out":
        farthest = farthest_sample(
            rewards_ptr, walk, rewards, weight, mean, varies, DECOUPLED, BLOCK_K
        )
    return (count, mean, squares, varies), (mean, offset, factor, varies, column, best, farthest)


@triton.jit
def part_of(
    step,
    r,
    counted,
    weight,
    known,
    scalars,
    DECOUPLED: tl.constexpr,
    BASELINE: tl.constexpr,
    SCALE: tl.constexpr,
):
    """What every reward contributes to the advantage, before whitening: a tile."""
    mean, offset, factor, varies, column, best, farthest = known
    deviation = counted * (r - mean)
    above = deviation
    if BASELINE == "length":
        above = counted * (deviation - offset)
    elif BASELINE == "none":
        above = r
    elif BASELINE != "mean" and BASELINE != "leave_one_out":
        tl.static_assert(BASELINE == "second_best", "this baseline has no formula")
    part = factor * above
    own = tl.where(varies, deviation, 0.0)
    if not DECOUPLED:
        own = tl.sum(weight * own, axis=1)[:, None]
    if BASELINE == "second_best":
        # Halfway between the two, no rounding can tell a second sample to be the best.
        lead, middle = best
        part = tl.where(own > middle[:, None], lead[:, None] * part, 0.0)
    if SCALE == "leave_one_out":
        # A sample that is not the farthest owns at most 3/4 of the squares, and what it leaves of
        # them has all digits; the farthest may own all but rounding.
        squares, n = column[0], column[1]
        far, squares_of_others = farthest
        left = squares - own * own * (n / tl.maximum(n - 1.0, 1.0))
        left = tl.maximum(tl.where(far == step, squares_of_others, left), 0.0)
        divisor = std_divisor(left, n - 1.0, scalars)
        part = part / tl.where((left > 0) & (n > 2), divisor, 1.0)
    return part


@triton.jit
def batch_divisor(spread_ptr, programs, scalars, SCALE: tl.constexpr, BLOCK_K: tl.constexpr):
    """[BLOCK_K], from what _batch_kernel left behind; ones without it."""
    _, eps, std_floor = scalars
    divisor = tl.full([BLOCK_K], 1.0, tl.float64)
    if SCALE == "batch":
        n, _, squares = reduce_moments(spread_ptr, programs, 3, BLOCK_K)
        divisor = std_divisor(squares, n, scalars)
    elif SCALE == "nonzero":
        _, fraction, _ = reduce_moments(spread_ptr, programs, 3, BLOCK_K)
        divisor = floored(fraction, eps, std_floor)
    elif SCALE != "none":
        # Those of a group, which the batch has no divisor for.
        tl.static_assert(SCALE == "group" or SCALE == "leave_one_out", "this scale has no formula")
    return divisor


@triton.jit
def store_statistics(row, moments, constant, seen, share, energy, nonzero):
    """A program's STATS rows; all but `moments` are summed over their first dimension."""
    n, mean, squares = moments
    BLOCK_K: tl.constexpr = n.shape[0]
    zeros = n * 0.0
    tl.store(row, n)
    tl.store(row + BLOCK_K, mean)
    tl.store(row + 2 * BLOCK_K, squares)
    tl.store(row + 3 * BLOCK_K, tl.sum(constant, axis=0).to(tl.float64))
    tl.store(row + 4 * BLOCK_K, tl.sum(seen, axis=0).to(tl.float64))
    tl.store(row + 5 * BLOCK_K, tl.sum(share, axis=0))
    tl.store(row + 6 * BLOCK_K, zeros + tl.sum(energy, axis=0))
    tl.store(row + 7 * BLOCK_K, zeros + tl.sum(nonzero, axis=0))
