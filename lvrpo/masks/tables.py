"""The tables of a packed buffer: who sees whom as integers, and what follows from them."""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from lvrpo.masks.host import move, on_the_host
from lvrpo.masks.layouts import Layout


class SpanColumn(enum.IntEnum):
    """Columns of `SpanTables.spans`; a slice is two of them, its begin and its end."""

    START = 0
    END = 1
    CAUSAL = 2
    RUN_BEGIN = 3
    RUN_END = 4
    ROW_BEGIN = 5
    ROW_END = 6
    FROZEN = 7
    INVARIANT = 8


class Schedule(NamedTuple):
    """Work items of the kernels, the heaviest first.

    Attributes:
        query_tiles: [N, 4] int32: a tile's slice of `SpanMask.rows` (begin, end), and its first and
            last span; -1 in padding. No tile crosses documents, so what a document's rows add up,
            and in which order, does not depend on what it is packed with.
        key_work: [M, 6] int32: a tile's keys (begin, end), the slice of `key_rows` (begin, end) to
            walk for it, which part of the rows that see the tile this is, and of how many parts.
            Keys of frozen spans, and those that nobody sees, are in no tile.
        key_rows: [R, 3] int32: slices of `rows` (begin, end), and the end of those at the beginning
            that no window keeps from any key of the tile.
        key_parts: [P, 6], the first rows of `key_work`: all that are parts, a tile's in order.
    """

    query_tiles: Tensor
    key_work: Tensor
    key_rows: Tensor
    key_parts: Tensor

    def to(self, device: torch.device) -> Schedule:
        """The same on `device`."""
        query_tiles, key_work, key_rows = (move(x, device) for x in self[:3])
        return Schedule(query_tiles, key_work, key_rows, key_work[: len(self.key_parts)])


@dataclasses.dataclass(frozen=True, eq=False)
class SpanTables:
    """The visibility of a packed buffer; see `SpanMask`, which has builders.

    Attributes:
        length: L, the rows of keys and values.
        q_lo, q_hi: [L] int32. Key k is seen by the buffer rows q_lo[k] <= q < q_hi[k]. q_lo never
            decreases; both are equal for a key that nobody sees (padding).
        rows: [Lq] int32, ascending: the buffer row of each query; every row unless selected.
        spans: [S, 9] int32, one span a row, with the columns of `SpanColumn`: first token, end,
            causal (0 or 1), its slice of `runs`, its slice of `rows`, frozen, invariant (0 or 1).
        runs: [N, 2] int32: maximal contiguous token ranges (begin, end), or one per ancestor if
            `invariant`. A span's slice lists all its ancestors' tokens, which every row of the span
            sees. Siblings share one slice.
        span_offsets: S + 1 token offsets: span s is the rows span_offsets[s]:span_offsets[s + 1].
        parents: S indices of the span that each one continues; -1 starts a document.
        modes: S times "causal" or "full".
        documents: offsets of the parts that never see each other; the last part may be padding.
        document_rows: the same boundaries as offsets into `rows`.
        frozen: indices of the spans whose keys and values get no gradient; see `freeze`.
        invariant: whether a span's bits do not depend on its siblings; see `packing_invariant`.
        window: of what `q_lo` and `q_hi` show, a query sees the keys whose position is less than
            `window` behind its own; None: all of them. See `with_window`.
        positions: [L] int32, `position_ids` of the buffer, only with a window.
        schedule: the order in which a GPU's kernels take the tiles; only after `to`.
        host: the mask as it was built on the host; only after `to` something else.
    """

    length: int
    q_lo: Tensor
    q_hi: Tensor
    rows: Tensor
    spans: Tensor
    runs: Tensor
    span_offsets: tuple[int, ...]
    parents: tuple[int, ...]
    modes: tuple[str, ...]
    documents: tuple[int, ...]
    document_rows: tuple[int, ...]
    frozen: tuple[int, ...] = ()
    invariant: bool = False
    window: int | None = None
    positions: Tensor | None = None
    schedule: Schedule | None = None
    host: SpanTables | None = dataclasses.field(default=None, repr=False)

    @property
    def num_queries(self) -> int:
        """Lq, the rows of q."""
        return self.rows.shape[0]

    @property
    def num_spans(self) -> int:
        """S."""
        return len(self.span_offsets) - 1

    def visible(self, queries: slice = slice(None), keys: slice = slice(None)) -> Tensor:
        """Bool [queries, keys]: a block of `to_dense()`."""
        row = self.rows[queries, None]
        sees = (self.q_lo[keys] <= row) & (row < self.q_hi[keys])
        if self.window is None or self.positions is None:
            return sees
        return sees & (self.positions[row] - self.positions[keys] < self.window)

    def frozen_keys(self) -> Tensor:
        """Bool [L]: whether a key is in a frozen span."""
        keys = self.span_offsets[-1]
        lengths = self.spans[:, SpanColumn.END] - self.spans[:, SpanColumn.START]
        is_frozen = self.spans[:, SpanColumn.FROZEN] != 0
        frozen = torch.repeat_interleave(is_frozen, lengths, output_size=keys)
        return torch.nn.functional.pad(frozen, (0, self.length - keys))


#: A change of tables keeps their class.
Tables = TypeVar("Tables", bound=SpanTables)


@on_the_host
def tables(layout: Layout) -> dict[str, Any]:
    """The fields of a `SpanMask`."""
    offsets = list(accumulate(layout.lengths, initial=0))
    subtree_ends = _subtree_ends(offsets, layout.parents)
    runs, run_slices = ancestor_runs(offsets, layout.parents)
    length = offsets[-1]
    edges = torch.tensor(offsets, dtype=torch.int32)
    starts, ends = edges[:-1], edges[1:]
    causal = torch.tensor([mode == "causal" for mode in layout.modes], dtype=torch.int32)
    slices = torch.tensor(run_slices, dtype=torch.int32).view(-1, 2)
    span_of = torch.repeat_interleave(edges.diff(), output_size=length)
    token = torch.arange(length, dtype=torch.int32)
    # A span without ancestor tokens shares nothing with what came before.
    roots = [
        start
        for (start, end), (first, last) in zip(pairwise(offsets), run_slices, strict=True)
        if first == last and end > start
    ]
    documents = (*roots, length) if roots else (0, 0)
    return {
        "length": length,
        "q_lo": torch.where(causal.bool()[span_of], token, starts[span_of]),
        "q_hi": torch.tensor(subtree_ends, dtype=torch.int32)[span_of],
        "rows": token,
        "spans": _span_table(starts, ends, causal, slices),
        "runs": torch.tensor(runs, dtype=torch.int32).view(-1, 2),
        "span_offsets": tuple(offsets),
        "parents": tuple(layout.parents),
        "modes": tuple(layout.modes),
        "documents": documents,
        "document_rows": documents,
    }


def _span_table(starts: Tensor, ends: Tensor, causal: Tensor, runs: Tensor) -> Tensor:
    """Every row of the buffer is a query, and no span is frozen or invariant."""
    begins, stops = runs.unbind(1)
    columns = {
        SpanColumn.START: starts,
        SpanColumn.END: ends,
        SpanColumn.CAUSAL: causal,
        SpanColumn.RUN_BEGIN: begins,
        SpanColumn.RUN_END: stops,
        SpanColumn.ROW_BEGIN: starts,
        SpanColumn.ROW_END: ends,
        SpanColumn.FROZEN: torch.zeros_like(starts),
        SpanColumn.INVARIANT: torch.zeros_like(starts),
    }
    return torch.stack([columns[column] for column in SpanColumn], dim=1)


def _subtree_ends(offsets: list[int], parents: Sequence[int]) -> list[int]:
    """Per span, the token after its last descendant; checks the order on the way."""
    ends = [offsets[-1]] * len(parents)
    path: list[int] = []
    for span, parent in enumerate(parents):
        if not -1 <= parent < span:
            raise ValueError(
                f"SpanMask: span {span} has parent {parent}, expected -1 or an earlier span"
            )
        while path and path[-1] != parent:
            ends[path.pop()] = offsets[span]
        if parent >= 0 and not path:
            raise ValueError(
                f"SpanMask: span {span} has parent {parent}, whose descendants ended before span "
                f"{span - 1}; spans must be in depth-first preorder (interleaved completions have "
                "to be permuted)"
            )
        path.append(span)
    return ends


def ancestor_runs(
    offsets: Sequence[int], parents: Sequence[int], *, merged: bool = True
) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """All ancestors' tokens as ranges, and each span's slice of them.

    Merged where they touch; or one range per ancestor, wherever it is.
    """
    runs: list[tuple[int, int]] = []
    slices: list[tuple[int, int]] = []
    of_children: dict[int, tuple[int, int]] = {-1: (0, 0)}
    for parent in parents:
        found = of_children.get(parent)
        if found is None:
            begin, end = slices[parent]
            path = runs[begin:end]
            start, stop = offsets[parent], offsets[parent + 1]
            if merged and path and path[-1][1] == start:
                path[-1] = (path[-1][0], stop)
            elif stop > start:
                path.append((start, stop))
            found = (len(runs), len(runs) + len(path))
            of_children[parent] = found
            runs += path
        slices.append(found)
    return runs, slices
