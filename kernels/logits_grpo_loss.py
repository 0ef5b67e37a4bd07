"""The policy loss from logits with its gradient, for ratios per token: a program has a whole row.

The row is summed up, the slope of its token's term follows, and the gradient is written while the
row is still in the cache. One program fills an SM: the rows in flight are then few enough for an L2
of 50 MB, so that memory sees one read and one write. Formulas: docs/ops/logits_grpo_loss.md.
"""

import torch
import triton
import triton.language as tl

from lvrpo.kernels._launch import LaunchConfig, cdiv, launch
from lvrpo.kernels._log_ratio import is_saturated, saturate
from lvrpo.kernels._policy_terms import bounds_of, kl_term, surrogate_term
from lvrpo.kernels._primitives import LN2, LOG2E, as_scalar, capped_logit, is_finite
from lvrpo.kernels.gather_logprobs import (
    logit_gradient,
    row_range,
    row_statistics,
    token_logprob,
)
from lvrpo.kernels.grpo_loss import four_scalars, named_numbers

# By the dtype that is computed in. A thread of 32 warps may have 64 registers; with more than 32 no
# second program fits an SM, and two loads of 16 bytes are on their way at a time.
ROW_LOSS = {
    torch.float32: LaunchConfig(
        {"BLOCK_V": 16384, "LANES": 8, "BLOCK_D": 16384}, num_warps=32, num_stages=1
    ),
    torch.float64: LaunchConfig(
        {"BLOCK_V": 2048, "LANES": 4, "BLOCK_D": 1024}, num_warps=8, num_stages=1
    ),
}
# The derivative of a cap takes the registers of half a tile.
CAPPED_ROW_LOSS = ROW_LOSS | {
    torch.float32: LaunchConfig(
        {"BLOCK_V": 8192, "LANES": 8, "BLOCK_D": 8192}, num_warps=32, num_stages=1
    )
}
# What has a number or two for each token, in whatever slice of a batch.
SLICED = [
    *("token_ids_ptr", "vocab_range_ptr", "old_ptr", "advantage_ptr", "ref_ptr", "mask_ptr"),
    *("policy_weight_ptr", "factor_ptr", "lse_ptr", "entropy_ptr"),
]
SCALE = LaunchConfig({"BLOCK": 2048}, num_warps=4, num_stages=1)
# As many as the largest GPU holds at a time: what finds a factor of 1 is over in microseconds.
SCALE_PROGRAMS = 2048


@triton.jit
def _slope_of(
    logp,
    old_ptr,  # at the token, or None
    advantage,
    ref_ptr,  # at the token, or None
    policy_weight_ptr,  # at the token, or None
    bounds,
    kl_form,
    RATIO: tl.constexpr,
    SURROGATE: tl.constexpr,
    KL: tl.constexpr,
    KL_FACTOR: tl.constexpr,
    KL_GRADIENT: tl.constexpr,
):
    """The derivative of an active token's term by its log-prob, before the aggregation."""
    limit, kl_log_ratio_limit, kl_limit, beta = four_scalars(kl_form, logp.dtype)
    log_ratio = tl.zeros_like(logp)
    if old_ptr is not None:
        log_ratio = logp - tl.load(old_ptr)
    ratio = tl.exp(saturate(log_ratio, limit))
    past = is_saturated(log_ratio, limit)
    own_bounds = bounds_of(bounds, logp.dtype, SURROGATE)
    _, slope, _, _, _ = surrogate_term(
        (logp, log_ratio, ratio, ratio, advantage, past), own_bounds, RATIO, SURROGATE
    )
    if policy_weight_ptr is not None:
        weight = tl.load(policy_weight_ptr)
        slope = tl.where(weight != 0, weight * slope, 0.0)
    if ref_ptr is not None:
        _, _, kl_slope = kl_term(
            *(tl.load(ref_ptr) - logp, log_ratio, limit, kl_log_ratio_limit, kl_limit),
            *(KL, KL_FACTOR, KL_GRADIENT),
        )
        # Without a coefficient the reference is for the metric alone, and may overflow.
        slope += tl.where(beta != 0, beta * kl_slope, 0.0)
    return slope


@triton.jit
def _write_gradient(
    dlogits_ptr,  # [V]
    logits_ptr,  # [V]
    low,
    high,
    vocab,
    token,
    slope,
    lse,
    dentropy,
    entropy,
    inv_temperature,
    cap,
    WHOLE_ROW: tl.constexpr,
    ENTROPY: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """The gradient by a row of logits, which it may take the place of; 0 outside [low, high)."""
    whole = 0
    if WHOLE_ROW:
        whole = vocab // BLOCK_D * BLOCK_D
        for begin in range(0, whole, BLOCK_D):
            column = begin + tl.arange(0, BLOCK_D)
            x = tl.load(logits_ptr + column, eviction_policy="evict_first").to(lse.dtype)
            hits = tl.where(column == token, slope, 0.0)
            dx = logit_gradient(
                *(x, hits, slope, lse, dentropy, entropy, inv_temperature, cap),
                ENTROPY,
                HAS_SOFTCAP,
            )
            dx = dx.to(dlogits_ptr.dtype.element_ty)
            tl.store(dlogits_ptr + column, dx, eviction_policy="evict_first")
    for begin in range(whole, vocab, BLOCK_D):
        column = begin + tl.arange(0, BLOCK_D)
        inside = (column >= low) & (column < high)
        x = tl.load(logits_ptr + column, mask=inside, other=0.0, eviction_policy="evict_first")
        hits = tl.where(column == token, slope, 0.0)
        dx = logit_gradient(
            *(x.to(lse.dtype), hits, slope, lse, dentropy, entropy, inv_temperature, cap),
            ENTROPY,
            HAS_SOFTCAP,
        )
        dx = tl.where(inside, dx, 0.0).to(dlogits_ptr.dtype.element_ty)
        tl.store(dlogits_ptr + column, dx, mask=column < vocab, eviction_policy="evict_first")


@triton.jit(do_not_specialize_on_alignment=SLICED)
def _row_loss_kernel(
    dlogits_ptr,  # [R, V], may be the logits
    logits_ptr,  # [R, V]
    token_ids_ptr,  # [R]
    vocab_range_ptr,  # [R, 2] or None
    old_ptr,  # [R] or None
    advantage_ptr,  # [R]
    ref_ptr,  # [R] or None
    mask_ptr,  # [R] bool
    policy_weight_ptr,  # [R] or None
    factor_ptr,  # [R], what the aggregation multiplies a token's term by
    logprobs_ptr,  # [R]
    lse_ptr,  # [R], nats
    entropy_ptr,  # [R], nats
    vocab,
    stride_row: tl.int64,
    stride_dlogits_row: tl.int64,
    inv_temperature: tl.float64,
    softcap: tl.float64,
    clip_low: tl.float64,
    clip_high: tl.float64,
    ratio_cap: tl.float64,
    log_ratio_limit: tl.float64,
    shape_pos_0: tl.float64,
    shape_neg_0: tl.float64,
    beta: tl.float64,
    kl_log_ratio_limit: tl.float64,
    kl_limit: tl.float64,
    entropy_coef: tl.float64,
    RATIO: tl.constexpr,
    SURROGATE: tl.constexpr,
    KL: tl.constexpr,
    KL_FACTOR: tl.constexpr,
    KL_GRADIENT: tl.constexpr,
    ENTROPY_BONUS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    BLOCK_V: tl.constexpr,
    LANES: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    acc_dtype: tl.constexpr = lse_ptr.dtype.element_ty
    row = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + row * stride_row
    inv_temp = as_scalar(inv_temperature, acc_dtype)
    cap = as_scalar(softcap, acc_dtype)
    token = tl.load(token_ids_ptr + row)
    low, high = row_range(vocab_range_ptr, row, vocab)
    # An id that nobody checked reads nothing: on a GPU values are checked on request only.
    active = (tl.load(mask_ptr + row) != 0) & (token >= low) & (token < high)
    y = tl.load(row_ptr + token, mask=active, other=0.0).to(acc_dtype)
    top, log_sum, mean, _ = row_statistics(
        row_ptr,
        low,
        tl.where(active, high, low),  # a masked row may hold anything
        inv_temp * LOG2E,
        cap,
        True,
        False,
        HAS_SOFTCAP,
        BLOCK_V,
        LANES,
        "evict_last",
    )
    logp = token_logprob(capped_logit(y, cap, HAS_SOFTCAP), top, log_sum, inv_temp * LOG2E)
    logp = tl.where(active, logp, 0.0)
    lse = tl.where(active, top * inv_temp + log_sum * LN2, 0.0)
    entropy = tl.where(active, (log_sum - mean) * LN2, 0.0)
    tl.store(logprobs_ptr + row, logp)
    tl.store(lse_ptr + row, lse)
    tl.store(entropy_ptr + row, entropy)

    factor = tl.load(factor_ptr + row)
    slope = _slope_of(
        logp,
        None if old_ptr is None else old_ptr + row,
        tl.load(advantage_ptr + row),
        None if ref_ptr is None else ref_ptr + row,
        None if policy_weight_ptr is None else policy_weight_ptr + row,
        (clip_low, clip_high, ratio_cap, shape_pos_0, shape_neg_0),
        (log_ratio_limit, kl_log_ratio_limit, kl_limit, beta),
        RATIO,
        SURROGATE,
        KL,
        KL_FACTOR,
        KL_GRADIENT,
    )
    # A row without a finite log-sum-exp is refused where values are read, and has no gradient here.
    active &= is_finite(logp) & is_finite(lse)
    slope = tl.where(active, factor * slope, 0.0)
    dentropy = tl.where(active, -as_scalar(entropy_coef, acc_dtype) * factor, 0.0)
    # In place, no warp may write before all have read.
    tl.debug_barrier()
    dlogits_row = dlogits_ptr + row * stride_dlogits_row
    if (slope != 0) | (ENTROPY_BONUS & (dentropy != 0)):
        _write_gradient(
            dlogits_row,
            row_ptr,
            low,
            high,
            vocab,
            token,
            slope,
            lse,
            dentropy,
            entropy,
            inv_temp,
            cap,
            vocab_range_ptr is None,
            ENTROPY_BONUS,
            HAS_SOFTCAP,
            BLOCK_D,
        )
    else:
        for begin in range(0, vocab, BLOCK_D):
            column = begin + tl.arange(0, BLOCK_D)
            zeros = tl.zeros([BLOCK_D], dlogits_ptr.dtype.element_ty)
            tl.store(dlogits_row + column, zeros, mask=column < vocab)


@triton.jit(do_not_specialize=["rows", "columns"], do_not_specialize_on_alignment=SLICED)
def _scale_kernel(
    gradient_ptr,  # [rows, columns]
    factor_ptr,  # []
    scaled_ptr,  # [rows, columns], or None for the place of the gradient
    rows: tl.int64,
    columns: tl.int64,
    stride_row: tl.int64,
    stride_scaled_row: tl.int64,
    BLOCK: tl.constexpr,
):
    factor = tl.load(factor_ptr)
    if scaled_ptr is not None or factor != 1:
        tiles = tl.cdiv(columns, BLOCK)
        for tile in range(tl.program_id(0).to(tl.int64), tiles * rows, tl.num_programs(0)):
            begin, row = tile % tiles * BLOCK, tile // tiles
            from_ptr, to_ptr = gradient_ptr + row * stride_row, gradient_ptr + row * stride_row
            if scaled_ptr is not None:
                to_ptr = scaled_ptr + row * stride_scaled_row
            column = begin + tl.arange(0, BLOCK)
            # Whole tiles need no mask, which would take their loads apart.
            if begin + BLOCK <= columns:
                x = tl.load(from_ptr + column).to(factor.dtype) * factor
                tl.store(to_ptr + column, x.to(to_ptr.dtype.element_ty))
            else:
                x = tl.load(from_ptr + column, mask=column < columns).to(factor.dtype) * factor
                tl.store(to_ptr + column, x.to(to_ptr.dtype.element_ty), mask=column < columns)


def scale_gradient(gradient, factor, dtype):
    """The gradient times a factor [] that is not read on the host, in `dtype`.

    In place where the dtype is that of the gradient: a factor of 1 then moves nothing.
    """
    scaled = None if gradient.dtype == dtype else gradient.new_empty(gradient.shape, dtype=dtype)
    # One long row where it can be: its alignment is known then, whatever the columns are.
    rows, columns, stride_row, stride_scaled_row = 1, gradient.numel(), 0, 0
    if not gradient.is_contiguous():
        (rows, columns), stride_row = gradient.shape, gradient.stride(0)
        stride_scaled_row = columns
    launch(
        _scale_kernel,
        (min(rows * cdiv(columns, SCALE.blocks["BLOCK"]), SCALE_PROGRAMS),),
        SCALE,
        gradient_ptr=gradient,
        factor_ptr=factor,
        scaled_ptr=scaled,
        rows=rows,
        columns=columns,
        stride_row=stride_row,
        stride_scaled_row=stride_scaled_row,
    )
    return gradient if scaled is None else scaled


#: Numbers of the loss alone, and not of the slope of a token.
LOSS_ONLY = ("shape_pos_1", "shape_neg_1", "max_length", "denominator")


def logits_grpo_loss_rows(
    dlogits,
    logits,
    token_ids,
    vocab_range,
    old_logprobs,
    advantages,
    cu_seqlens,
    ref_logprobs,
    mask,
    policy_weights,
    factors,
    head_numbers,
    loss_numbers,
    ratio,
    surrogate,
    kl,
    kl_factor,
    kl_gradient,
):
    """Launcher; contract in `lvrpo.ops.logits_grpo_loss`. `dlogits` may be `logits` itself."""
    if logits.stride(1) != 1:
        logits = logits.contiguous()
    temperature, softcap, _ = head_numbers.tolist()
    named = named_numbers(loss_numbers)
    rows, vocab = logits.shape
    dtype = advantages.dtype
    logprobs, lse, entropy = (logits.new_empty(rows, dtype=dtype) for _ in range(3))
    launch(
        _row_loss_kernel,
        (rows,),
        (CAPPED_ROW_LOSS if softcap > 0 else ROW_LOSS)[dtype],
        dlogits_ptr=dlogits,
        logits_ptr=logits,
        token_ids_ptr=token_ids.contiguous(),
        vocab_range_ptr=None if vocab_range is None else vocab_range.contiguous(),
        old_ptr=None if old_logprobs is None else old_logprobs.contiguous(),
        advantage_ptr=advantages.contiguous(),
        ref_ptr=None if ref_logprobs is None else ref_logprobs.contiguous(),
        mask_ptr=_usable(mask, (old_logprobs, advantages, ref_logprobs), policy_weights),
        policy_weight_ptr=None if policy_weights is None else policy_weights.contiguous(),
        factor_ptr=factors,
        logprobs_ptr=logprobs,
        lse_ptr=lse,
        entropy_ptr=entropy,
        vocab=vocab,
        stride_row=logits.stride(0),
        stride_dlogits_row=dlogits.stride(0),
        inv_temperature=1.0 / temperature,
        softcap=softcap,
        **{name: value for name, value in named.items() if name not in LOSS_ONLY},
        RATIO=ratio,
        SURROGATE=surrogate,
        KL=kl,
        KL_FACTOR=kl_factor,
        KL_GRADIENT=kl_gradient,
        ENTROPY_BONUS=named["entropy_coef"] != 0,
        HAS_SOFTCAP=softcap > 0,
    )
    return logprobs, lse, entropy


def _usable(mask, data, policy_weights):
    """[T] the mask without tokens whose data is not finite, which `grpo_loss_fwd` drops too."""
    for tensor in (*data, policy_weights):
        if tensor is not None:
            mask = mask & tensor.isfinite()
    return mask if policy_weights is None else mask & (policy_weights >= 0)
