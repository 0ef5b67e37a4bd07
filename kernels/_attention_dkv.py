"""dk and dv of packed attention by key tiles, without atomics.

A prompt's few tiles are seen by most rows: the schedule splits those into parts, whose sums a
second kernel adds in order.
"""

import triton
import triton.language as tl

from lvrpo.kernels._attention_tiles import TILE, first_after, load_tile, score_gradient, scores
from lvrpo.kernels._primitives import as_scalar


@triton.jit
def _dkv_tile(
    dk,
    dv,
    k,
    v,
    bounds,
    head,
    first,
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
    BLOCK_Q: tl.constexpr,
):
    """dk / scale and dv of a key tile after one more query tile of one head."""
    (
        q_ptr,
        stride_q,
        stride_q_head,
        dout_ptr,
        stride_dout,
        bits_ptr,
        delta_ptr,
        queries,
        rows_ptr,
        positions_ptr,
        window,
    ) = source
    lo, hi, position = bounds
    q_ptr += as_scalar(head, tl.int64) * stride_q_head
    dout_ptr += as_scalar(head, tl.int64) * V_WIDTH
    index = first + tl.arange(0, BLOCK_Q)
    inside = index < end
    q = load_tile(q_ptr, first, end, stride_q, MASKED, BLOCK_Q, WIDTH, BLOCK_D)
    dout = load_tile(dout_ptr, first, end, stride_dout, MASKED, BLOCK_Q, V_WIDTH, BLOCK_DV)
    # One 64-bit address and 32-bit offsets, as for the tiles; a 64-bit address for each of a few
    # numbers took more instructions than the products.
    place = as_scalar(head, tl.int64) * queries + first
    offset = tl.arange(0, BLOCK_Q)
    if MASKED:
        bits = tl.load(bits_ptr + place + offset, mask=inside, other=float("inf"))
        delta = tl.load(delta_ptr + place + offset, mask=inside, other=0.0)
    else:
        bits = tl.load(bits_ptr + place + offset)
        delta = tl.load(delta_ptr + place + offset)
    # Keys are the rows here, so that the products below take their left sides from registers.
    z, t = scores(k, q, scale, softcap, HAS_SOFTCAP, PRECISION)
    dp = tl.dot(v, tl.trans(dout), input_precision=PRECISION, out_dtype=scale.dtype)
    p, ds = score_gradient(z, t, bits[None, :], dp, delta[None, :], HAS_SOFTCAP)
    if MASKED:
        row = tl.load(rows_ptr + index, mask=inside, other=-1)
        sees = (lo[:, None] <= row[None, :]) & (row[None, :] < hi[:, None])
        if HAS_WINDOW:
            row_position = tl.load(positions_ptr + row, mask=inside, other=0)
            sees &= row_position[None, :] - position[:, None] < window
        p = tl.where(sees, p, 0.0)
        ds = tl.where(sees, ds, 0.0)
    dv += tl.dot(p.to(dout.dtype), dout, input_precision=PRECISION, out_dtype=scale.dtype)
    dk += tl.dot(ds.to(q.dtype), q, input_precision=PRECISION, out_dtype=scale.dtype)
    return dk, dv


@triton.jit
def _over_rows(
    dk,
    dv,
    k,
    v,
    bounds,
    seen_from,
    slice_ptr,
    first_head,
    heads_per_kv,
    source,
    scale,
    softcap,
    HAS_WINDOW: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDTH: tl.constexpr,
    V_WIDTH: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_Q: tl.constexpr,
):
    """dk / scale and dv of a key tile after one more slice of rows, of `key_rows`."""
    some_begin, all_begin, all_end, some_end = seen_from
    slice_begin, slice_end = tl.load(slice_ptr), tl.load(slice_ptr + 1)
    some_begin, some_end = tl.maximum(some_begin, slice_begin), tl.minimum(some_end, slice_end)
    near_end = tl.minimum(tl.load(slice_ptr + 2), slice_end)
    all_begin, all_end = tl.maximum(all_begin, slice_begin), tl.minimum(all_end, near_end)
    # Rows that see the whole tile, in tiles of their own; before and after them, rows that may not.
    whole = tl.maximum(all_end - all_begin, 0) // BLOCK_Q
    all_begin = tl.where(whole > 0, all_begin, some_begin)
    all_end = all_begin + whole * BLOCK_Q
    before = tl.cdiv(all_begin - some_begin, BLOCK_Q)
    masked = before + tl.cdiv(tl.maximum(some_end - all_end, 0), BLOCK_Q)

    # One loop over the heads and their tiles: its loads run ahead from one head into the next. A
    # head without tiles makes no step, but something may divide by their number all the same.
    per_head = tl.maximum(masked, 1)
    for step in range(heads_per_kv * masked):
        tile = step % per_head
        first = some_begin + tile * BLOCK_Q
        first = tl.where(tile < before, first, all_end + (tile - before) * BLOCK_Q)
        end = tl.where(tile < before, all_begin, some_end)
        dk, dv = _dkv_tile(
            dk, dv, k, v, bounds, first_head + step // per_head, first, end, source, scale,
            softcap, True, HAS_WINDOW, HAS_SOFTCAP, PRECISION, WIDTH, V_WIDTH, BLOCK_D, BLOCK_DV,
            BLOCK_Q,
        )  # fmt: skip
    per_head = tl.maximum(whole, 1)
    for step in range(heads_per_kv * whole):
        first = all_begin + step % per_head * BLOCK_Q
        dk, dv = _dkv_tile(
            dk, dv, k, v, bounds, first_head + step // per_head, first, all_end, source, scale,
            softcap, False, HAS_WINDOW, HAS_SOFTCAP, PRECISION, WIDTH, V_WIDTH, BLOCK_D, BLOCK_DV,
            BLOCK_Q,
        )  # fmt: skip
    return dk, dv


@triton.jit(do_not_specialize=["queries", "window"])
def dkv_kernel(
    dk_ptr,  # [L, Hkv, D], zeros
    dv_ptr,  # [L, Hkv, Dv], zeros
    dk_parts_ptr,  # [P * TILE, Hkv, D]
    dv_parts_ptr,  # [P * TILE, Hkv, Dv]
    dout_ptr,  # [Lq, Hq, Dv]
    q_ptr,  # [Lq, Hq, D]
    k_ptr,  # [L, Hkv, D]
    v_ptr,  # [L, Hkv, Dv]
    bits_ptr,  # [Hq, Lq], log-sum-exps in bits
    delta_ptr,  # [Hq, Lq]
    q_lo_ptr,  # [L]
    q_hi_ptr,  # [L]
    rows_ptr,  # [Lq]
    positions_ptr,  # [L] or None
    key_work_ptr,  # [items, 6]
    key_rows_ptr,  # [ranges, 3]
    queries,
    heads,
    kv_heads,
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
    SELECTED: tl.constexpr,  # whether some rows of the buffer are no queries
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
    kv_head = tl.program_id(0) % kv_heads
    program = tl.program_id(0) // kv_heads
    item = program // (TILE // BLOCK_K)
    offset = program % (TILE // BLOCK_K) * BLOCK_K
    work_ptr = key_work_ptr + 6 * item
    first_key = tl.load(work_ptr) + offset
    keys_end = tl.load(work_ptr + 1)
    if first_key >= keys_end:
        return
    key = first_key + tl.arange(0, BLOCK_K)
    inside = key < keys_end
    k_ptr += kv_head.to(tl.int64) * stride_k_head
    v_ptr += kv_head.to(tl.int64) * stride_v_head
    k = load_tile(k_ptr, first_key, keys_end, stride_k, True, BLOCK_K, WIDTH, BLOCK_D)
    v = load_tile(v_ptr, first_key, keys_end, stride_v, True, BLOCK_K, V_WIDTH, BLOCK_DV)
    # Keys that no used row sees may hold anything; if one does see them, NaN comes back below.
    k_finite = tl.abs(k.to(acc_dtype)) < float("inf")
    v_finite = tl.abs(v.to(acc_dtype)) < float("inf")
    broken = tl.min(k_finite.to(tl.int32), axis=1) + tl.min(v_finite.to(tl.int32), axis=1) < 2
    k, v = tl.where(k_finite, k, 0.0), tl.where(v_finite, v, 0.0)
    # Beyond the last key, an interval that changes neither bound of the tile.
    lo = tl.load(q_lo_ptr + tl.minimum(key, keys_end - 1))
    hi = tl.load(q_hi_ptr + tl.minimum(key, keys_end - 1))
    position = lo
    if HAS_WINDOW:
        position = tl.load(positions_ptr + tl.minimum(key, keys_end - 1))
    some_begin, all_begin = tl.min(lo, axis=0), tl.max(lo, axis=0)
    all_end, some_end = tl.min(hi, axis=0), tl.max(hi, axis=0)
    if SELECTED:
        some_begin = first_after(rows_ptr, 1, 0, queries, some_begin - 1)
        all_begin = first_after(rows_ptr, 1, 0, queries, all_begin - 1)
        all_end = first_after(rows_ptr, 1, 0, queries, all_end - 1)
        some_end = first_after(rows_ptr, 1, 0, queries, some_end - 1)

    dk = tl.zeros([BLOCK_K, BLOCK_D], acc_dtype)
    dv = tl.zeros([BLOCK_K, BLOCK_DV], acc_dtype)
    first_head = kv_head * heads_per_kv
    bounds = (lo, hi, position)
    source = (
        q_ptr, stride_q, stride_q_head, dout_ptr, heads * V_WIDTH, bits_ptr, delta_ptr, queries,
        rows_ptr, positions_ptr, window,
    )  # fmt: skip
    seen_from = (some_begin, all_begin, all_end, some_end)
    for slice in range(tl.load(work_ptr + 2), tl.load(work_ptr + 3)):
        dk, dv = _over_rows(
            dk, dv, k, v, bounds, seen_from, key_rows_ptr + 3 * slice, first_head, heads_per_kv,
            source, scale, softcap, HAS_WINDOW, HAS_SOFTCAP, PRECISION, WIDTH, V_WIDTH, BLOCK_D,
            BLOCK_DV, BLOCK_Q,
        )  # fmt: skip

    dk = tl.where(broken[:, None] & (dk != 0.0), float("nan"), dk)
    dv = tl.where(broken[:, None] & (dv != 0.0), float("nan"), dv)
    if tl.load(work_ptr + 5) > 1:
        slot = item.to(tl.int64) * TILE + offset
        _store(dk_parts_ptr, dk * scale, slot, kv_head, kv_heads, inside, WIDTH)
        _store(dv_parts_ptr, dv, slot, kv_head, kv_heads, inside, V_WIDTH)
    else:
        slot = first_key.to(tl.int64)
        _store(dk_ptr, dk * scale, slot, kv_head, kv_heads, inside, WIDTH)
        _store(dv_ptr, dv, slot, kv_head, kv_heads, inside, V_WIDTH)


@triton.jit
def _places(first, kv_head, kv_heads, inside, x, WIDTH: tl.constexpr):
    """Where the rows of a tile of keys from `first` are in [rows, Hkv, WIDTH], and which exist."""
    row, column = tl.arange(0, x.shape[0]), tl.arange(0, x.shape[1])
    place = ((first + row) * kv_heads + kv_head)[:, None] * WIDTH + column[None, :]
    return place, inside[:, None] & (column < WIDTH)[None, :]


@triton.jit
def _store(ptr, x, first, kv_head, kv_heads, inside, WIDTH: tl.constexpr):
    place, exists = _places(first, kv_head, kv_heads, inside, x, WIDTH)
    tl.store(ptr + place, x.to(ptr.dtype.element_ty), mask=exists)


@triton.jit
def _sum_parts(parts_ptr, x, first, parts, kv_head, kv_heads, inside, WIDTH: tl.constexpr):
    place, exists = _places(first, kv_head, kv_heads, inside, x, WIDTH)
    for part in range(parts):
        step = as_scalar(part, tl.int64) * TILE * kv_heads * WIDTH
        x += tl.load(parts_ptr + step + place, mask=exists, other=0.0)
    return x


@triton.jit
def sum_parts_kernel(
    dk_ptr,  # [L, Hkv, D]
    dv_ptr,  # [L, Hkv, Dv]
    dk_parts_ptr,  # [P * TILE, Hkv, D]
    dv_parts_ptr,  # [P * TILE, Hkv, Dv]
    key_parts_ptr,  # [P, 6]
    kv_heads,
    WIDTH: tl.constexpr,
    V_WIDTH: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    kv_head = tl.program_id(0) % kv_heads
    program = tl.program_id(0) // kv_heads
    item = program // (TILE // BLOCK_K)
    offset = program % (TILE // BLOCK_K) * BLOCK_K
    work_ptr = key_parts_ptr + 6 * item
    first_key = tl.load(work_ptr) + offset
    keys_end = tl.load(work_ptr + 1)
    # The first part's program adds up all of them.
    if tl.load(work_ptr + 4) > 0 or first_key >= keys_end:
        return
    acc_dtype = dk_parts_ptr.dtype.element_ty
    inside = first_key + tl.arange(0, BLOCK_K) < keys_end
    parts = tl.load(work_ptr + 5)
    slot, key = item.to(tl.int64) * TILE + offset, first_key.to(tl.int64)
    dk, dv = tl.zeros([BLOCK_K, BLOCK_D], acc_dtype), tl.zeros([BLOCK_K, BLOCK_DV], acc_dtype)
    dk = _sum_parts(dk_parts_ptr, dk, slot, parts, kv_head, kv_heads, inside, WIDTH)
    dv = _sum_parts(dv_parts_ptr, dv, slot, parts, kv_head, kv_heads, inside, V_WIDTH)
    _store(dk_ptr, dk, key, kv_head, kv_heads, inside, WIDTH)
    _store(dv_ptr, dv, key, kv_head, kv_heads, inside, V_WIDTH)
