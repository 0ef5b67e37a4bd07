"""Policy loss, its metrics and its gradient over packed tokens.

Three kernels: what the tokens of a sequence add up to; every token's term and slope, with the sums
of a part of a sequence; the sum of the parts. Counts are added atomically, as integers, and floats
in a fixed order, so that the same inputs give the same bits. Formulas: docs/ops/grpo_loss.md.
"""

import torch
import triton
import triton.language as tl

from lvrpo.kernels._launch import LaunchConfig, cdiv, launch
from lvrpo.kernels._policy_loss import (
    GAMMA,
    LOG_CLIP,
    LOG_GAMMA_FLOOR,
    LOG_RATIO_LIMIT,
    RATIO_SEQ_MEAN,
    RATIO_SEQ_MEAN_TOKEN,
    RATIO_SEQ_SUM,
    clamp,
    gamma_weight,
    kl_term,
    ratio_limits,
    surrogate_term,
)
from lvrpo.kernels._primitives import as_scalar

METRICS = 11
SUMS = 11  # what a part of a sequence leaves behind: see _store_sums and _store_statistics
TOKEN_MEAN = tl.constexpr(0)
SEQ_MEAN_TOKEN_MEAN = tl.constexpr(1)
SEQ_MEAN_TOKEN_SUM_NORM = tl.constexpr(3)
TOKEN_SUM = tl.constexpr(4)
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
REDUCE = LaunchConfig({"BLOCK_P": 128, "ROWS": 16}, num_warps=8, num_stages=1)
# Blocks of tokens that a program of average length walks.
BLOCKS_PER_PROGRAM = 4
MAX_SPLITS = 64


@triton.jit
def _load_tokens(logp_ptr, old_ptr, weight_ptr, t, inside):
    """Log-prob, log-ratio and weight, 0 where a token is masked: it may hold anything."""
    logp = tl.load(logp_ptr + t, mask=inside, other=0.0)
    if weight_ptr is None:
        weight = inside.to(logp.dtype)
    else:
        weight = tl.load(weight_ptr + t, mask=inside, other=0.0)
    # On policy the log-ratio is 0, or NaN where the log-prob is not finite.
    log_ratio = logp - logp
    if old_ptr is not None:
        log_ratio = logp - tl.load(old_ptr + t, mask=inside, other=0.0)
    active = weight != 0
    return tl.where(active, logp, 0.0), tl.where(active, log_ratio, 0.0), weight, active


@triton.jit
def _count_kernel(
    logp_ptr,  # [T]
    old_ptr,  # [T] or None
    weight_ptr,  # [T] or None
    advantage_ptr,  # [B], read with HAS_LIMITS
    cu_seqlens_ptr,  # [B + 1]
    counts_ptr,  # [2 + B] zeros: active tokens, sequences that have some, active tokens of each
    sums_ptr,  # [B * SPLITS, 2] zeros: log-ratios between their limits, and weights; or None
    clip_low: tl.float64,
    clip_high: tl.float64,
    SURROGATE: tl.constexpr,
    HAS_LIMITS: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    acc_dtype = logp_ptr.dtype.element_ty
    part = tl.program_id(0).to(tl.int64)
    sequence = part // SPLITS
    begin = tl.load(cu_seqlens_ptr + sequence) + part % SPLITS * BLOCK_T
    end = tl.load(cu_seqlens_ptr + sequence + 1)
    if begin < end:
        if HAS_LIMITS:
            low, high = ratio_limits(
                tl.load(advantage_ptr + sequence),
                as_scalar(clip_low, acc_dtype),
                as_scalar(clip_high, acc_dtype),
                SURROGATE,
            )
        count = tl.zeros([BLOCK_T], tl.int64)
        log_ratios = tl.zeros([BLOCK_T], acc_dtype)
        weights = tl.zeros([BLOCK_T], acc_dtype)
        for first in range(begin, end, SPLITS * BLOCK_T):
            t = first + tl.arange(0, BLOCK_T)
            _, log_ratio, weight, active = _load_tokens(logp_ptr, old_ptr, weight_ptr, t, t < end)
            count += active.to(tl.int64)
            if HAS_LIMITS:
                log_ratio = clamp(log_ratio, low, high)
            log_ratios += log_ratio
            weights += weight
        found = tl.sum(count, axis=0)
        before = tl.atomic_add(counts_ptr + 2 + sequence, found)
        tl.atomic_add(counts_ptr, found)
        tl.atomic_add(counts_ptr + 1, ((before == 0) & (found > 0)).to(tl.int64))
        if sums_ptr is not None:
            tl.store(sums_ptr + 2 * part, tl.sum(log_ratios, axis=0))
            tl.store(sums_ptr + 2 * part + 1, tl.sum(weights, axis=0))


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
    outer = denominator
    if denominator <= 0:
        if AGGREGATION == TOKEN_SUM:
            outer = tl.full([], 1.0, tl.float64)
        elif AGGREGATION == TOKEN_MEAN:
            outer = tl.maximum(tl.load(counts_ptr), 1).to(tl.float64)
        elif COUNT_EMPTY:
            outer = tl.maximum(sequences, 1).to(tl.float64)
        else:
            outer = tl.maximum(tl.load(counts_ptr + 1), 1).to(tl.float64)
    if AGGREGATION == SEQ_MEAN_TOKEN_MEAN:
        outer *= tl.maximum(tokens, 1.0)
    elif AGGREGATION == SEQ_MEAN_TOKEN_SUM_NORM:
        outer *= max_length
    return 1.0 / outer


@triton.jit
def _ratio_of(
    sums_ptr,
    sequence,
    tokens,
    advantage,
    own,
    RATIO: tl.constexpr,
    SURROGATE: tl.constexpr,
    COUNT_SPLITS: tl.constexpr,
):
    """A sequence's ratio, what its tokens are weighed by, and what shares its slope among them."""
    part = (sequence * COUNT_SPLITS + tl.arange(0, COUNT_SPLITS)) * 2
    log_ratio = tl.sum(tl.load(sums_ptr + part).to(tl.float64), axis=0)
    share = tl.sum(tl.load(sums_ptr + part + 1).to(tl.float64), axis=0)
    if RATIO != RATIO_SEQ_SUM:
        log_ratio /= tl.maximum(tokens, 1.0)
        share /= tl.maximum(tokens, 1.0)
    acc_dtype = advantage.dtype
    if SURROGATE == GAMMA:
        log_ratio = clamp(log_ratio, LOG_GAMMA_FLOOR, LOG_RATIO_LIMIT)
        k = tl.where(advantage > 0, own[0], own[2])
        rate = tl.where(advantage > 0, own[1], own[3])
        of_weight = gamma_weight(log_ratio, k, rate).to(acc_dtype)
    ratio = tl.exp(log_ratio.to(acc_dtype))
    if SURROGATE != GAMMA:
        of_weight = ratio
    return ratio, of_weight, share.to(acc_dtype)


@triton.jit
def five_scalars(x, dtype: tl.constexpr):
    """Five float arguments in the dtype that tokens are computed in."""
    a, b, c = tl.full([], x[0], dtype), tl.full([], x[1], dtype), tl.full([], x[2], dtype)
    return a, b, c, tl.full([], x[3], dtype), tl.full([], x[4], dtype)


@triton.jit
def _store_sums(partial_ptr, factor, policy, kl_term, entropy, kl, beta, entropy_coef):
    """Rows 0 to 3 of the parts: what the loss sums, its policy term, KL and entropy."""
    parts, part = tl.num_programs(0), tl.program_id(0)
    policy_sum = factor * tl.sum(policy, axis=0)
    entropy_sum = tl.sum(entropy, axis=0).to(tl.float64)
    # A reference given for the metric alone may overflow, and 0 times infinity is NaN.
    kl_sum = tl.where(beta != 0, beta * tl.sum(kl_term, axis=0), 0.0)
    loss = policy_sum + factor * (kl_sum - entropy_coef * entropy_sum)
    tl.store(partial_ptr + part, loss)
    tl.store(partial_ptr + parts + part, policy_sum)
    tl.store(partial_ptr + 2 * parts + part, tl.sum(kl, axis=0))
    tl.store(partial_ptr + 3 * parts + part, entropy_sum)


@triton.jit
def _store_statistics(partial_ptr, lows, highs, caps, total, squares, smallest, largest):
    """Rows 4 to 10: what each bound holds; sum, squares, minus minimum, maximum of the ratios."""
    parts, part = tl.num_programs(0), tl.program_id(0)
    tl.store(partial_ptr + 4 * parts + part, tl.sum(lows, axis=0))
    tl.store(partial_ptr + 5 * parts + part, tl.sum(highs, axis=0))
    tl.store(partial_ptr + 6 * parts + part, tl.sum(caps, axis=0))
    tl.store(partial_ptr + 7 * parts + part, tl.sum(total, axis=0))
    tl.store(partial_ptr + 8 * parts + part, tl.sum(squares, axis=0))
    tl.store(partial_ptr + 9 * parts + part, -tl.min(smallest, axis=0))
    tl.store(partial_ptr + 10 * parts + part, tl.max(largest, axis=0))


@triton.jit(do_not_specialize=["sequences", "splits"])
def _terms_kernel(
    logp_ptr,  # [T]
    old_ptr,  # [T] or None
    advantage_ptr,  # [B], or [T] with PER_TOKEN
    cu_seqlens_ptr,  # [B + 1]
    ref_ptr,  # [T] or None
    entropy_ptr,  # [T] or None
    weight_ptr,  # [T] or None
    counts_ptr,  # [2 + B], see _count_kernel
    sums_ptr,  # [B * COUNT_SPLITS, 2], or None without a ratio of the sequence
    partial_ptr,  # [SUMS, B * splits]
    dlogp_ptr,  # [T]
    dentropy_ptr,  # [T]
    sequences,
    splits,
    clip_low: tl.float64,
    clip_high: tl.float64,
    ratio_cap: tl.float64,
    own_pos_0: tl.float64,
    own_pos_1: tl.float64,
    own_neg_0: tl.float64,
    own_neg_1: tl.float64,
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
    OF_SEQUENCE: tl.constexpr = RATIO >= RATIO_SEQ_MEAN
    OWN_RATIO: tl.constexpr = (not OF_SEQUENCE) or SURROGATE == LOG_CLIP
    SHARES_SLOPE: tl.constexpr = (
        OF_SEQUENCE and RATIO != RATIO_SEQ_MEAN_TOKEN and SURROGATE != GAMMA
    )
    sequence = tl.program_id(0).to(tl.int64) // splits
    begin = tl.load(cu_seqlens_ptr + sequence)
    end = tl.load(cu_seqlens_ptr + sequence + 1)
    tokens = tl.load(counts_ptr + 2 + sequence).to(tl.float64)
    factor = _factor_of(
        counts_ptr, tokens, sequences, max_length, denominator, AGGREGATION, COUNT_EMPTY
    )
    zero = tl.zeros([BLOCK_T], acc_dtype)
    advantage = zero if PER_TOKEN else zero + tl.load(advantage_ptr + sequence)
    ratio, of_weight, share = zero, zero, zero
    if OF_SEQUENCE:
        own = own_pos_0, own_pos_1, own_neg_0, own_neg_1
        ratio, of_weight, share = _ratio_of(
            sums_ptr, sequence, tokens, advantage, own, RATIO, SURROGATE, COUNT_SPLITS
        )
        ratio += zero
    policy, kl_sum, kl_terms, entropy, total, squares = zero, zero, zero, zero, zero, zero
    smallest, largest = zero + float("inf"), zero - float("inf")
    lows = tl.zeros([BLOCK_T], tl.int32)
    highs, caps = lows, lows
    bounds = five_scalars((clip_low, clip_high, ratio_cap, own_pos_0, own_neg_0), acc_dtype)
    kl_form = five_scalars((kl_log_ratio_limit, kl_limit, beta, 0.0, 0.0), acc_dtype)
    split = tl.program_id(0) % splits
    for first in range(begin + split * BLOCK_T, end, splits.to(tl.int64) * BLOCK_T):
        t = first + tl.arange(0, BLOCK_T)
        inside = t < end
        logp, log_ratio, weight, active = _load_tokens(logp_ptr, old_ptr, weight_ptr, t, inside)
        if PER_TOKEN:
            advantage = tl.load(advantage_ptr + t, mask=inside, other=0.0)
        if OWN_RATIO:
            ratio = tl.exp(log_ratio)
        value, slope, low, high, cap = surrogate_term(
            (logp, log_ratio, ratio, of_weight, advantage),
            bounds,
            RATIO,
            SURROGATE,
        )
        policy += tl.where(active, weight * value, 0.0)
        slope *= share if SHARES_SLOPE else weight
        if SURROGATE == LOG_CLIP:
            slope = tl.where(low | high, 0.0, slope)
        lows += (active & low).to(tl.int32)
        highs += (active & high).to(tl.int32)
        caps += (active & cap).to(tl.int32)
        seen = tl.where(active, ratio, 0.0)
        total += seen
        squares += seen * seen
        smallest = tl.minimum(smallest, tl.where(active, ratio, float("inf")))
        largest = tl.maximum(largest, tl.where(active, ratio, float("-inf")))
        if ref_ptr is not None:
            d = tl.where(active, tl.load(ref_ptr + t, mask=inside, other=0.0) - logp, 0.0)
            value, term, kl_slope = kl_term(
                d, log_ratio, kl_form[0], kl_form[1], KL, KL_FACTOR, KL_GRADIENT
            )
            kl_sum += value
            kl_terms += term
            # Without a coefficient the reference is for the metric alone, and may overflow.
            slope += tl.where(beta != 0, kl_form[2] * kl_slope, 0.0)
        if entropy_ptr is not None:
            entropy += tl.where(active, tl.load(entropy_ptr + t, mask=inside, other=0.0), 0.0)
            dentropy = tl.where(active, (-entropy_coef * factor).to(acc_dtype), 0.0)
            tl.store(dentropy_ptr + t, dentropy, mask=inside)
        dlogp = tl.where(active, factor.to(acc_dtype) * slope, 0.0)
        tl.store(dlogp_ptr + t, dlogp, mask=inside)
    _store_sums(partial_ptr, factor, policy, kl_terms, entropy, kl_sum, beta, entropy_coef)
    _store_statistics(partial_ptr, lows, highs, caps, total, squares, smallest, largest)


@triton.jit(do_not_specialize=["parts"])
def _reduce_kernel(
    partial_ptr,  # [SUMS, parts]
    counts_ptr,  # [2 + B]
    loss_ptr,  # []
    metrics_ptr,  # [METRICS], in the order of the fields of LossMetrics
    parts,
    SUMS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    row = tl.arange(0, ROWS)
    sums = tl.zeros([ROWS, BLOCK_P], tl.float64)
    largest = sums - float("inf")
    for first in range(0, parts, BLOCK_P):
        part = first + tl.arange(0, BLOCK_P)[None, :]
        inside = (part < parts) & (row[:, None] < SUMS)
        x = tl.load(partial_ptr + row[:, None] * parts.to(tl.int64) + part, mask=inside, other=0.0)
        sums += x
        largest = tl.maximum(largest, tl.where(inside, x, float("-inf")))
    total = tl.sum(sums, axis=1)
    extreme = tl.max(largest, axis=1)
    active = tl.load(counts_ptr).to(tl.float64)
    n = tl.maximum(active, 1.0)
    tl.store(loss_ptr + row, total, mask=row == 0)
    # The policy's part of the loss; means of KL, entropy and what the three bounds hold.
    mean = tl.where(row == 1, total, total / n)
    tl.store(metrics_ptr + row - 1, mean, mask=(row >= 1) & (row <= 6))
    # The smallest ratio came with its sign changed.
    extreme = tl.where(active > 0, tl.where(row == 9, -extreme, extreme), 1.0)
    tl.store(metrics_ptr + row - 3, extreme, mask=(row == 9) | (row == 10))
    ratio = tl.sum(tl.where(row == 7, total, 0.0), axis=0)
    squares = tl.sum(tl.where(row == 8, total, 0.0), axis=0)
    tl.store(metrics_ptr + 8, tl.where(active > 0, ratio / n, 1.0))
    size = ratio * ratio / tl.where(active > 0, squares * n, 1.0)
    tl.store(metrics_ptr + 9, tl.where(active > 0, size, 1.0))
    tl.store(metrics_ptr + 10, active)


#: The scalars of the op in the order of its schema, by the names that the kernels have for them.
SCALARS = (
    *("RATIO", "SURROGATE", "clip_low", "clip_high", "ratio_cap"),
    *("own_pos_0", "own_pos_1", "own_neg_0", "own_neg_1"),
    *("beta", "KL", "KL_FACTOR", "KL_GRADIENT", "kl_log_ratio_limit", "kl_limit"),
    *("entropy_coef", "AGGREGATION", "max_length", "COUNT_EMPTY", "denominator"),
)


def grpo_loss_fwd(
    logprobs,
    old_logprobs,
    advantages,
    cu_seqlens,
    ref_logprobs,
    entropy,
    token_weights,
    *scalars,
):
    """Launcher; contract in `lvrpo.ops.grpo_loss`."""
    by_name = dict(zip(SCALARS, scalars, strict=True))
    tokens, sequences = logprobs.shape[0], cu_seqlens.shape[0] - 1
    doubles = {"dtype": torch.float64, "device": logprobs.device}
    counts = torch.zeros(2 + sequences, dtype=torch.int64, device=logprobs.device)
    sums = None
    if by_name["RATIO"] >= RATIO_SEQ_MEAN.value:
        sums = torch.zeros(sequences * COUNT_SPLITS, 2, **doubles)
    config = TERMS[logprobs.dtype]
    splits = cdiv(tokens, max(1, sequences) * config.blocks["BLOCK_T"] * BLOCKS_PER_PROGRAM)
    splits = min(max(1, splits), MAX_SPLITS)
    partial = torch.empty(SUMS, sequences * splits, **doubles)
    loss, metrics = logprobs.new_empty(()), logprobs.new_empty(METRICS)
    dlogprobs = torch.empty_like(logprobs, memory_format=torch.contiguous_format)
    dentropy = logprobs.new_empty(0 if entropy is None else tokens)
    shared = {
        "logp_ptr": logprobs.contiguous(),
        "old_ptr": _contiguous(old_logprobs),
        "weight_ptr": _contiguous(token_weights),
        "advantage_ptr": advantages.contiguous(),
        "cu_seqlens_ptr": cu_seqlens.contiguous(),
        "counts_ptr": counts,
        "sums_ptr": sums,
    }
    launch(
        _count_kernel,
        (sequences * COUNT_SPLITS,),
        COUNT,
        **shared,
        **{name: by_name[name] for name in ("clip_low", "clip_high", "SURROGATE")},
        HAS_LIMITS=by_name["SURROGATE"] in (GAMMA.value, LOG_CLIP.value),
    )
    launch(
        _terms_kernel,
        (sequences * splits,),
        config,
        **shared,
        **by_name,
        ref_ptr=_contiguous(ref_logprobs),
        entropy_ptr=_contiguous(entropy),
        partial_ptr=partial,
        dlogp_ptr=dlogprobs,
        dentropy_ptr=dentropy,
        sequences=sequences,
        splits=splits,
        PER_TOKEN=advantages.shape[0] != sequences,
    )
    launch(
        _reduce_kernel,
        (1,),
        REDUCE,
        partial_ptr=partial,
        counts_ptr=counts,
        loss_ptr=loss,
        metrics_ptr=metrics,
        parts=partial.shape[1],
        SUMS=SUMS,
    )
    return loss, metrics, dlogprobs, dentropy


def _contiguous(tensor):
    return None if tensor is None else tensor.contiguous()
