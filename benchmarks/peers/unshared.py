"""Attention without a way to share a prompt: every completion has a copy of it.

The copies are gathered from the packed buffer, and the rows of the first copy go back to it.
Gradients of the copies, each rounded as the attention returns it, add up in fp32.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from peers import sdpa
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from lvrpo.masks import SpanMask

Attention = Callable[[Tensor, Tensor, Tensor, SpanMask], Tensor]
#: attend(q, k, v, cu_q, cu_k, max_q, max_k, causal), of sequences without padding between them;
#: causal aligns the last query with the last key.
Varlen = Callable[..., Tensor]


class _Copies(torch.autograd.Function):
    """x[rows], of a gradient that is not rounded after every copy that is added to it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: Tensor) -> Tensor:
        ctx.save_for_backward(rows)
        ctx.length = len(x)
        return x.index_select(0, rows)

    @staticmethod
    def backward(ctx: Any, dcopies: Tensor) -> tuple[Tensor, None]:
        (rows,) = ctx.saved_tensors
        wide = dcopies.double() if dcopies.dtype == torch.float64 else dcopies.float()
        dx = wide.new_zeros(ctx.length, *wide.shape[1:]).index_add_(0, rows, wide)
        return dx.to(dcopies.dtype), None


def _copies(x: Tensor, rows: Tensor) -> Tensor:
    return _Copies.apply(x, rows)


class _Sequence(NamedTuple):
    """A prompt and one completion: its rows of the packed buffer, and the segments they form."""

    rows: Tensor
    #: (begin, end, causal) within `rows`. A query sees the segments before its own, and of its own
    #: all or, if causal, what is not after it. Causal spans that follow each other are one.
    segments: list[tuple[int, int, bool]]


def _sequences(mask: SpanMask) -> list[_Sequence]:
    found = []
    for leaf in sorted(set(range(mask.num_spans)) - set(mask.parents)):
        path = [leaf]
        while (parent := mask.parents[path[-1]]) >= 0:
            path.append(parent)
        rows, segments = [], [(0, 0, True)]
        for span in reversed(path):
            start, end = mask.span_offsets[span : span + 2]
            causal = mask.modes[span] == "causal"
            begin = segments.pop()[0] if causal and segments[-1][2] else segments[-1][1]
            rows.append(torch.arange(start, end))
            segments.append((begin, sum(map(len, rows)), causal))
        found.append(_Sequence(torch.cat(rows), [s for s in segments if s[0] < s[1]]))
    return found


def _first_copy(length: int, copies: Tensor) -> Tensor:
    """[length]: where each row is among the copies for the first time."""
    places = torch.arange(len(copies))
    return torch.full((length,), len(copies)).scatter_reduce_(0, copies, places, "amin")


class _Padded(NamedTuple):
    rows: Tensor  # [sequences * longest], 0 where there is none
    sequences: int
    visible: Tensor | None  # [sequences, 1, longest, longest]; None: all causal
    first_copy: Tensor  # [L]


@functools.lru_cache(maxsize=1)
def _padded(mask: SpanMask) -> _Padded:
    sequences = [found.rows for found in _sequences(mask)]
    device = mask.q_lo.device
    rows = pad_sequence(sequences, batch_first=True, padding_value=-1)
    real = rows >= 0
    places = real.flatten().nonzero()[:, 0]
    first_copy = places[_first_copy(mask.length, torch.cat(sequences))]
    rows, real = rows.clamp(min=0).to(device), real.to(device)
    visible = None
    if "full" in mask.modes:
        query = rows[:, :, None]
        visible = (mask.q_lo[rows][:, None] <= query) & (query < mask.q_hi[rows][:, None])
        visible &= real[:, None]
        # A row of padding sees itself, so that its softmax is one of something.
        visible |= torch.eye(rows.shape[1], dtype=torch.bool, device=device)
        visible = visible[:, None]
    return _Padded(rows.flatten(), len(sequences), visible, first_copy.to(device))


def padded(q: Tensor, k: Tensor, v: Tensor, mask: SpanMask) -> Tensor:
    """One padded batch row per completion; causal without a mask where there are no images."""
    rows, sequences, visible, first_copy = _padded(mask)
    q, k, v = (_copies(x, rows).unflatten(0, (sequences, -1)).transpose(1, 2) for x in (q, k, v))
    out = sdpa.causal(q, k, v) if visible is None else sdpa.masked(q, k, v, visible)
    return out.transpose(1, 2).flatten(0, 1).index_select(0, first_copy)


class _Call(NamedTuple):
    """The segments of one mode, each with all keys up to its end."""

    q_rows: Tensor
    k_rows: Tensor
    cu_q: Tensor
    cu_k: Tensor
    max_q: int
    max_k: int
    causal: bool


@functools.lru_cache(maxsize=1)
def _varlen_calls(mask: SpanMask) -> tuple[list[_Call], Tensor]:
    device = mask.q_lo.device
    calls, copies = [], []
    for causal in (True, False):
        chosen = [
            (found.rows[begin:end], found.rows[:end])
            for found in _sequences(mask)
            for begin, end, mode in found.segments
            if mode == causal
        ]
        if chosen:
            rows = [torch.cat(side) for side in zip(*chosen, strict=True)]
            lengths = [[len(x) for x in side] for side in zip(*chosen, strict=True)]
            offsets = [torch.tensor([0, *accumulate(x)], dtype=torch.int32) for x in lengths]
            tensors = (x.to(device) for x in (*rows, *offsets))
            calls.append(_Call(*tensors, *map(max, lengths), causal))
            copies.append(rows[0])
    return calls, _first_copy(mask.length, torch.cat(copies)).to(device)


def varlen(attend: Varlen) -> Attention:
    """Without padding: a call for all causal segments, and one for all images."""

    def run(q: Tensor, k: Tensor, v: Tensor, mask: SpanMask) -> Tensor:
        calls, first_copy = _varlen_calls(mask)
        outs = []
        for q_rows, k_rows, *lengths in calls:
            keys, values = _copies(k, k_rows), _copies(v, k_rows)
            outs.append(attend(_copies(q, q_rows), keys, values, *lengths))
        return torch.cat(outs).index_select(0, first_copy)

    return run
