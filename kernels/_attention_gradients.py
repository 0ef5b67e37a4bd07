"""Gradients of packed attention: dq by query tiles, dk and dv by key tiles, without atomics.

Scores are formed again from q, k and the log-sum-exp, once for each of the two.
"""

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
from lvrpo.kernels._primitives import LOG2E, as_scalar


@triton.jit(do_not_specialize=["count"])
def delta_kernel(
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
def dq_kernel(
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
def dkv_kernel(
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
