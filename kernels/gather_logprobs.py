"""log p(token) and entropy from logits: one read of the logits, one exponential per element.

Derivation: docs/ops/gather_logprobs.md.
"""

import torch
import triton
import triton.language as tl

from lvrpo.kernels._launch import LaunchConfig, cdiv, launch
from lvrpo.kernels._primitives import (
    LN2,
    LOG2E,
    as_scalar,
    capped_logit,
    capped_logit_derivative,
)

# A shift in bits below which its exponential is 0 in fp64 too: bounded, a shift between logits that
# are 1e38 apart makes no infinite product for that 0 to meet.
NOTHING = tl.constexpr(-2000.0)
# Tiles are [BLOCK_V / LANES, LANES]: a thread holds whole rows of a tile, so that its running
# maximum and its sums need no word from other threads until the row is read.
LANES = 8
ROW_STATS = LaunchConfig({"BLOCK_V": 4096, "LANES": LANES}, num_warps=8, num_stages=3)
GATHER = LaunchConfig({"BLOCK_T": 128}, num_warps=4, num_stages=1)
DLOGITS = LaunchConfig({"BLOCK_V": 2048}, num_warps=4, num_stages=1)
# What has a number or two for each token or row, and is read so, in whatever slice of a batch.
SMALL = [
    *("token_ids_ptr", "row_index_ptr", "vocab_range_ptr", "dlogprobs_ptr", "dentropy_ptr"),
    *("lse_ptr", "entropy_ptr"),
]


@triton.jit
def _fold_tile(x, scale, sums, ENTROPY: tl.constexpr, SQUARES: tl.constexpr):
    """The sums over a row after one more tile x [groups, LANES] of capped logits, -inf outside.

    With d = scale * (x - row_max), in bits: row_max and the sums of 2^d, of 2^d d and of 4^d.
    """
    row_max, sum_exp, sum_exp_d, sum_exp_squared = sums
    new_max = tl.maximum(row_max, tl.max(x, axis=1))
    # Where nothing but -inf was seen, any finite base keeps -inf - base from being NaN.
    base = tl.where(new_max == float("-inf"), 0.0, new_max)
    # Subtracting before scaling keeps the digits of logits with a large common offset.
    d = (x - base[:, None]) * scale
    e = tl.exp2(d)
    shift = tl.maximum((row_max - base) * scale, NOTHING)
    factor = tl.exp2(shift)
    if ENTROPY:
        moved = sum_exp_d + tl.where(sum_exp > 0, shift, 0.0) * sum_exp
        # d is -inf where e is 0; their product must be 0.
        sum_exp_d = factor * moved + tl.sum(tl.where(e > 0, e * d, 0.0), axis=1)
    if SQUARES:
        sum_exp_squared = factor * factor * sum_exp_squared + tl.sum(e * e, axis=1)
    return new_max, factor * sum_exp + tl.sum(e, axis=1), sum_exp_d, sum_exp_squared


@triton.jit
def aligned_before(row_ptr):
    """The last address before a row at which loads of 16 bytes begin, and how far the row is."""
    size: tl.constexpr = row_ptr.dtype.element_ty.primitive_bitwidth // 8
    ahead = (row_ptr.to(tl.int64) % 16 // size).to(tl.int32)
    return tl.multiple_of(row_ptr - ahead, 16), ahead


@triton.jit
def row_statistics(
    row_ptr,  # [V]
    low,
    high,
    scale,
    cap,
    ENTROPY: tl.constexpr,
    SQUARES: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    BLOCK_V: tl.constexpr,
    LANES: tl.constexpr,
    EVICTION: tl.constexpr,
):
    """What the columns [low, high) of a row add up to.

    With d = scale * (x - maximum), in bits: the maximum of the capped logits, log2 sum 2^d, the
    mean of d and the sum of squared probabilities.
    """
    acc_dtype: tl.constexpr = scale.dtype
    groups: tl.constexpr = BLOCK_V // LANES
    offset = tl.arange(0, groups)[:, None] * LANES + tl.arange(0, LANES)[None, :]
    zero = tl.zeros([groups], acc_dtype)
    sums = tl.full([groups], float("-inf"), acc_dtype), zero, zero, zero
    # Tiles are counted from where loads are aligned, wherever the row begins.
    row_ptr, ahead = aligned_before(row_ptr)
    low, high = low + ahead, tl.maximum(low, high) + ahead
    first, last = low // BLOCK_V * BLOCK_V, high // BLOCK_V * BLOCK_V
    # Tiles that lie inside need no mask, which would cost as much as the exponential.
    for begin in range(tl.cdiv(low, BLOCK_V) * BLOCK_V, last, BLOCK_V):
        x = tl.load(row_ptr + begin + offset, eviction_policy=EVICTION).to(acc_dtype)
        x = capped_logit(x, cap, HAS_SOFTCAP)
        sums = _fold_tile(x, scale, sums, ENTROPY, SQUARES)
    # Then the one that low is inside of, and the one that high is: none, one or two.
    cut = (low > first).to(tl.int32)
    edges = cut + ((high > last) & ((cut == 0) | (last > first))).to(tl.int32)
    for edge in range(edges):
        column = tl.where(edge < cut, first, last) + offset
        inside = (column >= low) & (column < high)
        x = tl.load(row_ptr + column, mask=inside, other=0.0, eviction_policy=EVICTION)
        x = tl.where(inside, capped_logit(x.to(acc_dtype), cap, HAS_SOFTCAP), float("-inf"))
        sums = _fold_tile(x, scale, sums, ENTROPY, SQUARES)

    row_max, sum_exp, sum_exp_d, squares = sums
    top = tl.max(row_max, axis=0)
    shift = tl.where(sum_exp > 0, tl.maximum((row_max - top) * scale, NOTHING), 0.0)
    factor = tl.exp2(shift)
    total = tl.sum(factor * sum_exp, axis=0)
    mean = tl.sum(factor * (sum_exp_d + shift * sum_exp), axis=0) / total
    return top, tl.log2(total), mean, tl.sum(factor * factor * squares, axis=0) / (total * total)


@triton.jit
def row_range(vocab_range_ptr, row, vocab):
    """The columns [low, high) of a row; none beyond the row, whatever nobody checked."""
    low, high = 0, vocab
    if vocab_range_ptr is not None:
        low = tl.minimum(tl.maximum(tl.load(vocab_range_ptr + 2 * row), 0), vocab)
        high = tl.minimum(tl.load(vocab_range_ptr + 2 * row + 1), vocab)
    return low, high


@triton.jit
def token_logprob(x, row_max, log_sum, scale):
    """Of a token whose capped logit is x, in nats."""
    # In this order a large common offset of the logits cancels before it can round the result.
    return ((x - row_max) * scale - log_sum) * LN2


@triton.jit
def logit_gradient(
    x,
    hits,
    total,
    lse,
    dentropy,
    entropy,
    inv_temperature,
    cap,
    ENTROPY: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
):
    """The gradient by logits x of a row.

    `total` is what the row's targets send back in all and `hits` what they send to each column.
    """
    z = capped_logit(x, cap, HAS_SOFTCAP) * inv_temperature
    p = tl.exp2((z - lse) * LOG2E)
    slope = -total
    if ENTROPY:
        # d entropy / dz = p (mean of z - z), and the mean of z is lse - entropy.
        slope = dentropy * (lse - entropy - z) - total
    # z is -inf where p is 0; their product must be 0. The target's column is summed before it is
    # rounded to the output's dtype: rounding p first would lose 1 - p.
    dz = hits + tl.where(p > 0, p * slope, 0.0)
    return dz * inv_temperature * capped_logit_derivative(x, cap, HAS_SOFTCAP)


@triton.jit(do_not_specialize_on_alignment=SMALL)
def _row_stats_kernel(
    logits_ptr,  # [R, V]
    vocab_range_ptr,  # [R, 2] or None
    max_ptr,  # [R], of the capped logits
    log_sum_ptr,  # [R], log2 sum 2^d
    lse_ptr,  # [R], nats
    entropy_ptr,  # [R], nats, or None
    squares_ptr,  # [R] or None
    vocab,
    stride_row: tl.int64,
    inv_temperature: tl.float64,
    softcap: tl.float64,
    HAS_SOFTCAP: tl.constexpr,
    BLOCK_V: tl.constexpr,
    LANES: tl.constexpr,
):
    acc_dtype = lse_ptr.dtype.element_ty
    row = tl.program_id(0).to(tl.int64)
    low, high = row_range(vocab_range_ptr, row, vocab)
    top, log_sum, mean, squares = row_statistics(
        logits_ptr + row * stride_row,
        low,
        high,
        as_scalar(inv_temperature, acc_dtype) * LOG2E,
        as_scalar(softcap, acc_dtype),
        entropy_ptr is not None,
        squares_ptr is not None,
        HAS_SOFTCAP,
        BLOCK_V,
        LANES,
        "",
    )
    tl.store(max_ptr + row, top)
    tl.store(log_sum_ptr + row, log_sum)
    tl.store(lse_ptr + row, top * as_scalar(inv_temperature, acc_dtype) + log_sum * LN2)
    if entropy_ptr is not None:
        tl.store(entropy_ptr + row, (log_sum - mean) * LN2)
    if squares_ptr is not None:
        tl.store(squares_ptr + row, squares)


@triton.jit(do_not_specialize=["tokens", "rows"], do_not_specialize_on_alignment=SMALL)
def _gather_kernel(
    logits_ptr,  # [R, V]
    token_ids_ptr,  # [T]
    row_index_ptr,  # [T] or None
    vocab_range_ptr,  # [R, 2] or None
    max_ptr,  # [R], of the capped logits
    log_sum_ptr,  # [R]
    logprobs_ptr,  # [T]
    tokens,
    rows,
    vocab,
    stride_row: tl.int64,
    inv_temperature: tl.float64,
    softcap: tl.float64,
    ignore_index: tl.int64,
    HAS_SOFTCAP: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    acc_dtype = logprobs_ptr.dtype.element_ty
    t = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    inside = t < tokens
    token = tl.load(token_ids_ptr + t, mask=inside, other=ignore_index)
    row = t
    if row_index_ptr is not None:
        row = tl.load(row_index_ptr + t, mask=inside, other=0)
    # An index that nobody checked reads nothing: on a GPU values are checked on request only.
    valid = inside & (token != ignore_index) & (row >= 0) & (row < rows)
    low, high = 0, vocab
    if vocab_range_ptr is not None:
        low = tl.maximum(tl.load(vocab_range_ptr + 2 * row, mask=valid, other=0), 0)
        high = tl.minimum(tl.load(vocab_range_ptr + 2 * row + 1, mask=valid, other=0), vocab)
    valid &= (token >= low) & (token < high)
    x = tl.load(logits_ptr + row * stride_row + token, mask=valid, other=0.0).to(acc_dtype)
    scale = as_scalar(inv_temperature, acc_dtype) * LOG2E
    x = capped_logit(x, as_scalar(softcap, acc_dtype), HAS_SOFTCAP)
    row_max = tl.load(max_ptr + row, mask=valid, other=0.0)
    log_sum = tl.load(log_sum_ptr + row, mask=valid, other=0.0)
    logprob = token_logprob(x, row_max, log_sum, scale)
    tl.store(logprobs_ptr + t, tl.where(valid, logprob, 0.0), mask=inside)


@triton.jit(do_not_specialize=["tiles"], do_not_specialize_on_alignment=SMALL)
def _dlogits_kernel(
    dlogits_ptr,  # [R, V]
    dlogprobs_ptr,  # [T]
    dentropy_ptr,  # [R] or None
    logits_ptr,  # [R, V]
    token_ids_ptr,  # [T]
    order_ptr,  # [T], tokens sorted by row; None when token t belongs to row t
    first_ptr,  # [R + 1], where a row's tokens begin in `order`
    vocab_range_ptr,  # [R, 2] or None
    lse_ptr,  # [R], nats
    entropy_ptr,  # [R] or None
    vocab,
    tiles,
    stride_row: tl.int64,
    stride_dlogits_row: tl.int64,
    inv_temperature: tl.float64,
    softcap: tl.float64,
    ignore_index: tl.int64,
    HAS_SOFTCAP: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    acc_dtype = lse_ptr.dtype.element_ty
    row = (tl.program_id(0) // tiles).to(tl.int64)
    column = (tl.program_id(0) % tiles) * BLOCK_V + tl.arange(0, BLOCK_V)
    inv_temp = as_scalar(inv_temperature, acc_dtype)
    cap = as_scalar(softcap, acc_dtype)
    low, high = row_range(vocab_range_ptr, row, vocab)
    inside = (column >= low) & (column < high)

    # total: what the row's targets send back in all; hits: to each column.
    total = tl.zeros([], acc_dtype)
    hits = tl.zeros([BLOCK_V], acc_dtype)
    asked = tl.zeros([], tl.int32)
    if order_ptr is None:
        token = tl.load(token_ids_ptr + row)
        valid = (token != ignore_index) & (token >= low) & (token < high)
        total = tl.where(valid, tl.load(dlogprobs_ptr + row), 0.0)
        hits = tl.where(column == token, total, hits)
        asked += (total != 0).to(tl.int32)
    else:
        for index in range(tl.load(first_ptr + row), tl.load(first_ptr + row + 1)):
            t = tl.load(order_ptr + index)
            token = tl.load(token_ids_ptr + t)
            valid = (token != ignore_index) & (token >= low) & (token < high)
            dlogprob = tl.where(valid, tl.load(dlogprobs_ptr + t), 0.0)
            total += dlogprob
            hits += tl.where(column == token, dlogprob, 0.0)
            asked += (dlogprob != 0).to(tl.int32)

    dentropy, entropy = total, total
    if dentropy_ptr is not None:
        dentropy, entropy = tl.load(dentropy_ptr + row), tl.load(entropy_ptr + row)
        asked += (dentropy != 0).to(tl.int32)
    # A row of which no gradient is asked is not read, and may hold anything.
    inside &= asked > 0
    x = tl.load(logits_ptr + row * stride_row + column, mask=inside, other=0.0).to(acc_dtype)
    lse = tl.load(lse_ptr + row)
    dx = logit_gradient(
        x,
        hits,
        total,
        lse,
        dentropy,
        entropy,
        inv_temp,
        cap,
        dentropy_ptr is not None,
        HAS_SOFTCAP,
    )
    dx = tl.where(inside, dx, 0.0).to(dlogits_ptr.dtype.element_ty)
    tl.store(dlogits_ptr + row * stride_dlogits_row + column, dx, mask=column < vocab)


def gather_logprobs_fwd(
    logits,
    token_ids,
    row_index,
    vocab_range,
    numbers,
    with_entropy,
    with_sum_squares,
):
    """Launcher; contract in `lvrpo.ops.gather_logprobs`."""
    temperature, softcap, ignore_index = numbers.tolist()
    logits = _with_unit_columns(logits)
    rows, vocab = logits.shape
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32

    def per_row(wanted=True):
        return logits.new_empty(rows if wanted else 0, dtype=dtype)

    lse, entropy, sum_squares = per_row(), per_row(with_entropy), per_row(with_sum_squares)
    row_max, log_sum = per_row(), per_row()
    scalars = {
        "stride_row": logits.stride(0),
        "inv_temperature": 1.0 / temperature,
        "softcap": softcap,
        "HAS_SOFTCAP": softcap > 0,
    }
    launch(
        _row_stats_kernel,
        (rows,),
        ROW_STATS,
        logits_ptr=logits,
        vocab_range_ptr=None if vocab_range is None else vocab_range.contiguous(),
        max_ptr=row_max,
        log_sum_ptr=log_sum,
        lse_ptr=lse,
        entropy_ptr=entropy if with_entropy else None,
        squares_ptr=sum_squares if with_sum_squares else None,
        vocab=vocab,
        **scalars,
    )
    tokens = token_ids.shape[0]
    logprobs = logits.new_empty(tokens, dtype=dtype)
    launch(
        _gather_kernel,
        (cdiv(tokens, GATHER.blocks["BLOCK_T"]),),
        GATHER,
        logits_ptr=logits,
        token_ids_ptr=token_ids.contiguous(),
        row_index_ptr=None if row_index is None else row_index.contiguous(),
        vocab_range_ptr=None if vocab_range is None else vocab_range.contiguous(),
        max_ptr=row_max,
        log_sum_ptr=log_sum,
        logprobs_ptr=logprobs,
        tokens=tokens,
        rows=rows,
        vocab=vocab,
        ignore_index=int(ignore_index),
        **scalars,
    )
    return logprobs, lse, entropy, sum_squares


def gather_logprobs_bwd(
    dlogits,
    dlogprobs,
    dentropy,
    logits,
    token_ids,
    row_index,
    vocab_range,
    lse,
    entropy,
    numbers,
):
    """Launcher; writes `dlogits`, which may be `logits` itself."""
    temperature, softcap, ignore_index = numbers.tolist()
    logits = _with_unit_columns(logits)
    rows, vocab = logits.shape
    order, first = None, None
    if row_index is not None:
        in_order, order = row_index.sort(stable=True)
        first = torch.searchsorted(in_order, torch.arange(rows + 1, device=logits.device))
    tiles = cdiv(vocab, DLOGITS.blocks["BLOCK_V"])
    launch(
        _dlogits_kernel,
        (rows * tiles,),
        DLOGITS,
        dlogits_ptr=dlogits,
        dlogprobs_ptr=dlogprobs.contiguous(),
        dentropy_ptr=None if dentropy is None else dentropy.contiguous(),
        logits_ptr=logits,
        token_ids_ptr=token_ids.contiguous(),
        order_ptr=order,
        first_ptr=first,
        vocab_range_ptr=None if vocab_range is None else vocab_range.contiguous(),
        lse_ptr=lse,
        entropy_ptr=entropy,
        vocab=vocab,
        tiles=tiles,
        stride_row=logits.stride(0),
        stride_dlogits_row=dlogits.stride(0),
        inv_temperature=1.0 / temperature,
        softcap=softcap,
        ignore_index=int(ignore_index),
        HAS_SOFTCAP=softcap > 0,
    )


def _with_unit_columns(logits):
    return logits if logits.stride(1) == 1 else logits.contiguous()
