"""A SpanMask as tile decisions, as FlexAttention's BlockMask, and as row intervals."""

from __future__ import annotations

from collections.abc import Callable
from enum import IntEnum
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import pad

from lvrpo.masks.host import move, on_the_host
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
    if mask.window is not None:
        raise ValueError(
            f"SpanMask: under the window of {mask.window} the queries that see a tile of keys are "
            "no one range; ask `tiles`, or the mask without it (`with_window(None)`)"
        )
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
    begin = torch.arange(0, mask.num_queries, block_q, device=mask.q_lo.device)[:, None]
    end = (begin + block_q).clamp(max=mask.num_queries)
    if mask.window is None:
        lo_min, lo_max, hi_min, hi_max = tile_bounds(mask, block_k).unbind(1)
        skip = begin.maximum(lo_min) >= end.minimum(hi_max)
        full = (begin >= lo_max) & (end <= hi_min)
    else:
        pairs = _visible_pairs(mask, block_q, block_k)
        keys = torch.arange(0, mask.length, block_k, device=pairs.device)
        skip = pairs == 0
        full = pairs == (end - begin) * (mask.length - keys).clamp(max=block_k)
    return torch.where(skip, Tile.SKIP, torch.where(full, Tile.FULL, Tile.PARTIAL)).to(torch.int8)


def _visible_pairs(mask: SpanTables, block_q: int, block_k: int) -> Tensor:
    """[query tiles, key tiles] int64: how many pairs of a query and a key it sees a tile has."""
    ranges = row_intervals(mask).long()
    shape = -(-mask.num_queries // block_q), mask.length // block_k + 1
    tile = torch.arange(mask.num_queries, device=ranges.device)[:, None] // block_q * shape[1]
    whole, rest = ranges.new_zeros(2, shape[0] * shape[1]).unbind()
    # The keys before x are all those of the tiles before x // block_k, and some of that tile.
    for edge, sign in ((ranges[..., 1], 1), (ranges[..., 0], -1)):
        index = (tile + edge // block_k).flatten()
        whole.index_add_(0, index, torch.full_like(index, sign))
        rest.index_add_(0, index, sign * (edge % block_k).flatten())
    whole, rest = whole.view(shape), rest.view(shape)
    later = whole.flip(1).cumsum(1).flip(1) - whole
    return (rest + block_k * later)[:, : -(-mask.length // block_k)]


def block_mask(mask: SpanTables, block: int | tuple[int, int]) -> BlockMask:
    """See `SpanMask.to_block_mask`."""
    from torch.nn.attention.flex_attention import BlockMask, and_masks

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

    in_buffer: Callable[..., Tensor] = sees
    if mask.window is not None and mask.positions is not None:
        window, positions = mask.window, pad(mask.positions, (0, max(block_q, block_k)))

        def is_near(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return positions[query] - positions[key] < window

        in_buffer = and_masks(sees, is_near)

    def row_sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return in_buffer(batch, head, rows[query], key)

    return BlockMask.from_kv_blocks(
        *partial,
        *full,
        BLOCK_SIZE=(block_q, block_k),
        mask_mod=in_buffer if mask.num_queries == mask.length else row_sees,
        seq_lengths=(mask.num_queries, mask.length),
    )


@on_the_host
def row_intervals(mask: SpanTables) -> Tensor:
    """See `SpanMask.to_row_intervals`."""
    # On the host, whatever has the mask: how many ranges there are must not be read from a device.
    device, mask = mask.rows.device, mask.host or mask
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
    spans = torch.searchsorted(edges, mask.rows, right=True) - 1
    ends = torch.where(causal[spans], mask.rows + 1, mask.length)
    intervals = of_span[spans].minimum(ends[:, None, None]).int()
    if mask.window is not None and mask.positions is not None:
        intervals = _within_window(intervals, mask.rows, mask.positions, mask.window)
    return move(intervals, device)


def _within_window(ranges: Tensor, rows: Tensor, positions: Tensor, window: int) -> Tensor:
    """What is left of each query's ranges, along each of which positions count up."""
    begin, end = ranges.unbind(-1)
    # An empty range may begin where the buffer ends.
    first = torch.cat([positions, positions.new_zeros(1)])[begin]
    begin = (begin + (positions[rows, None] - window + 1 - first).clamp(min=0)).minimum(end)
    empty = begin == end
    order = empty.int().argsort(dim=1, stable=True)
    left = torch.stack([begin, end], dim=-1).where(~empty[..., None], end[:, -1:, None])
    left = left.gather(1, order[..., None].expand_as(left))
    return left[:, : max(1, int((~empty).sum(1).max())) if len(rows) else 1]


def flashmask_indices(mask: SpanTables) -> Tensor:
    """See `SpanMask.to_flashmask`."""
    if mask.window is None:
        return torch.stack([mask.q_hi, mask.q_lo], dim=1)[None, None]
    ranges, host = row_intervals(mask.host or mask).long(), mask.host or mask
    counts, sums = ranges.new_zeros(2, mask.length + 1).unbind()
    rows = host.rows.long()[:, None].expand(ranges.shape[:2]).flatten()
    for edge, sign in ((ranges[..., 0], 1), (ranges[..., 1], -1)):
        counts.index_add_(0, edge.flatten(), torch.full_like(rows, sign))
        sums.index_add_(0, edge.flatten(), sign * rows)
    counts, sums = (x.cumsum(0)[:-1] for x in (counts, sums))
    # Of all sets of so many rows from q_lo on, one without a gap has the smallest sum.
    gaps = sums != counts * host.q_lo + counts * (counts - 1) // 2
    if bool(gaps.any()):
        raise ValueError(
            f"SpanMask: under the window of {mask.window}, key {int(gaps.nonzero()[0])} is seen by "
            "rows with others between them, which FlashMask cannot express"
        )
    indices = torch.stack([host.q_lo + counts.int(), host.q_lo], dim=1)
    return move(indices[None, None], mask.q_lo.device)


def _block_lists(chosen: Tensor) -> tuple[Tensor, Tensor]:
    """How many blocks each row of blocks has, and which: those first, then the others."""
    order = chosen.int().argsort(dim=1, descending=True, stable=True)
    return chosen.sum(1, dtype=torch.int32)[None, None], order.int()[None, None]


def _sides(block: int | tuple[int, int]) -> tuple[int, int]:
    queries, keys = (block, block) if isinstance(block, int) else block
    if queries < 1 or keys < 1:
        raise ValueError(f"SpanMask: block is {block}, expected >= 1")
    return queries, keys
