"""dq of packed attention by query tiles. Scores are formed again from q, k and the log-sum-exp."""

import triton
import triton.language as tl

from lvrpo.kernels._attention_tiles import (
    load_queries,
    load_tile,
    over_keys,
    scheduled_queries,
    score_gradient,
    scores,
    visible,
)
from lvrpo.kernels._primitives import LOG2E, as_scalar


@triton.jit(do_not_specialize=["queries"])
def row_terms_kernel(
    dout_ptr,  # [Lq, Hq, Dv]
    out_ptr,  # [Lq, Hq, Dv]
    lse_ptr,  # [Lq, Hq], nats
    dlse_ptr,  # [Lq, Hq] or None
    bits_ptr,  # [Hq, Lq], lse in bits; inf where nothing is seen or nothing is used: p is 0
    delta_ptr,  # [Hq, Lq], sum of dout * out, less dlse
    queries,
    heads,
    V_WIDTH: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_Q: tl.constexpr,
):
    first = tl.program_id(0).to(tl.int64) * BLOCK_Q
    count = queries.to(tl.int64) * heads
    index = first + tl.arange(0, BLOCK_Q)
    inside = index < count
    lse = tl.load(lse_ptr + index, mask=inside, other=0.0)
    dout = load_tile(dout_ptr, first, count, V_WIDTH, True, BLOCK_Q, V_WIDTH, BLOCK_DV)
    out = load_tile(out_ptr, first, count, V_WIDTH, True, BLOCK_Q, V_WIDTH, BLOCK_DV)
    delta = tl.sum(dout.to(lse.dtype) * out.to(lse.dtype), axis=1)
    unused = tl.sum(tl.abs(dout.to(lse.dtype)), axis=1) == 0.0
    if dlse_ptr is not None:
        dlse = tl.load(dlse_ptr + index, mask=inside, other=0.0)
        delta -= dlse
        unused &= dlse == 0.0
    # By head: the other kernels read consecutive rows of one.
    place = index % heads * queries + index // heads
    bits = tl.where(unused | (lse == float("-inf")), float("inf"), lse * LOG2E)
    tl.store(bits_ptr + place, bits, mask=inside)
    tl.store(delta_ptr + place, tl.where(unused, 0.0, delta), mask=inside)


@triton.jit
def _dq_tile(
    dq,
    queries,
    seen_by,
    key,
    end,
    source,
    scale,
    softcap,
    MASKED: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDTH: tl.constexpr,
    V_WIDTH: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """dq / scale of a query tile after one more key tile."""
    q, dout, bits, delta = queries
    k_ptr, stride_k, v_ptr, stride_v, bounds = source
    k = load_tile(k_ptr, key, end, stride_k, MASKED, BLOCK_K, WIDTH, BLOCK_D)
    v = load_tile(v_ptr, key, end, stride_v, MASKED, BLOCK_K, V_WIDTH, BLOCK_DV)
    z, t = scores(q, k, scale, softcap, HAS_SOFTCAP, PRECISION)
    dp = tl.dot(dout, tl.trans(v), input_precision=PRECISION, out_dtype=scale.dtype)
    _, ds = score_gradient(z, t, bits[:, None], dp, delta[:, None], HAS_SOFTCAP)
    if MASKED:
        sees = visible(bounds, key, end, seen_by, HAS_WINDOW, BLOCK_K)
        ds = tl.where(sees, ds, 0.0)
        # A row that sees such a key has a ds that is not finite.
        k = tl.where(tl.abs(k.to(scale.dtype)) < float("inf"), k, 0.0)
    return dq + tl.dot(ds.to(k.dtype), k, input_precision=PRECISION, out_dtype=scale.dtype)


@triton.jit(do_not_specialize=["queries", "window"])
def dq_kernel(
    dq_ptr,  # [Lq, Hq, D]
    dout_ptr,  # [Lq, Hq, Dv]
    q_ptr,  # [Lq, Hq, D]
    k_ptr,  # [L, Hkv, D]
    v_ptr,  # [L, Hkv, Dv]
    bits_ptr,  # [Hq, Lq]
    delta_ptr,  # [Hq, Lq]
    q_lo_ptr,  # [L]
    q_hi_ptr,  # [L]
    rows_ptr,  # [Lq]
    spans_ptr,  # [S, 9]
    runs_ptr,  # [N, 2]
    positions_ptr,  # [L] or None
    query_tiles_ptr,  # [tiles, 4]
    queries,
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
    window,
    HAS_WINDOW: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDTH: tl.constexpr,
    V_WIDTH: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    acc_dtype = bits_ptr.dtype.element_ty
    scale = as_scalar(scale, acc_dtype)
    softcap = as_scalar(softcap, acc_dtype)
    head = tl.program_id(0) % heads
    first, queries_end, span, last_span = scheduled_queries(
        query_tiles_ptr, tl.program_id(0) // heads, BLOCK_Q
    )
    if first >= queries_end:
        return
    index = first + tl.arange(0, BLOCK_Q)
    inside = index < queries_end
    bounds = (q_lo_ptr, q_hi_ptr, positions_ptr, window)
    seen_by = load_queries(rows_ptr, bounds, index, inside, HAS_WINDOW)
    k_ptr += (head // heads_per_kv).to(tl.int64) * stride_k_head
    v_ptr += (head // heads_per_kv).to(tl.int64) * stride_v_head
    q_ptr += head.to(tl.int64) * stride_q_head
    q = load_tile(q_ptr, first, queries_end, stride_q, True, BLOCK_Q, WIDTH, BLOCK_D)
    dout_ptr += head.to(tl.int64) * V_WIDTH
    stride_dout = heads * V_WIDTH
    dout = load_tile(dout_ptr, first, queries_end, stride_dout, True, BLOCK_Q, V_WIDTH, BLOCK_DV)
    place = head.to(tl.int64) * queries + index
    bits = tl.load(bits_ptr + place, mask=inside, other=float("inf"))
    delta = tl.load(delta_ptr + place, mask=inside, other=0.0)
    dq = tl.zeros([BLOCK_Q, BLOCK_D], acc_dtype)

    source = (k_ptr, stride_k, v_ptr, stride_v, bounds)
    dq = over_keys(
        _dq_tile, dq, (q, dout, bits, delta), seen_by, source, (rows_ptr, spans_ptr, runs_ptr),
        first, queries_end, (span, last_span), scale, softcap, HAS_WINDOW,
        HAS_SOFTCAP, PRECISION, WIDTH, V_WIDTH, BLOCK_D, BLOCK_DV, BLOCK_K,
    )  # fmt: skip

    # A row whose results nobody uses may have seen NaN.
    dq = tl.where((bits == float("inf"))[:, None], 0.0, dq)
    column = tl.arange(0, BLOCK_D)
    place = index.to(tl.int64) * heads + head
    tl.store(
        dq_ptr + place[:, None] * WIDTH + column[None, :],
        (dq * scale).to(dq_ptr.dtype.element_ty),
        mask=inside[:, None] & (column < WIDTH)[None, :],
    )
