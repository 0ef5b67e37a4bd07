"""Spans from FlashMask's column-wise form: per key, the rows that do not see it."""

from __future__ import annotations

import torch
from torch import Tensor

from lvrpo.masks.host import check_on_host, on_the_host
from lvrpo.masks.layouts import Layout


@on_the_host
def flashmask_layout(indices: Tensor, causal: bool) -> tuple[Layout, int]:
    """The layout of the visible keys and the padded length; see `SpanMask.from_flashmask`."""
    q_lo, q_hi = _row_ranges(indices, causal)
    length = len(q_lo)
    visible = q_lo < q_hi
    live = int(visible.sum())
    _refuse_first(~visible[:live], "key {0} is seen by no row, which only trailing padding may be")
    q_lo, q_hi = q_lo[:live], q_hi[:live]
    token = torch.arange(live)
    _refuse_first((q_lo > token) | (q_hi <= token), "key {0} is not seen by its own row")
    _refuse_first(q_hi > live, f"key {{0}} is seen by row {live}, which is padding")
    # Of a full span, all keys but the first are seen by earlier rows too: from its first row on.
    joins = (q_lo < token)[1:]
    _refuse_first(
        joins & (q_lo[1:] != q_lo[:-1]),
        "earlier rows see key {1}, and not the rows that see key {0}: full spans that overlap "
        "cannot be expressed; a sliding window is `with_window` of the mask without it",
    )
    other_end = q_hi[1:] != q_hi[:-1]
    _refuse_first(
        joins & other_end,
        "keys {0} and {1} of one full span are seen until different rows: a branch splits the span",
    )
    no = torch.zeros(min(live, 1), dtype=torch.bool)
    joined, opens = torch.cat([no, joins]), torch.cat([joins, no])
    opens &= ~joined
    starts_here = ~joined
    starts_here[1:] &= other_end | joined[:-1] | opens[1:]
    starts = starts_here.nonzero()[:, 0]
    lengths = starts.diff(append=torch.tensor([live])).tolist()
    modes = ["full" if full else "causal" for full in opens[starts].tolist()]
    return Layout(lengths, _nesting(starts.tolist(), q_hi[starts].tolist()), modes), length


def _nesting(starts: list[int], ends: list[int]) -> list[int]:
    """Parents of spans that are seen from their own start until `ends`."""
    parents: list[int] = []
    path: list[int] = []
    for span, (start, end) in enumerate(zip(starts, ends, strict=True)):
        while path and ends[path[-1]] <= start:
            path.pop()
        if path and end > ends[path[-1]]:
            outer = path[-1]
            raise ValueError(
                f"SpanMask: key {starts[outer]} is seen until row {ends[outer]}, key {start} until "
                f"row {end}; ranges that overlap without nesting, as of interleaved completions, "
                "cannot be expressed; a sliding window is `with_window` of the mask without it"
            )
        parents.append(path[-1] if path else -1)
        path.append(span)
    return parents


def _row_ranges(indices: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
    """q_lo and q_hi of every key, [L] int64."""
    check_on_host("startend_row_indices", indices, 4)
    batch, heads, length, bounds = indices.shape
    if batch != 1:
        raise ValueError(f"SpanMask: startend_row_indices has a batch of {batch}, expected 1")
    if heads > 1 and not torch.equal(indices, indices[:, :1].expand_as(indices)):
        raise ValueError(
            "SpanMask: startend_row_indices differs by head; masks per head cannot be expressed"
        )
    if bounds not in ((1, 2) if causal else (2, 4)):
        raise ValueError(
            f"SpanMask: startend_row_indices has {bounds} bounds per key, expected "
            f"{'1 or 2' if causal else '2 or 4'} with causal={causal}"
        )
    columns = indices[0, 0].long().clamp(0, length).unbind(-1)
    q_lo = torch.arange(length) if causal else columns[-1]
    if not causal and bounds == 4:
        _refuse_first(
            (columns[2] > 0) & (columns[2] < q_lo),
            "key {0} is also seen before its upper hidden rows; a key that two ranges of rows see "
            "cannot be expressed",
        )
        q_lo = torch.where(columns[2] < q_lo, q_lo, 0)
    q_hi = columns[0]
    if bounds == (2 if causal else 4):
        hides = (q_hi < columns[1]) & (columns[1] > q_lo)
        _refuse_first(
            hides & (columns[1] < length),
            "key {0} is seen again after its lower hidden rows; a key that two ranges of rows see "
            "cannot be expressed",
        )
        q_hi = torch.where(hides, q_hi, length)
    return q_lo, q_hi


def _refuse_first(wrong: Tensor, message: str) -> None:
    """Raise for the first True at i; {0} and {1} in the message are i and i + 1."""
    if bool(wrong.any()):
        at = int(wrong.nonzero()[0])
        raise ValueError("SpanMask: " + message.format(at, at + 1))
