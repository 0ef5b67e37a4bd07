"""The order in which a GPU's kernels take the tiles of a SpanMask, and how long columns are split.

Laid out on the host, so that no kernel has to search, sort or be waited for.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from lvrpo.masks.host import on_the_host
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
    key_work, parts = _key_work(mask)
    return Schedule(_query_tiles(mask), key_work, key_work[:parts])


def _query_tiles(mask: SpanTables) -> Tensor:
    edges, rows = torch.tensor(mask.document_rows), mask.rows.long()
    offsets = torch.tensor(mask.span_offsets)
    if mask.invariant:
        # The rows after the last span's are padding.
        edges = torch.cat([torch.searchsorted(rows, offsets), edges[-1:]])
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
    order = torch.argsort(keys, descending=True, stable=True)
    return torch.stack([begin, end, first, last], dim=1)[order].int()


def _key_work(mask: SpanTables) -> tuple[Tensor, int]:
    """`key_work`, and how many of its rows are parts."""
    begin, end = _cut(*_live_ranges(mask))
    keys = (begin[:, None] + torch.arange(TILE)).minimum(end[:, None] - 1)
    row_begin, row_end = mask.q_lo[begin].long(), mask.q_hi[keys].amax(1).long()
    if mask.num_queries != mask.length:
        row_begin, row_end = (
            torch.searchsorted(mask.rows.long(), row) for row in (row_begin, row_end)
        )
    rows = row_end - row_begin
    order = torch.argsort(rows, descending=True, stable=True)[: int((rows > 0).sum())]
    limit = max(ROWS, int(rows.sum()) // PARTS)
    parts = (rows[order] + limit - 1) // limit
    index, nth = _enumerate(parts)
    tile = order[index]
    row_begin = row_begin[tile] + limit * nth
    columns = begin[tile], end[tile], row_begin, (row_begin + limit).minimum(row_end[tile])
    parts = parts[index]
    return torch.stack([*columns, nth, parts], dim=1).int(), int((parts > 1).sum())


def _live_ranges(mask: SpanTables) -> tuple[Tensor, Tensor]:
    """Token ranges of one document each that hold all keys with a gradient: begins and ends."""
    begins: list[int] = []
    ends: list[int] = []
    frozen, roots = set(mask.frozen), set(mask.documents)
    for span, (start, end) in enumerate(pairwise(mask.span_offsets)):
        if span in frozen or start == end:
            continue
        if ends and ends[-1] == start and start not in roots:
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
