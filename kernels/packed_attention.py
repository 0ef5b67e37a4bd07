"""Attention over a SpanMask: the work of the visible pairs, and no [Lq, L] tensor.

A query tile walks its ancestors' token ranges and then its own stretch of the buffer; a key tile
walks one contiguous range of rows. Both walk what is wholly visible without a mask. Derivation:
docs/ops/packed_attention.md.
"""

import torch
import triton
import triton.language as tl

from lvrpo.kernels._attention_tiles import (
    first_after,
    load_tile,
    row_tile,
    score_gradient,
    scores,
    segment,
    visible,
)
from lvrpo.kernels._launch import LaunchConfig, architecture_of, cdiv, launch
from lvrpo.kernels._primitives import LN2, LOG2E, as_scalar


def _tiles(rows, keys, num_stages, num_warps=8):
    return LaunchConfig({"BLOCK_Q": rows, "BLOCK_K": keys}, num_warps, num_stages)


# By the widest head they hold: the largest tiles whose sums and factors stay in registers and whose
# operands fit into shared memory, on 9.0 with its products of operands in shared memory and before.
FORWARD = {
    80: {64: _tiles(128, 64, 2), 128: _tiles(128, 32, 2), 256: _tiles(64, 32, 1)},
    90: {64: _tiles(128, 64, 2), 128: _tiles(128, 64, 3), 256: _tiles(128, 32, 2)},
}
DQ = {
    80: {64: _tiles(128, 64, 2), 128: _tiles(64, 64, 1), 256: _tiles(32, 64, 1)},
    90: {64: _tiles(128, 64, 2), 128: _tiles(128, 64, 2), 256: _tiles(32, 64, 1)},
}
DKV = {
    80: {64: _tiles(32, 64, 2, 4), 128: _tiles(64, 64, 2), 256: _tiles(64, 32, 1)},
    90: {64: _tiles(64, 128, 2), 128: _tiles(64, 64, 2), 256: _tiles(64, 32, 1)},
}
# fp32 and fp64 go without tensor cores.
WIDE = _tiles(32, 32, 1)
DELTA = LaunchConfig({"BLOCK_Q": 16}, num_warps=4, num_stages=1)


@triton.jit
def _attend(
    state,
    q,
    row,
    key,
    end,
    k_ptr,
    v_ptr,
    q_lo_ptr,
    q_hi_ptr,
    stride_k,
    stride_v,
    scale,
    softcap,
    MASKED: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDTH: tl.constexpr,
    V_WIDTH: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """The state (out, maximum, sum) of a query tile after one more key tile."""
    out, row_max, row_sum = state
    k = load_tile(k_ptr, key, end, stride_k, MASKED, BLOCK_K, WIDTH, BLOCK_D)
    z, _ = scores(q, k, scale, softcap, HAS_SOFTCAP, PRECISION)
    if MASKED:
        sees = visible(q_lo_ptr, q_hi_ptr, key, end, row, BLOCK_K)
        z = tl.where(sees, z, float("-inf"))
    new_max = tl.maximum(row_max, tl.max(z, axis=1))
    # A row may see nothing yet; any finite base keeps -inf - base from being NaN.
    base = tl.where(new_max == float("-inf"), 0.0, new_max)
    p = tl.exp2(z - base[:, None])
    factor = tl.exp2(row_max - base)
    row_sum = factor * row_sum + tl.sum(p, axis=1)
    v = load_tile(v_ptr, key, end, stride_v, MASKED, BLOCK_K, V_WIDTH, BLOCK_DV)
    if MASKED:
        # Keys that nobody sees may be memory that nobody wrote: 0 * NaN is NaN.
        seen = tl.max(sees.to(tl.int32), axis=0) > 0
        v = tl.where(seen[:, None], v, 0.0)
    out = out * factor[:, None]
    out += tl.dot(p.to(v.dtype), v, input_precision=PRECISION, out_dtype=scale.dtype)
    return out, new_max, row_sum


@triton.jit(do_not_specialize=["queries", "num_spans"])
def _forward_kernel(
    q_ptr,  # [Lq, Hq, D]
    k_ptr,  # [L, Hkv, D]
    v_ptr,  # [L, Hkv, Dv]
    q_lo_ptr,  # [L]
    q_hi_ptr,  # [L]
    rows_ptr,  # [Lq]
    spans_ptr,  # [S, 7]
    runs_ptr,  # [N, 2]
    out_ptr,  # [Lq, Hq, Dv]
    lse_ptr,  # [Lq, Hq], nats
    queries,
    num_spans,
    heads,
    heads_per_kv,
    stride_q: tl.int32,
    stride_q_head: tl.int64,
    stride_k: tl.int32,
    stride_k_head: tl.int64,
    stride_v: tl.int32,
    stride_v_head: tl.int64,
    scale: tl.float64,
    softcap: tl.float64,
    HAS_SOFTCAP: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDTH: tl.constexpr,
    V_WIDTH: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    acc_dtype = lse_ptr.dtype.element_ty
    scale = as_scalar(scale, acc_dtype)
    softcap = as_scalar(softcap, acc_dtype)
    head = tl.program_id(0) % heads
    # Later rows see more keys: starting with them keeps the last programs short.
    first = (tl.num_programs(0) // heads - 1 - tl.program_id(0) // heads) * BLOCK_Q
    index = first + tl.arange(0, BLOCK_Q)
    inside = index < queries
    row = tl.load(rows_ptr + index, mask=inside, other=-1)
    q_ptr += head.to(tl.int64) * stride_q_head
    k_ptr += (head // heads_per_kv).to(tl.int64) * stride_k_head
    v_ptr += (head // heads_per_kv).to(tl.int64) * stride_v_head
    q = load_tile(q_ptr, first, queries, stride_q, True, BLOCK_Q, WIDTH, BLOCK_D)
    out = tl.zeros([BLOCK_Q, BLOCK_DV], acc_dtype)
    row_max = tl.full([BLOCK_Q], float("-inf"), acc_dtype)
    row_sum = tl.zeros([BLOCK_Q], acc_dtype)
    state = (out, row_max, row_sum)

    span, start, stop, together = row_tile(rows_ptr, spans_ptr, queries, num_spans, first, BLOCK_Q)
    if span < num_spans:
        run_end = tl.load(spans_ptr + 7 * span + 4)
        for run in range(tl.load(spans_ptr + 7 * span + 3), run_end + 1):
            begin, whole, end = segment(runs_ptr, run, run_end, start, stop, together, BLOCK_K)
            for key in range(begin, whole, BLOCK_K):
                state = _attend(
                    state, q, row, key, end, k_ptr, v_ptr,
                    q_lo_ptr, q_hi_ptr, stride_k, stride_v, scale, softcap, False, HAS_SOFTCAP,
                    PRECISION, WIDTH, V_WIDTH, BLOCK_D, BLOCK_DV, BLOCK_K,
                )  # fmt: skip
            for key in range(whole, end, BLOCK_K):
                state = _attend(
                    state, q, row, key, end, k_ptr, v_ptr,
                    q_lo_ptr, q_hi_ptr, stride_k, stride_v, scale, softcap, True, HAS_SOFTCAP,
                    PRECISION, WIDTH, V_WIDTH, BLOCK_D, BLOCK_DV, BLOCK_K,
                )  # fmt: skip

    out, row_max, row_sum = state
    blind = row_sum == 0
    out = out / tl.where(blind, 1.0, row_sum)[:, None]
    lse = tl.where(blind, float("-inf"), (row_max + tl.log2(row_sum)) * LN2)
    place = index.to(tl.int64) * heads + head
    tl.store(lse_ptr + place, lse, mask=inside)
    column = tl.arange(0, BLOCK_DV)
    tl.store(
        out_ptr + place[:, None] * V_WIDTH + column[None, :],
        out.to(out_ptr.dtype.element_ty),
        mask=inside[:, None] & (column < V_WIDTH)[None, :],
    )


@triton.jit(do_not_specialize=["count"])
def _delta_kernel(
    dout_ptr,  # [Lq, Hq, Dv]
    out_ptr,  # [Lq, Hq, Dv]
    dlse_ptr,  # [Lq, Hq] or None
    delta_ptr,  # [Lq, Hq], sum of dout * out, less dlse
    count,  # Lq * Hq
    V_WIDTH: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_Q: tl.constexpr,
):
    acc_dtype = delta_ptr.dtype.element_ty
    first = tl.program_id(0).to(tl.int64) * BLOCK_Q
    index = first + tl.arange(0, BLOCK_Q)
    inside = index < count
    dout = load_tile(dout_ptr, first, count, V_WIDTH, True, BLOCK_Q, V_WIDTH, BLOCK_DV)
    out = load_tile(out_ptr, first, count, V_WIDTH, True, BLOCK_Q, V_WIDTH, BLOCK_DV)
    delta = tl.sum(dout.to(acc_dtype) * out.to(acc_dtype), axis=1)
    if dlse_ptr is not None:
        delta -= tl.load(dlse_ptr + index, mask=inside, other=0.0)
    tl.store(delta_ptr + index, delta, mask=inside)


@triton.jit
def _dq_tile(
    dq,
    q,
    dout,
    lse,
    delta,
    row,
    key,
    end,
    k_ptr,
    v_ptr,
    q_lo_ptr,
    q_hi_ptr,
    stride_k,
    stride_v,
    scale,
    softcap,
    MASKED: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDTH: tl.constexpr,
    V_WIDTH: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """dq / scale of a query tile after one more key tile."""
    k = load_tile(k_ptr, key, end, stride_k, MASKED, BLOCK_K, WIDTH, BLOCK_D)
    v = load_tile(v_ptr, key, end, stride_v, MASKED, BLOCK_K, V_WIDTH, BLOCK_DV)
    z, t = scores(q, k, scale, softcap, HAS_SOFTCAP, PRECISION)
    dp = tl.dot(dout, tl.trans(v), input_precision=PRECISION, out_dtype=scale.dtype)
    _, ds = score_gradient(z, t, lse[:, None], dp, delta[:, None], HAS_SOFTCAP)
    if MASKED:
        sees = visible(q_lo_ptr, q_hi_ptr, key, end, row, BLOCK_K)
        ds = tl.where(sees, ds, 0.0)
        k = tl.where((tl.max(sees.to(tl.int32), axis=0) > 0)[:, None], k, 0.0)
    return dq + tl.dot(ds.to(k.dtype), k, input_precision=PRECISION, out_dtype=scale.dtype)


@triton.jit(do_not_specialize=["queries", "num_spans"])
def _dq_kernel(
    dq_ptr,  # [Lq, Hq, D]
    dout_ptr,  # [Lq, Hq, Dv]
    q_ptr,  # [Lq, Hq, D]
    k_ptr,  # [L, Hkv, D]
    v_ptr,  # [L, Hkv, Dv]
    lse_ptr,  # [Lq, Hq], nats
    delta_ptr,  # [Lq, Hq]
    q_lo_ptr,  # [L]
    q_hi_ptr,  # [L]
    rows_ptr,  # [Lq]
    spans_ptr,  # [S, 7]
    runs_ptr,  # [N, 2]
    queries,
    num_spans,
    heads,
    heads_per_kv,
    stride_q: tl.int32,
    stride_q_head: tl.int64,
    stride_k: tl.int32,
    stride_k_head: tl.int64,
    stride_v: tl.int32,
    stride_v_head: tl.int64,
    scale: tl.float64,
    softcap: tl.float64,
    HAS_SOFTCAP: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDTH: tl.constexpr,
    V_WIDTH: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    acc_dtype = lse_ptr.dtype.element_ty
    scale = as_scalar(scale, acc_dtype)
    softcap = as_scalar(softcap, acc_dtype)
    head = tl.program_id(0) % heads
    first = (tl.num_programs(0) // heads - 1 - tl.program_id(0) // heads) * BLOCK_Q
    index = first + tl.arange(0, BLOCK_Q)
    inside = index < queries
    row = tl.load(rows_ptr + index, mask=inside, other=-1)
    place = index.to(tl.int64) * heads + head
    k_ptr += (head // heads_per_kv).to(tl.int64) * stride_k_head
    v_ptr += (head // heads_per_kv).to(tl.int64) * stride_v_head
    q_ptr += head.to(tl.int64) * stride_q_head
    q = load_tile(q_ptr, first, queries, stride_q, True, BLOCK_Q, WIDTH, BLOCK_D)
    dout_ptr += head.to(tl.int64) * V_WIDTH
    dout = load_tile(dout_ptr, first, queries, heads * V_WIDTH, True, BLOCK_Q, V_WIDTH, BLOCK_DV)
    lse = tl.load(lse_ptr + place, mask=inside, other=float("inf")) * LOG2E
    lse = tl.where(lse == float("-inf"), float("inf"), lse)
    delta = tl.load(delta_ptr + place, mask=inside, other=0.0)
    dq = tl.zeros([BLOCK_Q, BLOCK_D], acc_dtype)

    span, start, stop, together = row_tile(rows_ptr, spans_ptr, queries, num_spans, first, BLOCK_Q)
    if span < num_spans:
        run_end = tl.load(spans_ptr + 7 * span + 4)
        for run in range(tl.load(spans_ptr + 7 * span + 3), run_end + 1):
            begin, whole, end = segment(runs_ptr, run, run_end, start, stop, together, BLOCK_K)
            for key in range(begin, whole, BLOCK_K):
                dq = _dq_tile(
                    dq, q, dout, lse, delta, row, key, end,
                    k_ptr, v_ptr, q_lo_ptr, q_hi_ptr, stride_k, stride_v, scale, softcap, False,
                    HAS_SOFTCAP, PRECISION, WIDTH, V_WIDTH, BLOCK_D, BLOCK_DV, BLOCK_K,
                )  # fmt: skip
            for key in range(whole, end, BLOCK_K):
                dq = _dq_tile(
                    dq, q, dout, lse, delta, row, key, end,
                    k_ptr, v_ptr, q_lo_ptr, q_hi_ptr, stride_k, stride_v, scale, softcap, True,
                    HAS_SOFTCAP, PRECISION, WIDTH, V_WIDTH, BLOCK_D, BLOCK_DV, BLOCK_K,
                )  # fmt: skip

    column = tl.arange(0, BLOCK_D)
    tl.store(
        dq_ptr + place[:, None] * WIDTH + column[None, :],
        (dq * scale).to(dq_ptr.dtype.element_ty),
        mask=inside[:, None] & (column < WIDTH)[None, :],
    )


@triton.jit
def _dkv_tile(
    dk,
    dv,
    k,
    v,
    lo,
    hi,
    first,
    end,
    head,
    heads,
    q_ptr,
    dout_ptr,
    lse_ptr,
    delta_ptr,
    rows_ptr,
    stride_q,
    stride_dout,
    scale,
    softcap,
    MASKED: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDTH: tl.constexpr,
    V_WIDTH: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_Q: tl.constexpr,
):
    """dk / scale and dv of a key tile after one more query tile."""
    index = first + tl.arange(0, BLOCK_Q)
    inside = index < end
    q = load_tile(q_ptr, first, end, stride_q, MASKED, BLOCK_Q, WIDTH, BLOCK_D)
    dout = load_tile(dout_ptr, first, end, stride_dout, MASKED, BLOCK_Q, V_WIDTH, BLOCK_DV)
    place = index.to(tl.int64) * heads + head
    # A row that sees nothing, or is none of ours, has probability 0 everywhere.
    lse = tl.load(lse_ptr + place, mask=inside, other=float("inf")) * LOG2E
    lse = tl.where(lse == float("-inf"), float("inf"), lse)
    delta = tl.load(delta_ptr + place, mask=inside, other=0.0)
    # Keys are the rows here, so that the products below take their left sides from registers.
    z, t = scores(k, q, scale, softcap, HAS_SOFTCAP, PRECISION)
    dp = tl.dot(v, tl.trans(dout), input_precision=PRECISION, out_dtype=scale.dtype)
    p, ds = score_gradient(z, t, lse[None, :], dp, delta[None, :], HAS_SOFTCAP)
    if MASKED:
        row = tl.load(rows_ptr + index, mask=inside, other=-1)
        sees = (lo[:, None] <= row[None, :]) & (row[None, :] < hi[:, None])
        p = tl.where(sees, p, 0.0)
        ds = tl.where(sees, ds, 0.0)
    dv += tl.dot(p.to(dout.dtype), dout, input_precision=PRECISION, out_dtype=scale.dtype)
    dk += tl.dot(ds.to(q.dtype), q, input_precision=PRECISION, out_dtype=scale.dtype)
    return dk, dv


@triton.jit(do_not_specialize=["queries", "keys"])
def _dkv_kernel(
    dk_ptr,  # [Hq / Hkv, L, Hkv, D]
    dv_ptr,  # [Hq / Hkv, L, Hkv, Dv]
    dout_ptr,  # [Lq, Hq, Dv]
    q_ptr,  # [Lq, Hq, D]
    k_ptr,  # [L, Hkv, D]
    v_ptr,  # [L, Hkv, Dv]
    lse_ptr,  # [Lq, Hq], nats
    delta_ptr,  # [Lq, Hq]
    q_lo_ptr,  # [L]
    q_hi_ptr,  # [L]
    rows_ptr,  # [Lq]
    queries,
    keys,
    heads,
    heads_per_kv,
    stride_q: tl.int32,
    stride_q_head: tl.int64,
    stride_k: tl.int32,
    stride_k_head: tl.int64,
    stride_v: tl.int32,
    stride_v_head: tl.int64,
    scale: tl.float64,
    softcap: tl.float64,
    SELECTED: tl.constexpr,  # whether some rows of the buffer are no queries
    HAS_SOFTCAP: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDTH: tl.constexpr,
    V_WIDTH: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    acc_dtype = lse_ptr.dtype.element_ty
    scale = as_scalar(scale, acc_dtype)
    softcap = as_scalar(softcap, acc_dtype)
    head = tl.program_id(0) % heads
    kv_head = head // heads_per_kv
    # Earlier keys are seen by more rows, prompts' above all: they come first.
    first_key = tl.program_id(0) // heads * BLOCK_K
    key = first_key + tl.arange(0, BLOCK_K)
    inside = key < keys
    k_ptr += kv_head.to(tl.int64) * stride_k_head
    v_ptr += kv_head.to(tl.int64) * stride_v_head
    k = load_tile(k_ptr, first_key, keys, stride_k, True, BLOCK_K, WIDTH, BLOCK_D)
    v = load_tile(v_ptr, first_key, keys, stride_v, True, BLOCK_K, V_WIDTH, BLOCK_DV)
    # Beyond the last key, an interval that changes neither bound of the tile.
    lo = tl.load(q_lo_ptr + tl.minimum(key, keys - 1))
    hi = tl.load(q_hi_ptr + tl.minimum(key, keys - 1))
    some_begin, all_begin = tl.min(lo, axis=0), tl.max(lo, axis=0)
    all_end, some_end = tl.min(hi, axis=0), tl.max(hi, axis=0)
    if SELECTED:
        some_begin = first_after(rows_ptr, 1, queries, some_begin - 1)
        all_begin = first_after(rows_ptr, 1, queries, all_begin - 1)
        all_end = first_after(rows_ptr, 1, queries, all_end - 1)
        some_end = first_after(rows_ptr, 1, queries, some_end - 1)
    # Rows [all_begin, all_end) see the whole tile, the others of [some_begin, some_end) a part.
    tiles = tl.maximum(all_end - all_begin, 0) // BLOCK_Q
    all_begin = tl.where(tiles > 0, all_begin, some_begin)
    whole = all_begin + tiles * BLOCK_Q

    dk = tl.zeros([BLOCK_K, BLOCK_D], acc_dtype)
    dv = tl.zeros([BLOCK_K, BLOCK_DV], acc_dtype)
    q_ptr += head.to(tl.int64) * stride_q_head
    dout_ptr += head.to(tl.int64) * V_WIDTH
    for first in range(some_begin, all_begin, BLOCK_Q):
        dk, dv = _dkv_tile(
            dk, dv, k, v, lo, hi, first, all_begin, head,
            heads, q_ptr, dout_ptr, lse_ptr, delta_ptr, rows_ptr, stride_q,
            heads * V_WIDTH, scale, softcap, True,
            HAS_SOFTCAP, PRECISION, WIDTH, V_WIDTH, BLOCK_D, BLOCK_DV, BLOCK_Q,
        )  # fmt: skip
    for first in range(all_begin, whole, BLOCK_Q):
        dk, dv = _dkv_tile(
            dk, dv, k, v, lo, hi, first, whole, head,
            heads, q_ptr, dout_ptr, lse_ptr, delta_ptr, rows_ptr, stride_q,
            heads * V_WIDTH, scale, softcap, False,
            HAS_SOFTCAP, PRECISION, WIDTH, V_WIDTH, BLOCK_D, BLOCK_DV, BLOCK_Q,
        )  # fmt: skip
    for first in range(whole, some_end, BLOCK_Q):
        dk, dv = _dkv_tile(
            dk, dv, k, v, lo, hi, first, some_end, head,
            heads, q_ptr, dout_ptr, lse_ptr, delta_ptr, rows_ptr, stride_q,
            heads * V_WIDTH, scale, softcap, True,
            HAS_SOFTCAP, PRECISION, WIDTH, V_WIDTH, BLOCK_D, BLOCK_DV, BLOCK_Q,
        )  # fmt: skip

    part = (head % heads_per_kv).to(tl.int64) * keys + key
    place = part * (heads // heads_per_kv) + kv_head
    column = tl.arange(0, BLOCK_D)
    tl.store(
        dk_ptr + place[:, None] * WIDTH + column[None, :],
        (dk * scale).to(dk_ptr.dtype.element_ty),
        mask=inside[:, None] & (column < WIDTH)[None, :],
    )
    column = tl.arange(0, BLOCK_DV)
    tl.store(
        dv_ptr + place[:, None] * V_WIDTH + column[None, :],
        dv.to(dv_ptr.dtype.element_ty),
        mask=inside[:, None] & (column < V_WIDTH)[None, :],
    )


def packed_attention_fwd(q, k, v, q_lo, q_hi, rows, spans, runs, scale, softcap):
    """Launcher; contract in `lvrpo.ops.packed_attention`."""
    q, k, v = (_with_unit_columns(x) for x in (q, k, v))
    queries, heads, _ = q.shape
    config = _config(FORWARD, q, v)
    out = q.new_empty(queries, heads, v.shape[2])
    lse = q.new_empty(queries, heads, dtype=_acc_dtype(q))
    launch(
        _forward_kernel,
        (cdiv(queries, config.blocks["BLOCK_Q"]) * heads,),
        config,
        q_ptr=q,
        k_ptr=k,
        v_ptr=v,
        q_lo_ptr=q_lo,
        q_hi_ptr=q_hi,
        rows_ptr=rows,
        spans_ptr=spans,
        runs_ptr=runs,
        out_ptr=out,
        lse_ptr=lse,
        queries=queries,
        num_spans=spans.shape[0],
        **_common(q, k, v, scale, softcap),
    )
    return out, lse


def packed_attention_bwd(
    dout, dlse, q, k, v, out, lse, q_lo, q_hi, rows, spans, runs, scale, softcap
):
    """Launcher; dk and dv are summed over the query heads of a key head in a fixed order."""
    q, k, v = (_with_unit_columns(x) for x in (q, k, v))
    dout = dout.contiguous()
    queries, heads, width = q.shape
    keys, kv_heads, v_width = v.shape
    of_dq, of_dkv = _config(DQ, q, v), _config(DKV, q, v)
    delta = torch.empty_like(lse)
    launch(
        _delta_kernel,
        (cdiv(queries * heads, DELTA.blocks["BLOCK_Q"]),),
        DELTA,
        dout_ptr=dout,
        out_ptr=out,
        dlse_ptr=None if dlse is None else dlse.contiguous(),
        delta_ptr=delta,
        count=queries * heads,
        V_WIDTH=v_width,
        BLOCK_DV=_block(v_width),
    )
    common = _common(q, k, v, scale, softcap)
    saved = {"dout_ptr": dout, "q_ptr": q, "k_ptr": k, "v_ptr": v, "lse_ptr": lse}
    saved |= {"delta_ptr": delta, "q_lo_ptr": q_lo, "q_hi_ptr": q_hi, "rows_ptr": rows}
    dq = q.new_empty(q.shape)
    launch(
        _dq_kernel,
        (cdiv(queries, of_dq.blocks["BLOCK_Q"]) * heads,),
        of_dq,
        dq_ptr=dq,
        **saved,
        spans_ptr=spans,
        runs_ptr=runs,
        queries=queries,
        num_spans=spans.shape[0],
        **common,
    )
    # One program per key tile and query head: a prompt's few tiles are most of the work, and with
    # one program per key head they would leave most of the GPU idle.
    parts = heads // kv_heads
    dtype = q.dtype if parts == 1 else lse.dtype
    dk = q.new_empty(parts, keys, kv_heads, width, dtype=dtype)
    dv = q.new_empty(parts, keys, kv_heads, v_width, dtype=dtype)
    launch(
        _dkv_kernel,
        (cdiv(keys, of_dkv.blocks["BLOCK_K"]) * heads,),
        of_dkv,
        dk_ptr=dk,
        dv_ptr=dv,
        **saved,
        queries=queries,
        keys=keys,
        SELECTED=queries != keys,
        **common,
    )
    if parts == 1:
        return dq, dk[0], dv[0]
    return dq, dk.sum(0).to(q.dtype), dv.sum(0).to(q.dtype)


def _config(table, q, v):
    if q.dtype.itemsize > 2:
        return WIDE
    configs = table[90 if architecture_of(q) == 90 else 80]
    width = max(q.shape[2], v.shape[2])
    return next(config for widest, config in configs.items() if width <= widest)


def _common(q, k, v, scale, softcap):
    """The arguments that all kernels over scores have."""
    return {
        "heads": q.shape[1],
        "heads_per_kv": q.shape[1] // k.shape[1],
        "stride_q": q.stride(0),
        "stride_q_head": q.stride(1),
        "stride_k": k.stride(0),
        "stride_k_head": k.stride(1),
        "stride_v": v.stride(0),
        "stride_v_head": v.stride(1),
        "scale": scale,
        "softcap": softcap,
        "HAS_SOFTCAP": softcap > 0,
        # Never TF32: an fp32 input asks for fp32 products.
        "PRECISION": "ieee",
        "WIDTH": q.shape[2],
        "V_WIDTH": v.shape[2],
        "BLOCK_D": _block(q.shape[2]),
        "BLOCK_DV": _block(v.shape[2]),
    }


def _block(width):
    """The tile that holds a head: a power of two, and what the tensor cores take at least."""
    return max(16, triton.next_power_of_2(width))


def _acc_dtype(x):
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _with_unit_columns(x):
    return x if x.stride(2) == 1 else x.contiguous()
