"""A SpanMask as tile decisions, as FlexAttention's BlockMask, and as row intervals."""

from __future__ import annotations

from enum import IntEnum
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import pad

from lvrpo.masks.host import on_the_host
from lvrpo.masks.tables import SpanTables, ancestor_runs

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask


class Tile(IntEnum):
    """What a tile of queries has to do with a tile of keys."""

    SKIP = 0  # no query sees a key
    PARTIAL = 1
    FULL = 2  # every query sees every key


def tile_bounds(mask: SpanTables, block: int) -> Tensor:
    """See `SpanMask.tile_bounds`."""
    _, block = _sides(block)
    count = -(-mask.length // block)
    # The last tile repeats the last key, which changes no minimum or maximum.
    keys = torch.arange(count * block, device=mask.q_lo.device).clamp(max=mask.length - 1)
    # A key that nobody sees keeps its tile from being full, and adds no row to those that see it.
    hi = mask.q_hi.where(mask.q_hi > mask.q_lo, 0)
    tiles = keys.view(count, block)
    lo, hi = mask.q_lo[tiles], hi[tiles]
    bounds = torch.stack([lo.amin(1), lo.amax(1), hi.amin(1), hi.amax(1)], dim=1)
    if mask.num_queries == mask.length:
        return bounds
    return torch.searchsorted(mask.rows, bounds, out_int32=True)


def tiles(mask: SpanTables, block: int | tuple[int, int]) -> Tensor:
    """See `SpanMask.tiles`."""
    block_q, block_k = _sides(block)
    lo_min, lo_max, hi_min, hi_max = tile_bounds(mask, block_k).unbind(1)
    begin = torch.arange(0, mask.num_queries, block_q, device=mask.q_lo.device)[:, None]
    end = (begin + block_q).clamp(max=mask.num_queries)
    skip = begin.maximum(lo_min) >= end.minimum(hi_max)
    full = (begin >= lo_max) & (end <= hi_min)
    return torch.where(skip, Tile.SKIP, torch.where(full, Tile.FULL, Tile.PARTIAL)).to(torch.int8)


def block_mask(mask: SpanTables, block: int | tuple[int, int]) -> BlockMask:
    """See `SpanMask.to_block_mask`."""
    from torch.nn.attention.flex_attention import BlockMask

    block_q, block_k = _sides(block)
    kinds = tiles(mask, block)
    # As torch builds it: a tile that sticks out of the buffer is never full.
    if mask.num_queries % block_q:
        kinds[-1].clamp_(max=Tile.PARTIAL)
    if mask.length % block_k:
        kinds[:, -1].clamp_(max=Tile.PARTIAL)
    partial, full = (_block_lists(kinds == kind) for kind in (Tile.PARTIAL, Tile.FULL))
    # Kernels may ask about positions up to the end of the last tile: nobody is there.
    beyond_k = (0, -mask.length % block_k)
    q_lo, q_hi = pad(mask.q_lo, beyond_k, value=mask.length), pad(mask.q_hi, beyond_k)
    rows = pad(mask.rows, (0, -mask.num_queries % block_q), value=mask.length)

    def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (q_lo[key] <= query) & (query < q_hi[key])

    def row_sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return sees(batch, head, rows[query], key)

    return BlockMask.from_kv_blocks(
        *partial,
        *full,
        BLOCK_SIZE=(block_q, block_k),
        mask_mod=sees if mask.num_queries == mask.length else row_sees,
        seq_lengths=(mask.num_queries, mask.length),
    )


@on_the_host
def row_intervals(mask: SpanTables) -> Tensor:
    """See `SpanMask.to_row_intervals`."""
    # From the host's copy of the layout: how many ranges there are must not be read from a device.
    runs, slices = ancestor_runs(mask.span_offsets, mask.parents)
    ranges: list[list[tuple[int, int]]] = []
    for (first, last), (start, end) in zip(slices, pairwise(mask.span_offsets), strict=True):
        path = runs[first:last]
        begin = path.pop()[0] if path and path[-1][1] == start else start
        ranges.append([*path, (begin, end)] if start < end else [])
    most = max([1, *map(len, ranges)])
    nothing = (mask.length, mask.length)
    # Padding comes after the last span and looks up the row of `nothing` that is added here.
    of_span = torch.tensor([path + [nothing] * (most - len(path)) for path in [*ranges, []]])
    causal = torch.tensor([mode == "causal" for mode in [*mask.modes, "full"]])
    edges = torch.tensor(mask.span_offsets, dtype=torch.int32)
    of_span, causal, edges = (table.to(mask.rows.device) for table in (of_span, causal, edges))
    spans = torch.searchsorted(edges, mask.rows, right=True) - 1
    ends = torch.where(causal[spans], mask.rows + 1, mask.length)
    return of_span[spans].minimum(ends[:, None, None]).int()


def _block_lists(chosen: Tensor) -> tuple[Tensor, Tensor]:
    """How many blocks each row of blocks has, and which: those first, then the others."""
    order = chosen.int().argsort(dim=1, descending=True, stable=True)
    return chosen.sum(1, dtype=torch.int32)[None, None], order.int()[None, None]


def _sides(block: int | tuple[int, int]) -> tuple[int, int]:
    queries, keys = (block, block) if isinstance(block, int) else block
    if queries < 1 or keys < 1:
        raise ValueError(f"SpanMask: block is {block}, expected >= 1")
    return queries, keys
