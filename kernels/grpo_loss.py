"""Policy loss, its metrics and its gradient over packed tokens.

Three kernels: what the tokens of a sequence add up to; every token's term and slope, with the sums
of a part of a sequence; the sum of the parts. Counts are added atomically, as integers, and floats
in a fixed order, so that the same inputs give the same bits. Formulas: docs/ops/grpo_loss.md.
"""

import torch
import triton
import triton.language as tl

from lvrpo.kernels._launch import LaunchConfig, cdiv, launch
from lvrpo.kernels._log_ratio import is_saturated, saturate
from lvrpo.kernels._policy_terms import (
    LOG_GAMMA_FLOOR,
    LOG_RATIO_LIMIT,
    RATIO_FLOOR,
    RATIO_LIMIT,
    TERM_CHOICES,
    bounds_of,
    exp_excess,
    gamma_weight,
    kl_term,
    ratio_limits,
    surrogate_term,
)
from lvrpo.kernels._primitives import as_scalar, clamp, is_finite, positions
from lvrpo.params.loss_metrics import STATISTICS
from lvrpo.params.policy_loss import LOSS_NUMBERS

# The names that these kernels have arithmetic for, by the parameter of `LossParams`.
CHOICES = TERM_CHOICES | {
    "aggregation": (
        *("token_mean", "seq_mean_token_mean", "seq_mean_token_sum"),
        *("seq_mean_token_sum_norm", "token_sum"),
    )
}
# Where LossMetrics has its sums and extremes.
AT_POLICY_LOSS, AT_KL, AT_ENTROPY, AT_LOWS, AT_HIGHS, AT_CAPS = positions(
    STATISTICS,
    *("policy_loss", "kl", "entropy"),
    *("clip_fraction_low", "clip_fraction_high", "clip_fraction_cap"),
)
AT_RATIO, AT_RATIO_SQUARED, AT_RATIOS, AT_KL_OLD = positions(
    STATISTICS, "_ratio", "_ratio_squared", "_ratios", "kl_old"
)
AT_TOKENS, AT_SEQUENCES, AT_DROPPED, AT_RATIO_MIN, AT_RATIO_MAX = positions(
    STATISTICS, "active_tokens", "active_sequences", "dropped_tokens", "ratio_min", "ratio_max"
)
AT_LOW_MIN, AT_HIGH_MAX, AT_KL_OLD_MAX = positions(
    STATISTICS, "clip_fraction_low_min", "clip_fraction_high_max", "kl_old_max"
)
# Numbers of the loss that the sums over a sequence need.
COUNT_NUMBERS = ("clip_low", "clip_high", "log_ratio_limit", "kl_log_ratio_limit", "kl_limit")
# What a part of a sequence leaves behind.
PARTS = (
    *("loss", "policy", "kl", "entropy", "lows", "highs", "caps"),
    *("ratio", "ratio_squared", "minus_ratio_min", "ratio_max", "kl_old"),
)
LOSS, POLICY, KL_SUM, ENTROPY = positions(PARTS, "loss", "policy", "kl", "entropy")
LOWS, HIGHS, CAPS = positions(PARTS, "lows", "highs", "caps")
RATIO_SUM, SQUARES, MINUS_LEAST, MOST, KL_OLD = positions(
    PARTS, "ratio", "ratio_squared", "minus_ratio_min", "ratio_max", "kl_old"
)
# Programs that share a sequence while it is counted: one number for every batch, because the ratio
# of a sequence must not depend on its neighbours.
COUNT_SPLITS = 8
COUNT = LaunchConfig({"BLOCK_T": 512, "SPLITS": COUNT_SPLITS}, num_warps=4, num_stages=1)
TERMS = {
    torch.float32: LaunchConfig(
        {"BLOCK_T": 512, "COUNT_SPLITS": COUNT_SPLITS}, num_warps=4, num_stages=1
    ),
    torch.float64: LaunchConfig(
        {"BLOCK_T": 256, "COUNT_SPLITS": COUNT_SPLITS}, num_warps=8, num_stages=1
    ),
}
REDUCE = LaunchConfig({"BLOCK_P": 128, "ROWS": 16, "BLOCK_S": 256}, num_warps=8, num_stages=1)
# Blocks of tokens that a program of average length walks.
BLOCKS_PER_PROGRAM = 4
MAX_SPLITS = 64
# What comes in whatever slice of a batch, and is read from wherever a sequence begins.
SLICED = [
    *("logp_ptr", "old_ptr", "advantage_ptr", "cu_seqlens_ptr", "ref_ptr", "entropy_ptr"),
    *("mask_ptr", "policy_weight_ptr", "dentropy_ptr"),
]


@triton.jit
def _tokens_of(cu_seqlens_ptr, sequence, tokens):
    """Where a sequence begins and ends in the tokens there are, whatever nobody checked."""
    begin = tl.load(cu_seqlens_ptr + sequence)
    end = tl.load(cu_seqlens_ptr + sequence + 1)
    return tl.minimum(tl.maximum(begin, 0), tokens), tl.minimum(tl.maximum(end, 0), tokens)


@triton.jit
def _load_tokens(logp_ptr, old_ptr, t, inside):
    """Log-prob and log-ratio, as they are."""
    logp = tl.load(logp_ptr + t, mask=inside, other=0.0)
    log_ratio = tl.zeros_like(logp)
    if old_ptr is not None:
        log_ratio = logp - tl.load(old_ptr + t, mask=inside, other=0.0)
    return logp, log_ratio


@triton.jit
def _active(
    logp, log_ratio, advantage, ref_ptr, entropy_ptr, mask_ptr, policy_weight_ptr, t, inside
):
    """Which tokens the mask lets in; and which of them, with inputs that are finite, count."""
    asked = inside
    if mask_ptr is not None:
        asked &= tl.load(mask_ptr + t, mask=inside, other=0) != 0
    active = asked & is_finite(logp) & is_finite(log_ratio)
    has_advantage = is_finite(advantage)
    if ref_ptr is not None:
        active &= is_finite(tl.load(ref_ptr + t, mask=inside, other=0.0))
    if entropy_ptr is not None:
        active &= is_finite(tl.load(entropy_ptr + t, mask=inside, other=0.0))
    if policy_weight_ptr is not None:
        weight = tl.load(policy_weight_ptr + t, mask=inside, other=0.0)
        active &= is_finite(weight) & (weight >= 0)
        # Nobody asks for the advantage that a policy weight of 0 leaves out.
        has_advantage |= weight == 0
    return asked, active & has_advantage


@triton.jit
def _estimates(d, log_ratio_limit, kl_log_ratio_limit, kl_limit, KL: tl.constexpr):
    """The KL estimators without their factor."""
    limit, far, most, _ = four_scalars(
        (log_ratio_limit, kl_log_ratio_limit, kl_limit, 0.0), d.dtype
    )
    _, term, _ = kl_term(d, tl.zeros_like(d), limit, far, most, KL, "none", "own")
    return term


@triton.jit(do_not_specialize=["tokens"], do_not_specialize_on_alignment=SLICED)
def _count_kernel(
    logp_ptr,  # [T]
    old_ptr,  # [T] or None
    advantage_ptr,  # [B], or [T] with PER_TOKEN
    cu_seqlens_ptr,  # [B + 1]
    ref_ptr,  # [T] or None
    entropy_ptr,  # [T] or None
    mask_ptr,  # [T] bool or None
    policy_weight_ptr,  # [T] or None
    counts_ptr,  # [3 + B] zeros: active, dropped tokens; sequences with active ones; theirs of each
    sums_ptr,  # [B * SPLITS, 4] zeros: log-ratios between their limits, weights, log-ratios as they
    # are, KL estimators; or None
    tokens,
    clip_low: tl.float64,
    clip_high: tl.float64,
    log_ratio_limit: tl.float64,
    kl_log_ratio_limit: tl.float64,
    kl_limit: tl.float64,
    PER_TOKEN: tl.constexpr,
    SURROGATE: tl.constexpr,
    KL: tl.constexpr,
    KL_OF_SEQUENCE: tl.constexpr,
    HAS_LIMITS: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    acc_dtype = logp_ptr.dtype.element_ty
    part = tl.program_id(0).to(tl.int64)
    sequence = part // SPLITS
    begin, end = _tokens_of(cu_seqlens_ptr, sequence, tokens)
    begin += part % SPLITS * BLOCK_T
    if begin < end:
        advantage = tl.zeros([BLOCK_T], acc_dtype)
        if not PER_TOKEN:
            advantage += tl.load(advantage_ptr + sequence)
        if HAS_LIMITS:
            low, high = ratio_limits(
                advantage,
                as_scalar(clip_low, acc_dtype),
                as_scalar(clip_high, acc_dtype),
                SURROGATE,
            )
        count = tl.zeros([BLOCK_T], tl.int64)
        dropped = tl.zeros([BLOCK_T], tl.int64)
        log_ratios = tl.zeros([BLOCK_T], acc_dtype)
        weights, free_log_ratios, kl_sum = log_ratios, log_ratios, log_ratios
        for first in range(begin, end, SPLITS * BLOCK_T):
            t = first + tl.arange(0, BLOCK_T)
            inside = t < end
            logp, log_ratio = _load_tokens(logp_ptr, old_ptr, t, inside)
            if PER_TOKEN:
                advantage = tl.load(advantage_ptr + t, mask=inside, other=0.0)
            asked, active = _active(
                *(logp, log_ratio, advantage, ref_ptr, entropy_ptr, mask_ptr, policy_weight_ptr),
                t,
                inside,
            )
            count += active.to(tl.int64)
            dropped += (asked & (active == 0)).to(tl.int64)
            if KL_OF_SEQUENCE:
                free_log_ratios += tl.where(active, log_ratio, 0.0)
                ref = tl.load(ref_ptr + t, mask=inside, other=0.0)
                kl_sum += _estimates(
                    tl.where(active, ref - logp, 0.0),
                    log_ratio_limit,
                    kl_log_ratio_limit,
                    kl_limit,
                    KL,
                )
            if HAS_LIMITS:
                log_ratio = clamp(log_ratio, low, high)
            log_ratios += tl.where(active, log_ratio, 0.0)
            if policy_weight_ptr is None:
                weights += active.to(acc_dtype)
            else:
                weight = tl.load(policy_weight_ptr + t, mask=inside, other=0.0)
                weights += tl.where(active, weight, 0.0)
        found = tl.sum(count, axis=0)
        before = tl.atomic_add(counts_ptr + 3 + sequence, found)
        tl.atomic_add(counts_ptr, found)
        tl.atomic_add(counts_ptr + 1, tl.sum(dropped, axis=0))
        tl.atomic_add(counts_ptr + 2, ((before == 0) & (found > 0)).to(tl.int64))
        if sums_ptr is not None:
            tl.store(sums_ptr + 4 * part, tl.sum(log_ratios, axis=0))
            tl.store(sums_ptr + 4 * part + 1, tl.sum(weights, axis=0))
            tl.store(sums_ptr + 4 * part + 2, tl.sum(free_log_ratios, axis=0))
            tl.store(sums_ptr + 4 * part + 3, tl.sum(kl_sum, axis=0))


@triton.jit
def _factor_of(
    counts_ptr,
    tokens,
    sequences,
    max_length,
    denominator,
    AGGREGATION: tl.constexpr,
    COUNT_EMPTY: tl.constexpr,
):
    """What multiplies the sum over the tokens of a sequence with `tokens` active ones."""
    # A denominator of 0 is that of a step with nothing to divide.
    outer = tl.where(denominator == 0, float("inf"), denominator)
    if denominator < 0:
        if AGGREGATION == "token_sum":
            outer = tl.full([], 1.0, tl.float64)
        elif AGGREGATION == "token_mean":
            outer = tl.maximum(tl.load(counts_ptr), 1).to(tl.float64)
        elif COUNT_EMPTY:
            outer = tl.maximum(sequences, 1).to(tl.float64)
        else:
            outer = tl.maximum(tl.load(counts_ptr + 2), 1).to(tl.float64)
    if AGGREGATION == "seq_mean_token_mean":
        outer *= tl.maximum(tokens, 1.0)
    elif AGGREGATION == "seq_mean_token_sum_norm":
        outer *= max_length
    elif AGGREGATION != "token_mean" and AGGREGATION != "token_sum":
        tl.static_assert(AGGREGATION == "seq_mean_token_sum", "this aggregation has no formula")
    return 1.0 / outer


@triton.jit
def _sum_of_sequence(sums_ptr, sequence, column: tl.constexpr, COUNT_SPLITS: tl.constexpr):
    """A column of what `_count_kernel` sums up."""
    part = (sequence * COUNT_SPLITS + tl.arange(0, COUNT_SPLITS)) * 4
    return tl.sum(tl.load(sums_ptr + part + column).to(tl.float64), axis=0)


@triton.jit
def _kl_of_sequence(zero, sums_ptr, sequence, tokens, ratio_limit, COUNT_SPLITS: tl.constexpr):
    """The log of the factor that its KL terms share, and a token's slope through that factor."""
    count = tl.maximum(tokens, 1.0)
    log_ratio = _sum_of_sequence(sums_ptr, sequence, 2, COUNT_SPLITS) / count
    term = tl.exp(saturate(log_ratio, ratio_limit))
    term *= _sum_of_sequence(sums_ptr, sequence, 3, COUNT_SPLITS) / count
    slope = tl.where(is_saturated(log_ratio, ratio_limit), 0.0, term)
    return zero + log_ratio.to(zero.dtype), zero + slope.to(zero.dtype)


@triton.jit
def _ratio_of(
    sums_ptr,
    sequence,
    tokens,
    advantage,
    own,
    ratio_limit,
    RATIO: tl.constexpr,
    SURROGATE: tl.constexpr,
    COUNT_SPLITS: tl.constexpr,
):
    """A sequence's ratio, what its tokens are weighed by, what shares its slope among them, and
    whether the log of the ratio is past its limit.
    """
    log_ratio = _sum_of_sequence(sums_ptr, sequence, 0, COUNT_SPLITS)
    share = _sum_of_sequence(sums_ptr, sequence, 1, COUNT_SPLITS)
    if RATIO != "seq_sum":
        log_ratio /= tl.maximum(tokens, 1.0)
        share /= tl.maximum(tokens, 1.0)
    acc_dtype = advantage.dtype
    if SURROGATE == "gamma":
        log_ratio = clamp(log_ratio, LOG_GAMMA_FLOOR, LOG_RATIO_LIMIT)
        k = tl.where(advantage > 0, own[0], own[2])
        rate = tl.where(advantage > 0, own[1], own[3])
        of_weight = gamma_weight(saturate(log_ratio, ratio_limit), k, rate).to(acc_dtype)
    ratio = tl.exp(saturate(log_ratio, ratio_limit).to(acc_dtype))
    if SURROGATE != "gamma":
        of_weight = ratio
    return ratio, of_weight, share.to(acc_dtype), is_saturated(log_ratio, ratio_limit)


@triton.jit
def four_scalars(x, dtype: tl.constexpr):
    """Four float arguments in the dtype that tokens are computed in."""
    a, b, c = tl.full([], x[0], dtype), tl.full([], x[1], dtype), tl.full([], x[2], dtype)
    return a, b, c, tl.full([], x[3], dtype)


@triton.jit
def _store_sums(partial_ptr, factor, policy, kl_term, entropy, kl, beta, entropy_coef):
    """What the loss sums, its policy term, KL and entropy."""
    parts, part_ptr = tl.num_programs(0), partial_ptr + tl.program_id(0)
    policy_sum = factor * tl.sum(policy, axis=0)
    entropy_sum = tl.sum(entropy, axis=0).to(tl.float64)
    # A reference given for the metric alone may overflow, and 0 times infinity is NaN.
    kl_sum = tl.where(beta != 0, beta * tl.sum(kl_term, axis=0), 0.0)
    loss = policy_sum + factor * (kl_sum - entropy_coef * entropy_sum)
    tl.store(part_ptr + LOSS * parts, loss)
    tl.store(part_ptr + POLICY * parts, policy_sum)
    tl.store(part_ptr + KL_SUM * parts, tl.sum(kl, axis=0))
    tl.store(part_ptr + ENTROPY * parts, entropy_sum)


@triton.jit
def _store_statistics(partial_ptr, lows, highs, caps, total, squares, smallest, largest, kl_old):
    """What each bound holds; sum, squares, maximum of minus and of the ratios; the old KL."""
    parts, part_ptr = tl.num_programs(0), partial_ptr + tl.program_id(0)
    tl.store(part_ptr + LOWS * parts, tl.sum(lows, axis=0))
    tl.store(part_ptr + HIGHS * parts, tl.sum(highs, axis=0))
    tl.store(part_ptr + CAPS * parts, tl.sum(caps, axis=0))
    tl.store(part_ptr + RATIO_SUM * parts, tl.sum(total, axis=0))
    tl.store(part_ptr + SQUARES * parts, tl.sum(squares, axis=0))
    tl.store(part_ptr + MINUS_LEAST * parts, -tl.min(smallest, axis=0))
    tl.store(part_ptr + MOST * parts, tl.max(largest, axis=0))
    tl.store(part_ptr + KL_OLD * parts, tl.sum(kl_old, axis=0))


@triton.jit(
    do_not_specialize=["tokens", "sequences", "splits"], do_not_specialize_on_alignment=SLICED
)
def _terms_kernel(
    logp_ptr,  # [T]
    old_ptr,  # [T] or None
    advantage_ptr,  # [B], or [T] with PER_TOKEN
    cu_seqlens_ptr,  # [B + 1]
    ref_ptr,  # [T] or None
    entropy_ptr,  # [T] or None
    mask_ptr,  # [T] bool or None
    policy_weight_ptr,  # [T] or None
    counts_ptr,  # [3 + B], see _count_kernel
    sums_ptr,  # [B * COUNT_SPLITS, 4], or None without a ratio of the sequence
    partial_ptr,  # [PARTS, B * splits]
    dlogp_ptr,  # [T]
    dentropy_ptr,  # [T]
    tokens,
    sequences,
    splits,
    clip_low: tl.float64,
    clip_high: tl.float64,
    ratio_cap: tl.float64,
    log_ratio_limit: tl.float64,
    shape_pos_0: tl.float64,
    shape_pos_1: tl.float64,
    shape_neg_0: tl.float64,
    shape_neg_1: tl.float64,
    beta: tl.float64,
    kl_log_ratio_limit: tl.float64,
    kl_limit: tl.float64,
    entropy_coef: tl.float64,
    max_length: tl.float64,
    denominator: tl.float64,
    PER_TOKEN: tl.constexpr,
    RATIO: tl.constexpr,
    SURROGATE: tl.constexpr,
    KL: tl.constexpr,
    KL_FACTOR: tl.constexpr,
    KL_GRADIENT: tl.constexpr,
    AGGREGATION: tl.constexpr,
    COUNT_EMPTY: tl.constexpr,
    COUNT_SPLITS: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    acc_dtype: tl.constexpr = logp_ptr.dtype.element_ty
    SHARES_RATIO: tl.constexpr = RATIO == "seq_mean" or RATIO == "seq_sum"
    OF_SEQUENCE: tl.constexpr = SHARES_RATIO or RATIO == "seq_mean_token"
    tl.static_assert(
        OF_SEQUENCE or RATIO == "token" or RATIO == "none", "this ratio has no formula"
    )
    OWN_RATIO: tl.constexpr = (not OF_SEQUENCE) or SURROGATE == "log_clip"
    SHARES_SLOPE: tl.constexpr = SHARES_RATIO and SURROGATE != "gamma" and SURROGATE != "detached"
    sequence = tl.program_id(0).to(tl.int64) // splits
    begin, end = _tokens_of(cu_seqlens_ptr, sequence, tokens)
    active_tokens = tl.load(counts_ptr + 3 + sequence).to(tl.float64)
    factor = _factor_of(
        counts_ptr, active_tokens, sequences, max_length, denominator, AGGREGATION, COUNT_EMPTY
    )
    zero = tl.zeros([BLOCK_T], acc_dtype)
    advantage = zero if PER_TOKEN else zero + tl.load(advantage_ptr + sequence)
    ratio, of_weight, share, past = zero, zero, zero, zero > 0
    if OF_SEQUENCE:
        own = shape_pos_0, shape_pos_1, shape_neg_0, shape_neg_1
        ratio, of_weight, share, is_past = _ratio_of(
            *(sums_ptr, sequence, active_tokens, advantage, own, log_ratio_limit),
            *(RATIO, SURROGATE, COUNT_SPLITS),
        )
        ratio += zero
        past = zero + is_past.to(acc_dtype) > 0
    kl_of_sequence = zero, zero
    if KL_FACTOR == "sequence_ratio" and ref_ptr is not None:
        kl_of_sequence = _kl_of_sequence(
            zero, sums_ptr, sequence, active_tokens, log_ratio_limit, COUNT_SPLITS
        )
    policy, kl_sum, kl_terms, entropy, total, squares = zero, zero, zero, zero, zero, zero
    kl_old, smallest, largest = zero, zero + float("inf"), zero - float("inf")
    lows = tl.zeros([BLOCK_T], tl.int32)
    highs, caps = lows, lows
    bounds = bounds_of(
        (clip_low, clip_high, ratio_cap, shape_pos_0, shape_neg_0), acc_dtype, SURROGATE
    )
    kl_form = four_scalars((log_ratio_limit, kl_log_ratio_limit, kl_limit, beta), acc_dtype)
    limit = kl_form[0]
    # Statistics have a limit whether or not the loss has one.
    limit_seen = tl.where(limit < LOG_RATIO_LIMIT, limit, LOG_RATIO_LIMIT).to(acc_dtype)
    split = tl.program_id(0) % splits
    # Tokens before the first sequence and after the last one have a gradient of 0 to be written.
    written_from = tl.where(sequence == 0, 0, begin)
    written_to = tl.where(sequence == sequences - 1, tokens, end)
    for first in range(written_from + split * BLOCK_T, written_to, splits.to(tl.int64) * BLOCK_T):
        t = first + tl.arange(0, BLOCK_T)
        inside = (t >= begin) & (t < end)
        written = t < written_to
        logp, log_ratio = _load_tokens(logp_ptr, old_ptr, t, inside)
        if PER_TOKEN:
            advantage = tl.load(advantage_ptr + t, mask=inside, other=0.0)
        _, active = _active(
            *(logp, log_ratio, advantage, ref_ptr, entropy_ptr, mask_ptr, policy_weight_ptr),
            t,
            inside,
        )
        logp, log_ratio = tl.where(active, logp, 0.0), tl.where(active, log_ratio, 0.0)
        weight = zero + 1.0
        if policy_weight_ptr is not None:
            weight = tl.load(policy_weight_ptr + t, mask=active, other=0.0)
        if OWN_RATIO:
            ratio = tl.exp(saturate(log_ratio, limit))
        if not OF_SEQUENCE:
            past = is_saturated(log_ratio, limit)
        value, slope, low, high, cap = surrogate_term(
            (logp, log_ratio, ratio, of_weight, advantage, past), bounds, RATIO, SURROGATE
        )
        pulls = active & (weight != 0)
        policy += tl.where(pulls, weight * value, 0.0)
        if SHARES_SLOPE:
            slope = tl.where(share != 0, slope * share, 0.0)
            if SURROGATE == "log_clip":
                slope = tl.where(low | high, 0.0, slope)
        else:
            slope = tl.where(pulls, weight * slope, 0.0)
        lows += (active & low).to(tl.int32)
        highs += (active & high).to(tl.int32)
        caps += (active & cap).to(tl.int32)
        seen = clamp(ratio, RATIO_FLOOR, RATIO_LIMIT)
        total += tl.where(active, seen, 0.0)
        squares += tl.where(active, seen * seen, 0.0)
        smallest = tl.minimum(smallest, tl.where(active, seen, float("inf")))
        largest = tl.maximum(largest, tl.where(active, seen, float("-inf")))
        if old_ptr is not None:
            kl_old += exp_excess(saturate(log_ratio, limit_seen))
        if ref_ptr is not None:
            d = tl.where(active, tl.load(ref_ptr + t, mask=inside, other=0.0) - logp, 0.0)
            value, term, kl_slope = kl_term(
                *(d, kl_of_sequence[0] if KL_FACTOR == "sequence_ratio" else log_ratio),
                *(limit, kl_form[1], kl_form[2], KL, KL_FACTOR, KL_GRADIENT),
            )
            kl_sum += value
            kl_terms += term
            # Without a coefficient the reference is for the metric alone, and may overflow.
            slope += tl.where(beta != 0, kl_form[3] * (kl_slope + kl_of_sequence[1]), 0.0)
        if entropy_ptr is not None:
            entropy += tl.where(active, tl.load(entropy_ptr + t, mask=inside, other=0.0), 0.0)
            dentropy = tl.where(active, (-entropy_coef * factor).to(acc_dtype), 0.0)
            tl.store(dentropy_ptr + t, dentropy, mask=written)
        dlogp = tl.where(active, factor.to(acc_dtype) * slope, 0.0)
        tl.store(dlogp_ptr + t, dlogp, mask=written)
    _store_sums(partial_ptr, factor, policy, kl_terms, entropy, kl_sum, beta, entropy_coef)
    _store_statistics(
        *(partial_ptr, lows, highs, caps, total, squares, smallest, largest, kl_old),
    )


@triton.jit
def _of_parts(partial_ptr, row, parts, at, inside):
    """A row of the parts, at some of them."""
    return tl.load(partial_ptr + row * parts.to(tl.int64) + at, mask=inside, other=0.0)


@triton.jit
def _at(x, row, wanted):
    """The number of a row."""
    return tl.sum(tl.where(row == wanted, x, 0.0), axis=0)


@triton.jit(do_not_specialize=["parts", "sequences", "splits"])
def _reduce_kernel(
    partial_ptr,  # [PARTS, parts], parts = sequences * splits
    counts_ptr,  # [3 + B]
    loss_ptr,  # []
    statistics_ptr,  # [STATISTICS] fp64: sums, then extremes of LossMetrics
    parts,
    sequences,
    splits,
    ONE_RATIO: tl.constexpr,
    PART_ROWS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    row = tl.arange(0, ROWS)
    sums = tl.zeros([ROWS, BLOCK_P], tl.float64)
    largest = sums - float("inf")
    for first in range(0, parts, BLOCK_P):
        part = first + tl.arange(0, BLOCK_P)[None, :]
        inside = (part < parts) & (row[:, None] < PART_ROWS)
        x = tl.load(partial_ptr + row[:, None] * parts.to(tl.int64) + part, mask=inside, other=0.0)
        sums += x
        largest = tl.maximum(largest, tl.where(inside, x, float("-inf")))
    total = tl.sum(sums, axis=1)
    extreme = tl.max(largest, axis=1)

    # What one sequence has: shares of what its bounds hold, its mean KL, the one ratio it may have.
    none = tl.zeros([BLOCK_S], tl.float64)
    most_low, most_high, most_kl = none - float("inf"), none - float("inf"), none - float("inf")
    held_low, held_high, held_cap, ratios, squares = none, none, none, none, none
    for first in range(0, sequences, BLOCK_S):
        sequence = first + tl.arange(0, BLOCK_S).to(tl.int64)
        inside = sequence < sequences
        n = tl.load(counts_ptr + 3 + sequence, mask=inside, other=0).to(tl.float64)
        some = n > 0
        low, high, cap, kl_old, ratio = none, none, none, none, none
        for split in range(splits):
            at = sequence * splits + split
            low += _of_parts(partial_ptr, LOWS, parts, at, inside)
            high += _of_parts(partial_ptr, HIGHS, parts, at, inside)
            cap += _of_parts(partial_ptr, CAPS, parts, at, inside)
            kl_old += _of_parts(partial_ptr, KL_OLD, parts, at, inside)
            if ONE_RATIO:
                ratio = tl.maximum(ratio, _of_parts(partial_ptr, MOST, parts, at, inside))
        if ONE_RATIO:
            low, high, cap = tl.minimum(low, 1.0), tl.minimum(high, 1.0), tl.minimum(cap, 1.0)
            held_low += tl.where(some, low, 0.0)
            held_high += tl.where(some, high, 0.0)
            held_cap += tl.where(some, cap, 0.0)
            ratios += tl.where(some, ratio, 0.0)
            squares += tl.where(some, ratio * ratio, 0.0)
        count = tl.maximum(n, 1.0)
        of_ratios = none + 1.0 if ONE_RATIO else count
        most_low = tl.maximum(most_low, tl.where(some, -low / of_ratios, float("-inf")))
        most_high = tl.maximum(most_high, tl.where(some, high / of_ratios, float("-inf")))
        most_kl = tl.maximum(most_kl, tl.where(some, kl_old / count, float("-inf")))

    tl.store(loss_ptr, _at(total, row, LOSS))
    tl.store(statistics_ptr + AT_POLICY_LOSS, _at(total, row, POLICY))
    tl.store(statistics_ptr + AT_KL, _at(total, row, KL_SUM))
    tl.store(statistics_ptr + AT_ENTROPY, _at(total, row, ENTROPY))
    active, with_some = tl.load(counts_ptr), tl.load(counts_ptr + 2)
    if ONE_RATIO:
        tl.store(statistics_ptr + AT_LOWS, tl.sum(held_low, axis=0))
        tl.store(statistics_ptr + AT_HIGHS, tl.sum(held_high, axis=0))
        tl.store(statistics_ptr + AT_CAPS, tl.sum(held_cap, axis=0))
        tl.store(statistics_ptr + AT_RATIO, tl.sum(ratios, axis=0))
        tl.store(statistics_ptr + AT_RATIO_SQUARED, tl.sum(squares, axis=0))
        tl.store(statistics_ptr + AT_RATIOS, with_some.to(tl.float64))
    else:
        tl.store(statistics_ptr + AT_LOWS, _at(total, row, LOWS))
        tl.store(statistics_ptr + AT_HIGHS, _at(total, row, HIGHS))
        tl.store(statistics_ptr + AT_CAPS, _at(total, row, CAPS))
        tl.store(statistics_ptr + AT_RATIO, _at(total, row, RATIO_SUM))
        tl.store(statistics_ptr + AT_RATIO_SQUARED, _at(total, row, SQUARES))
        tl.store(statistics_ptr + AT_RATIOS, active.to(tl.float64))
    tl.store(statistics_ptr + AT_KL_OLD, _at(total, row, KL_OLD))
    tl.store(statistics_ptr + AT_TOKENS, active.to(tl.float64))
    tl.store(statistics_ptr + AT_SEQUENCES, with_some.to(tl.float64))
    tl.store(statistics_ptr + AT_DROPPED, tl.load(counts_ptr + 1).to(tl.float64))
    tl.store(statistics_ptr + AT_RATIO_MIN, _at(extreme, row, MINUS_LEAST))
    tl.store(statistics_ptr + AT_RATIO_MAX, _at(extreme, row, MOST))
    tl.store(statistics_ptr + AT_LOW_MIN, tl.max(most_low, axis=0))
    tl.store(statistics_ptr + AT_HIGH_MAX, tl.max(most_high, axis=0))
    tl.store(statistics_ptr + AT_KL_OLD_MAX, tl.max(most_kl, axis=0))


def named_numbers(numbers):
    """The numbers of the op as arguments of kernels; a read of the host's memory."""
    return dict(zip(LOSS_NUMBERS, numbers.tolist(), strict=True))


def grpo_loss_fwd(
    logprobs,
    old_logprobs,
    advantages,
    cu_seqlens,
    ref_logprobs,
    entropy,
    mask,
    policy_weights,
    numbers,
    advantage_per_token,
    count_empty,
    ratio,
    surrogate,
    kl,
    kl_factor,
    kl_gradient,
    aggregation,
):
    """Launcher; contract in `lvrpo.ops.grpo_loss`."""
    named = named_numbers(numbers)
    one_ratio = ratio in ("seq_mean", "seq_sum") and surrogate != "log_clip"
    tokens, sequences = logprobs.shape[0], cu_seqlens.shape[0] - 1
    doubles = {"dtype": torch.float64, "device": logprobs.device}
    counts = torch.zeros(3 + sequences, dtype=torch.int64, device=logprobs.device)
    sums = None
    kl_of_sequence = kl_factor == "sequence_ratio" and ref_logprobs is not None
    if ratio not in ("none", "token") or kl_of_sequence:
        sums = torch.zeros(sequences * COUNT_SPLITS, 4, **doubles)
    config = TERMS[logprobs.dtype]
    splits = cdiv(tokens, max(1, sequences) * config.blocks["BLOCK_T"] * BLOCKS_PER_PROGRAM)
    splits = min(max(1, splits), MAX_SPLITS)
    partial = torch.empty(len(PARTS), sequences * splits, **doubles)
    loss, statistics = logprobs.new_empty(()), torch.empty(len(STATISTICS), **doubles)
    dlogprobs = torch.empty_like(logprobs, memory_format=torch.contiguous_format)
    dentropy = logprobs.new_empty(0 if entropy is None else tokens)
    shared = {
        "logp_ptr": logprobs.contiguous(),
        "old_ptr": _contiguous(old_logprobs),
        "advantage_ptr": advantages.contiguous(),
        "cu_seqlens_ptr": cu_seqlens.contiguous(),
        "ref_ptr": _contiguous(ref_logprobs),
        "entropy_ptr": _contiguous(entropy),
        "mask_ptr": _contiguous(mask),
        "policy_weight_ptr": _contiguous(policy_weights),
        "counts_ptr": counts,
        "sums_ptr": sums,
        "tokens": tokens,
        "PER_TOKEN": advantage_per_token,
        "SURROGATE": surrogate,
        "KL": kl,
    }
    launch(
        _count_kernel,
        (sequences * COUNT_SPLITS,),
        COUNT,
        **shared,
        **{name: named[name] for name in COUNT_NUMBERS},
        KL_OF_SEQUENCE=kl_of_sequence,
        HAS_LIMITS=surrogate in ("gamma", "log_clip"),
    )
    launch(
        _terms_kernel,
        (sequences * splits,),
        config,
        **shared,
        **named,
        partial_ptr=partial,
        dlogp_ptr=dlogprobs,
        dentropy_ptr=dentropy,
        sequences=sequences,
        splits=splits,
        RATIO=ratio,
        KL_FACTOR=kl_factor,
        KL_GRADIENT=kl_gradient,
        AGGREGATION=aggregation,
        COUNT_EMPTY=count_empty,
    )
    launch(
        _reduce_kernel,
        (1,),
        REDUCE,
        partial_ptr=partial,
        counts_ptr=counts,
        loss_ptr=loss,
        statistics_ptr=statistics,
        parts=partial.shape[1],
        sequences=sequences,
        splits=splits,
        ONE_RATIO=one_ratio,
        PART_ROWS=len(PARTS),
    )
    return loss, statistics, dlogprobs, dentropy


def _contiguous(tensor):
    return None if tensor is None else tensor.contiguous()
