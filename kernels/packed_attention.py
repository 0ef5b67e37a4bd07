"""Attention over a SpanMask: the work of the visible pairs, and no [Lq, L] tensor.

A query tile walks its ancestors' token ranges and then its own stretch of the buffer; a key tile
walks one contiguous range of rows. Both walk what is wholly visible without a mask. Derivation:
docs/ops/packed_attention.md.
"""

import torch
import triton
import triton.language as tl

from lvrpo.kernels._attention_dkv import dkv_kernel, sum_parts_kernel
from lvrpo.kernels._attention_dq import dq_kernel, row_terms_kernel
from lvrpo.kernels._attention_tiles import (
    TILE,
    load_queries,
    load_tile,
    over_keys,
    scheduled_queries,
    scores,
    visible,
)
from lvrpo.kernels._launch import LaunchConfig, architecture_of, cdiv, launch
from lvrpo.kernels._primitives import LN2, as_scalar


def _tiles(rows, keys, num_stages, num_warps=8):
    return LaunchConfig({"BLOCK_Q": rows, "BLOCK_K": keys}, num_warps, num_stages)


# By the widest head they hold: the largest tiles whose sums and factors stay in registers and whose
# operands fit into shared memory. 9.0 multiplies operands that are there; 8.6 stands for GPUs with
# no more than 99 KiB of it.
FORWARD = {
    80: {64: _tiles(128, 64, 2), 128: _tiles(128, 32, 2), 256: _tiles(64, 32, 1)},
    86: {64: _tiles(128, 64, 2), 128: _tiles(128, 32, 2), 256: _tiles(32, 32, 1, 4)},
    90: {64: _tiles(128, 64, 2), 128: _tiles(128, 64, 3), 256: _tiles(128, 32, 2)},
}
DQ = {
    80: {64: _tiles(128, 64, 2), 128: _tiles(64, 64, 1), 256: _tiles(32, 64, 1)},
    86: {64: _tiles(128, 64, 2), 128: _tiles(64, 64, 1), 256: _tiles(32, 32, 1, 4)},
    90: {64: _tiles(128, 64, 2), 128: _tiles(128, 64, 2), 256: _tiles(32, 64, 1)},
}
DKV = {
    80: {64: _tiles(32, 64, 2, 4), 128: _tiles(64, 64, 2), 256: _tiles(64, 32, 1)},
    86: {64: _tiles(32, 64, 2, 4), 128: _tiles(64, 64, 2), 256: _tiles(32, 32, 1, 4)},
    90: {64: _tiles(64, 128, 2), 128: _tiles(32, 128, 2), 256: _tiles(64, 32, 1)},
}
# fp32 and fp64 go without tensor cores.
WIDE = {
    torch.float32: {128: _tiles(32, 32, 1), 256: _tiles(16, 16, 1)},
    torch.float64: {64: _tiles(32, 16, 1), 128: _tiles(16, 16, 1)},
}
ROW_TERMS = LaunchConfig({"BLOCK_Q": 8}, num_warps=4, num_stages=1)
SUM = LaunchConfig({"BLOCK_K": 32}, num_warps=4, num_stages=1)


@triton.jit
def _attend(
    state,
    q,
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
    """The state (out, maximum, sum) of a query tile after one more key tile."""
    out, row_max, row_sum = state
    k_ptr, stride_k, v_ptr, stride_v, bounds = source
    k = load_tile(k_ptr, key, end, stride_k, MASKED, BLOCK_K, WIDTH, BLOCK_D)
    z, _ = scores(q, k, scale, softcap, HAS_SOFTCAP, PRECISION)
    if MASKED:
        sees = visible(bounds, key, end, seen_by, HAS_WINDOW, BLOCK_K)
        z = tl.where(sees, z, float("-inf"))
    new_max = tl.maximum(row_max, tl.max(z, axis=1))
    # A row may see nothing yet; any finite base keeps -inf - base from being NaN.
    base = tl.where(new_max == float("-inf"), 0.0, new_max)
    p = tl.exp2(z - base[:, None])
    factor = tl.exp2(row_max - base)
    row_sum = factor * row_sum + tl.sum(p, axis=1)
    v = load_tile(v_ptr, key, end, stride_v, MASKED, BLOCK_K, V_WIDTH, BLOCK_DV)
    if MASKED:
        # What a row does not see may hold anything, and 0 * NaN is NaN.
        finite = tl.abs(v.to(scale.dtype)) < float("inf")
        broken = tl.min(finite.to(tl.int32), axis=1) == 0
        p = tl.where(sees & broken[None, :], float("nan"), p)
        v = tl.where(finite, v, 0.0)
    out = out * factor[:, None]
    out += tl.dot(p.to(v.dtype), v, input_precision=PRECISION, out_dtype=scale.dtype)
    return out, new_max, row_sum


@triton.jit(do_not_specialize=["window"])
def _forward_kernel(
    q_ptr,  # [Lq, Hq, D]
    k_ptr,  # [L, Hkv, D]
    v_ptr,  # [L, Hkv, Dv]
    q_lo_ptr,  # [L]
    q_hi_ptr,  # [L]
    rows_ptr,  # [Lq]
    spans_ptr,  # [S, 9]
    runs_ptr,  # [N, 2]
    positions_ptr,  # [L] or None
    query_tiles_ptr,  # [tiles, 4]
    out_ptr,  # [Lq, Hq, Dv]
    lse_ptr,  # [Lq, Hq], nats
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
    acc_dtype = lse_ptr.dtype.element_ty
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
    q_ptr += head.to(tl.int64) * stride_q_head
    k_ptr += (head // heads_per_kv).to(tl.int64) * stride_k_head
    v_ptr += (head // heads_per_kv).to(tl.int64) * stride_v_head
    q = load_tile(q_ptr, first, queries_end, stride_q, True, BLOCK_Q, WIDTH, BLOCK_D)
    out = tl.zeros([BLOCK_Q, BLOCK_DV], acc_dtype)
    row_max = tl.full([BLOCK_Q], float("-inf"), acc_dtype)
    row_sum = tl.zeros([BLOCK_Q], acc_dtype)
    state = (out, row_max, row_sum)

    source = (k_ptr, stride_k, v_ptr, stride_v, bounds)
    state = over_keys(
        _attend, state, q, seen_by, source, (rows_ptr, spans_ptr, runs_ptr), first,
        queries_end, (span, last_span), scale, softcap, HAS_WINDOW,
        HAS_SOFTCAP, PRECISION, WIDTH, V_WIDTH, BLOCK_D, BLOCK_DV, BLOCK_K,
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


def packed_attention_fwd(q, k, v, q_lo, q_hi, rows, spans, runs, positions, query_tiles, numbers):
    """Launcher; contract in `lvrpo.ops.packed_attention`."""
    q, k, v = (_with_unit_columns(x) for x in (q, k, v))
    queries, heads, _ = q.shape
    config = _config(FORWARD, q, v)
    out = q.new_empty(queries, heads, v.shape[2])
    lse = q.new_empty(queries, heads, dtype=_acc_dtype(q))
    launch(
        _forward_kernel,
        (_programs(query_tiles, config.blocks["BLOCK_Q"]) * heads,),
        config,
        q_ptr=q,
        k_ptr=k,
        v_ptr=v,
        q_lo_ptr=q_lo,
        q_hi_ptr=q_hi,
        rows_ptr=rows,
        spans_ptr=spans,
        runs_ptr=runs,
        query_tiles_ptr=query_tiles,
        out_ptr=out,
        lse_ptr=lse,
        **_common(q, k, v, positions, numbers),
    )
    return out, lse


def packed_attention_bwd(
    dout, dlse, q, k, v, out, lse, q_lo, q_hi, rows, spans, runs, positions, query_tiles, key_work,
    key_rows, key_parts, numbers,
):  # fmt: skip
    """Launcher; every sum has a fixed order."""
    q, k, v = (_with_unit_columns(x) for x in (q, k, v))
    dout = dout.contiguous()
    bits, delta = _row_terms(dout, dlse, out, lse)
    # Rows whose results nobody uses may hold anything: their share of dk is 0 times these.
    q = q.masked_fill((bits == float("inf")).T[:, :, None], 0.0)
    common = _common(q, k, v, positions, numbers)
    common |= {"dout_ptr": dout, "q_ptr": q, "k_ptr": k, "v_ptr": v, "bits_ptr": bits}
    common |= {
        "queries": len(q),
        "delta_ptr": delta,
        "q_lo_ptr": q_lo,
        "q_hi_ptr": q_hi,
        "rows_ptr": rows,
    }
    config = _config(DQ, q, v)
    dq = q.new_empty(q.shape)
    launch(
        dq_kernel,
        (_programs(query_tiles, config.blocks["BLOCK_Q"]) * q.shape[1],),
        config,
        dq_ptr=dq,
        spans_ptr=spans,
        runs_ptr=runs,
        query_tiles_ptr=query_tiles,
        **common,
    )
    return dq, *_dk_dv(k, v, (key_work, key_rows, key_parts), common)


def _row_terms(dout, dlse, out, lse):
    queries, heads, v_width = out.shape
    bits, delta = lse.new_empty(heads, queries), lse.new_empty(heads, queries)
    launch(
        row_terms_kernel,
        (cdiv(lse.numel(), ROW_TERMS.blocks["BLOCK_Q"]),),
        ROW_TERMS,
        dout_ptr=dout,
        out_ptr=out,
        lse_ptr=lse,
        dlse_ptr=None if dlse is None else dlse.contiguous(),
        bits_ptr=bits,
        delta_ptr=delta,
        queries=queries,
        heads=heads,
        V_WIDTH=v_width,
        BLOCK_DV=_block(v_width),
    )
    return bits, delta


def _dk_dv(k, v, schedule, common):
    keys, kv_heads, _ = k.shape
    key_work, key_rows, key_parts = schedule
    # Zeros where no program writes: keys that are frozen, or that nobody sees.
    results = {"dk_ptr": k.new_zeros(k.shape), "dv_ptr": v.new_zeros(v.shape)}
    part = len(key_parts) * TILE.value, kv_heads
    parts = {
        f"{name}_parts_ptr": x.new_empty(*part, x.shape[2], dtype=_acc_dtype(x))
        for name, x in (("dk", k), ("dv", v))
    }
    config = _config(DKV, k, v)
    launch(
        dkv_kernel,
        (_programs(key_work, config.blocks["BLOCK_K"]) * kv_heads,),
        config,
        **results,
        **parts,
        key_work_ptr=key_work,
        key_rows_ptr=key_rows,
        kv_heads=kv_heads,
        SELECTED=common["queries"] != keys,
        **common,
    )
    launch(
        sum_parts_kernel,
        (_programs(key_parts, SUM.blocks["BLOCK_K"]) * kv_heads,),
        SUM,
        **results,
        **parts,
        key_parts_ptr=key_parts,
        kv_heads=kv_heads,
        **{name: common[name] for name in ("WIDTH", "V_WIDTH", "BLOCK_D", "BLOCK_DV")},
    )
    return tuple(results.values())


def _programs(table, block):
    """Programs for the tiles of a table of the schedule, per head."""
    return len(table) * (TILE.value // block)


def _config(table, q, v):
    architecture = architecture_of(q)
    if architecture in (86, 89, 120, 121):
        architecture = 86
    configs = WIDE.get(q.dtype) or table.get(architecture, table[80])
    width = max(q.shape[2], v.shape[2])
    return next(config for widest, config in configs.items() if width <= widest)


def _common(q, k, v, positions, numbers):
    """The arguments that all kernels over scores have."""
    scale, softcap, window = numbers.tolist()
    return {
        "positions_ptr": positions,
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
        "window": int(window),
        "HAS_WINDOW": positions is not None,
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
