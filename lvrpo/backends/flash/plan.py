"""A SpanMask as the sequences of at most two flash attention calls, with the rows to copy."""

from __future__ import annotations

import dataclasses
import functools
import weakref
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from lvrpo.masks import SpanMask
from lvrpo.masks.host import on_the_host
from lvrpo.masks.tables import ancestor_runs

Range = tuple[int, int]


class Block(NamedTuple):
    """Query rows that are one sequence: consecutive rows of q, and the keys they see."""

    rows: Range
    keys: list[Range]
    causal: bool


class Gather(NamedTuple):
    """Which rows a copy takes, and in reverse who took each row.

    Attributes:
        sources: [E] the row that each copied row is.
        copies: copied rows, by source row.
        offsets: [N + 1] source row n is copied to copies[offsets[n]:offsets[n + 1]].
    """

    sources: Tensor
    copies: Tensor
    offsets: Tensor


class Call(NamedTuple):
    """One varlen call: its part of the copied rows, and its sequences."""

    causal: bool
    rows: int
    keys: int
    cu_q: Tensor
    cu_k: Tensor
    max_q: int
    max_k: int


class Tables(NamedTuple):
    """What the calls need on the device; a `Gather` that changes nothing is None."""

    queries: Gather | None
    keys: Gather | None
    calls: list[Call]


@dataclasses.dataclass(frozen=True, eq=False)
class Plan:
    """How a mask becomes calls; built on the host, its tables on first use.

    Attributes:
        blocks: the sequences, causal ones first.
        expanded: E, how many keys they have together.
        num_queries: Lq.
        frozen: [L] bool, keys that get no gradient.
        aligned: whether the last row of every sequence is its last key, from which a window counts.
        device: of the tables.
    """

    blocks: list[Block]
    expanded: int
    num_queries: int
    frozen: Tensor
    aligned: bool
    device: torch.device

    @functools.cached_property
    @on_the_host
    def tables(self) -> Tables:
        """See `Tables`."""
        rows = _expand([block.rows for block in self.blocks])
        keys = _expand([keys for block in self.blocks for keys in block.keys])
        everyone = torch.zeros(self.num_queries, dtype=torch.bool)
        calls = [
            self._call(blocks)
            for causal in (True, False)
            if (blocks := [block for block in self.blocks if block.causal is causal])
        ]
        return Tables(self._gather(rows, everyone), self._gather(keys, self.frozen), calls)

    def _call(self, blocks: list[Block]) -> Call:
        rows = [end - begin for block in blocks for begin, end in [block.rows]]
        keys = [sum(end - begin for begin, end in block.keys) for block in blocks]
        cu_q, cu_k = (torch.tensor([0, *lengths]).cumsum(0).int() for lengths in (rows, keys))
        cu_q, cu_k = self._move(cu_q), self._move(cu_k)
        return Call(blocks[0].causal, sum(rows), sum(keys), cu_q, cu_k, max(rows), max(keys))

    def _gather(self, index: Tensor, frozen: Tensor) -> Gather | None:
        if torch.equal(index, torch.arange(len(frozen))) and not bool(frozen.any()):
            return None
        copies = index.argsort(stable=True)
        copies = copies[~frozen[index[copies]]]
        counts = torch.bincount(index, minlength=len(frozen)).masked_fill(frozen, 0)
        offsets = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
        return Gather(self._move(index), self._move(copies), self._move(offsets))

    def _move(self, table: Tensor) -> Tensor:
        return table.to(self.device, non_blocking=True)


#: A mask serves every layer of a model, and every step that has its layout.
_PLANS: weakref.WeakKeyDictionary[SpanMask, Plan] = weakref.WeakKeyDictionary()


@on_the_host
def plan_of(mask: SpanMask) -> Plan:
    """The plan of a mask; made once."""
    plan = _PLANS.get(mask)
    if plan is None:
        blocks = sorted(blocks_of(mask), key=lambda block: not block.causal)
        frozen = torch.zeros(mask.length, dtype=torch.bool)
        expanded = sum(end - begin for block in blocks for begin, end in block.keys)
        for span in mask.frozen:
            frozen[slice(*mask.span_offsets[span : span + 2])] = True
        rows = (mask.host or mask).rows.tolist()
        aligned = all(rows[block.rows[1] - 1] + 1 == block.keys[-1][1] for block in blocks)
        plan = Plan(blocks, expanded, mask.num_queries, frozen, aligned, mask.rows.device)
        _PLANS[mask] = plan
    return plan


def blocks_of(mask: SpanMask) -> list[Block]:
    """The sequences that a mask consists of, in the order of their rows; padding is in none.

    A causal span that continues the one before it is in the same sequence. The rows that are
    selected from a causal span are one sequence per consecutive run of them, whose keys end at its
    last row: there flash attention aligns the diagonal, and with a window the full spans' too.
    """
    offsets = mask.span_offsets
    runs, slices = ancestor_runs(offsets, mask.parents)
    rows = (mask.host or mask).rows.cpu().long()
    rows = rows[rows < offsets[-1]]
    span_of = torch.bucketize(rows, torch.tensor(offsets), right=True) - 1
    causal = torch.tensor([mode == "causal" for mode in mask.modes], dtype=torch.bool)
    begins = torch.ones(len(rows), dtype=torch.bool)
    runs_matter = causal if mask.window is None else torch.ones_like(causal)
    begins[1:] = (span_of.diff() != 0) | (runs_matter[span_of[1:]] & (rows.diff() != 1))
    firsts = begins.nonzero()[:, 0]
    edges = [*firsts.tolist(), len(rows)]

    blocks: list[Block] = []
    starts = zip(pairwise(edges), rows[firsts].tolist(), span_of[firsts].tolist(), strict=True)
    for (first, last), begin, span in starts:
        is_causal = mask.modes[span] == "causal"
        path = runs[slice(*slices[span])]
        end = begin + last - first if is_causal else offsets[span + 1]
        if is_causal and blocks and blocks[-1].causal and blocks[-1].keys[-1][1] == begin:
            continues = bool(path) and path[-1][1] == begin
            first = blocks.pop().rows[0] if continues else first
        blocks.append(Block((first, last), [*path, (offsets[span], end)], is_causal))
    if mask.window is None:
        return blocks
    return [_within_window(mask, int(rows[block.rows[0]]), block) for block in blocks]


def _within_window(mask: SpanMask, row: int, block: Block) -> Block:
    """The block without the keys that are too far behind its first row."""
    positions = (mask.host or mask).positions
    assert positions is not None
    assert mask.window is not None
    lowest = int(positions[row]) - mask.window + 1
    firsts = positions[[begin for begin, _ in block.keys]].tolist()
    # Positions count up along a range.
    begins = [
        begin + max(0, lowest - at) for (begin, _), at in zip(block.keys, firsts, strict=True)
    ]
    keys = [(begin, end) for begin, (_, end) in zip(begins, block.keys, strict=True) if begin < end]
    return block._replace(keys=keys)


def _expand(ranges: list[Range]) -> Tensor:
    """[E] int64: the integers of all ranges, one range after the other."""
    table = torch.tensor(ranges, dtype=torch.int64).view(-1, 2)
    lengths = table[:, 1] - table[:, 0]
    shift = table[:, 0] - (lengths.cumsum(0) - lengths)
    index = torch.repeat_interleave(shift, lengths)
    return index + torch.arange(len(index))
