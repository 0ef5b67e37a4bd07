"""A SpanMask with other queries, other padding, or other promises; the layout stays."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from lvrpo.masks.host import check_on_host, host_ints, host_spans
from lvrpo.masks.positions import position_ids
from lvrpo.masks.tables import SpanColumn, SpanTables, Tables, ancestor_runs


def select_queries(mask: Tables, rows: Tensor | Sequence[int]) -> Tables:
    """See `SpanMask.select_queries`."""
    if isinstance(rows, Tensor):
        check_on_host("rows", rows, 1)
        chosen = rows.long().contiguous()
    else:
        chosen = torch.tensor(host_ints("rows", rows), dtype=torch.int64)
    if len(chosen):
        if not bool((chosen.diff() > 0).all()):
            raise ValueError("SpanMask: rows must be strictly ascending")
        first, last = int(chosen[0]), int(chosen[-1])
        if first < 0 or last >= mask.length:
            went = f"rows go from {first} to {last}"
            raise ValueError(f"SpanMask: {went}, expected [0, {mask.length})")
    edges = torch.searchsorted(chosen, torch.tensor(mask.span_offsets), out_int32=True)
    table = mask.spans.clone()
    table[:, SpanColumn.ROW_BEGIN], table[:, SpanColumn.ROW_END] = edges[:-1], edges[1:]
    document_rows = torch.searchsorted(chosen, torch.tensor(mask.documents))
    return dataclasses.replace(
        mask,
        rows=chosen.int(),
        spans=table,
        document_rows=tuple(document_rows.tolist()),
    )


def pad_to(mask: Tables, length: int) -> Tables:
    """See `SpanMask.pad_to`."""
    (length,) = host_ints("length", [length])
    extra = length - mask.length
    if extra < 0:
        raise ValueError(f"SpanMask: cannot pad {mask.length} rows to {length}")
    check_all_queries(mask, "pad the mask")
    if extra == 0:
        return mask
    nobody = mask.q_hi.new_full((extra,), mask.length)
    return dataclasses.replace(
        mask,
        length=length,
        q_lo=torch.cat([mask.q_lo, nobody]),
        q_hi=torch.cat([mask.q_hi, nobody]),
        rows=torch.arange(length, dtype=torch.int32),
        positions=None if mask.positions is None else pad(mask.positions, (0, extra)),
        documents=(*mask.documents, length),
        document_rows=(*mask.document_rows, length),
    )


def with_window(mask: Tables, window: int | None) -> Tables:
    """See `SpanMask.with_window`."""
    if window is not None:
        (window,) = host_ints("window", [window])
        if window < 1:
            raise ValueError(f"SpanMask: window is {window}, expected >= 1, or None for no window")
        positions = position_ids(mask).int()
        if bool((positions >= window).any()):
            return dataclasses.replace(mask, window=window, positions=positions)
    return dataclasses.replace(mask, window=None, positions=None) if mask.window else mask


def freeze(mask: Tables, spans: Sequence[int]) -> Tables:
    """See `SpanMask.freeze`."""
    frozen = sorted({*mask.frozen, *host_spans(spans, mask.num_spans)})
    table = mask.spans.clone()
    table[frozen, SpanColumn.FROZEN] = 1
    return dataclasses.replace(mask, spans=table, frozen=tuple(frozen))


def packing_invariant(mask: Tables) -> Tables:
    """See `SpanMask.packing_invariant`."""
    # Ranges that touch in one buffer need not in another, and kernels start anew with every range.
    runs, slices = ancestor_runs(mask.span_offsets, mask.parents, merged=False)
    table = mask.spans.clone()
    begins, ends = torch.tensor(slices, dtype=torch.int32).view(-1, 2).unbind(1)
    table[:, SpanColumn.RUN_BEGIN], table[:, SpanColumn.RUN_END] = begins, ends
    table[:, SpanColumn.INVARIANT] = 1
    runs_table = torch.tensor(runs, dtype=torch.int32).view(-1, 2)
    return dataclasses.replace(mask, spans=table, runs=runs_table, invariant=True)


def check_all_queries(mask: SpanTables, purpose: str) -> None:
    """Refuse a mask whose queries were selected."""
    if mask.num_queries != mask.length:
        raise ValueError(f"SpanMask: {purpose} before selecting its queries")
