"""The order in which a GPU's kernels take the tiles of a SpanMask, and how long columns are split.

Laid out on the host, so that no kernel has to search, sort or be waited for.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from lvrpo.masks.host import on_the_host
from lvrpo.masks.positions import first_ids
from lvrpo.masks.tables import Schedule, SpanColumn, SpanTables

#: Rows or keys of a tile; a kernel with smaller tiles cuts them further.
TILE = 128
#: Rows that one program walks for a tile of keys, and programs that a buffer's tiles are split
#: into: a prompt's few tiles are most of the work, and whole they would leave most of a GPU idle;
#: in a long document there are enough of them, and every part costs memory for its sums.
ROWS, PARTS = 2048, 128


@on_the_host
def schedule(mask: SpanTables) -> Schedule:
    """The schedule of a mask that is on the host."""
    key_work, key_rows = _key_work(mask)
    parts = int((key_work[:, 5] > 1).sum())
    return Schedule(_query_tiles(mask), key_work, key_rows, key_work[:parts])


def _query_tiles(mask: SpanTables) -> Tensor:
    edges, rows = torch.tensor(mask.document_rows), mask.rows.long()
    offsets = torch.tensor(mask.span_offsets)
    if mask.invariant:
        # The rows after the last span's are padding.
        edges = torch.cat([torch.searchsorted(rows, offsets), edges[-1:]])
    edges = torch.cat([edges, _far_apart(mask, rows)]).sort().values
    begin, end = _cut(edges[:-1], edges[1:])
    first_row, last_row = rows[begin], rows[end - 1]
    first, last = (
        torch.searchsorted(offsets, row, right=True) - 1 for row in (first_row, last_row)
    )
    # Padding comes after the last span and sees nothing.
    first, last = (span.where(span < mask.num_spans, -1) for span in (first, last))
    spans = torch.cat([mask.spans, mask.spans.new_zeros(1, mask.spans.shape[1])])
    start, run_begin, run_end = (
        spans[first, column]
        for column in (SpanColumn.START, SpanColumn.RUN_BEGIN, SpanColumn.RUN_END)
    )
    stop, causal = (spans[last, column] for column in (SpanColumn.END, SpanColumn.CAUSAL))
    ancestors = torch.cat([mask.runs.new_zeros(1), mask.runs.diff(dim=1)[:, 0].cumsum(0)])
    keys = ancestors[run_end] - ancestors[run_begin]
    keys += torch.where(causal != 0, last_row + 1, stop) - start
    if mask.window is not None and mask.positions is not None:
        keys -= (mask.positions[first_row] - mask.window + 1).clamp(min=0)
    order = torch.argsort(keys, descending=True, stable=True)
    return torch.stack([begin, end, first, last], dim=1)[order].int()


def _far_apart(mask: SpanTables, rows: Tensor) -> Tensor:
    """Indices of rows too far from the row before for a tile: what one sees the other does not."""
    if mask.window is None or mask.positions is None:
        return rows.new_zeros(0)
    positions = mask.positions[rows]
    far = (rows.diff() > mask.window) | (positions.diff() < -mask.window)
    return far.nonzero()[:, 0] + 1


def _key_work(mask: SpanTables) -> tuple[Tensor, Tensor]:
    """`key_work` and `key_rows`."""
    begin, end = _cut(*_live_ranges(mask))
    tile, ranges = _rows_that_see(mask, begin, end)
    if mask.num_queries != mask.length:
        ranges = torch.searchsorted(mask.rows.long(), ranges)
    counts = ranges[:, 1] - ranges[:, 0]
    rows = counts.new_zeros(len(begin)).index_add_(0, tile, counts)
    order = torch.argsort(rows, descending=True, stable=True)
    begin, end, rows = begin[order], end[order], rows[order]
    rank = torch.argsort(order)[tile]
    heaviest = torch.argsort(rank, stable=True)
    limit = max(ROWS, int(rows.sum()) // PARTS)
    parts = (rows + limit - 1) // limit
    item, key_rows = _cut_ranges(rank[heaviest], ranges[heaviest], rows, limit)
    tile, nth = _enumerate(parts)
    slices = torch.searchsorted(item, torch.arange(len(tile) + 1))
    columns = begin[tile], end[tile], slices[:-1], slices[1:], nth, parts[tile]
    return torch.stack(columns, dim=1).int(), key_rows.int()


def _cut_ranges(tile: Tensor, ranges: Tensor, rows: Tensor, limit: int) -> tuple[Tensor, Tensor]:
    """Ranges of consecutive tiles, cut where one part of `limit` of a tile's rows meets the next.

    Returns:
        The index of the part, among those of all tiles, of each range; the ranges.
    """
    counts = ranges[:, 1] - ranges[:, 0]
    # How many rows of its tile come before a range, and in which parts the range is.
    before = counts.cumsum(0) - counts - (rows.cumsum(0) - rows)[tile]
    first, last = before // limit, (before + counts - 1) // limit
    index, nth = _enumerate((last - first + 1).where(counts > 0, 0))
    part, tile, ranges = first[index] + nth, tile[index], ranges[index]
    shift = ranges[:, 0] - before[index]
    begin = ranges[:, 0].maximum(part * limit + shift)
    end = ranges[:, 1].minimum((part + 1) * limit + shift)
    parts = (rows + limit - 1) // limit
    item = (parts.cumsum(0) - parts)[tile] + part
    return item, torch.stack([begin, end, ranges[:, 2]], dim=1)


def _rows_that_see(mask: SpanTables, begin: Tensor, end: Tensor) -> tuple[Tensor, Tensor]:
    """The tile of each range of rows that see keys of it, and the ranges as in `key_rows`."""
    keys = (begin[:, None] + torch.arange(TILE)).minimum(end[:, None] - 1)
    row_begin, row_end = mask.q_lo[begin].long(), mask.q_hi[keys].amax(1).long()
    if mask.window is None or mask.positions is None:
        return torch.arange(len(begin)), torch.stack([row_begin, row_end, row_end], dim=1)
    first = torch.bucketize(begin, torch.tensor(mask.span_offsets), right=True) - 1
    seen_until = mask.positions[keys].long() + mask.window
    bounds = row_begin, row_end, seen_until.amin(1), seen_until.amax(1), first
    near = _rows_near(mask, torch.stack(bounds, dim=1).tolist())
    found = torch.tensor(near, dtype=torch.int64).view(-1, 4)
    return found[:, 0], found[:, 1:].contiguous()


def _rows_near(mask: SpanTables, tiles: list[list[int]]) -> list[list[int]]:
    """Per range of rows: the tile, and a row of `key_rows`.

    Args:
        tiles: of each tile of keys, the rows (begin, end) that see it without a window, the first
            positions too far from one of its keys and from all of them, and its first span.
    """
    offsets, last = mask.span_offsets, list(range(mask.num_spans))
    positions = first_ids(mask, [end - start for start, end in pairwise(offsets)])
    for span in reversed(range(mask.num_spans)):
        if (parent := mask.parents[span]) >= 0:
            last[parent] = max(last[parent], last[span])
    ranges: list[list[int]] = []
    for tile, (row_begin, row_end, near, far, span) in enumerate(tiles):
        while span < mask.num_spans and offsets[span] < row_end:
            shift = offsets[span] - positions[span]
            begin, end = max(offsets[span], row_begin), min(offsets[span + 1], far + shift)
            inside = max(begin, min(end, near + shift))
            if begin < end:
                if ranges and ranges[-1] == [tile, ranges[-1][1], begin, begin]:
                    ranges[-1][2:] = end, inside
                else:
                    ranges.append([tile, begin, end, inside])
            # What descends from a span that ends beyond the window is beyond it.
            span = (span if offsets[span + 1] < far + shift else last[span]) + 1
    return ranges


def _live_ranges(mask: SpanTables) -> tuple[Tensor, Tensor]:
    """Token ranges of one document each that hold all keys with a gradient: begins and ends."""
    begins: list[int] = []
    ends: list[int] = []
    apart = {*mask.documents, *_far_apart(mask, torch.arange(mask.length)).tolist()}
    frozen = set(mask.frozen)
    for span, (start, end) in enumerate(pairwise(mask.span_offsets)):
        if span in frozen or start == end:
            continue
        if ends and ends[-1] == start and start not in apart:
            ends[-1] = end
        else:
            begins.append(start)
            ends.append(end)
    return torch.tensor(begins, dtype=torch.int64), torch.tensor(ends, dtype=torch.int64)


def _cut(begins: Tensor, ends: Tensor) -> tuple[Tensor, Tensor]:
    """Ranges as tiles of at most TILE: begins and ends."""
    index, nth = _enumerate((ends - begins + TILE - 1) // TILE)
    begin = begins[index] + TILE * nth
    return begin, (begin + TILE).minimum(ends[index])


def _enumerate(counts: Tensor) -> tuple[Tensor, Tensor]:
    """i counts[i] times, for every i, and 0, 1, ... counts[i] - 1 beside it."""
    index = torch.repeat_interleave(counts)
    return index, torch.arange(len(index)) - (counts.cumsum(0) - counts)[index]
