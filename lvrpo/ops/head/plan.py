"""Which rows a loss needs, in which order, and which of them must be known together.

R rows, T tokens, B sequences.
"""

from __future__ import annotations

import bisect
import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from lvrpo.ops.head.gemm import Chunk, split
from lvrpo.ops.head.rows import inverse
from lvrpo.ops.head.targets import any_of


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a pass over the rows does.

    Attributes:
        order: [R] the rows that chunks count through; None as they are.
        groups: chunks with a gradient. The gradients of a group's tokens are known when all of it
            has been projected: a group of one chunk is projected once, a longer one twice.
        counted: chunks that the metrics need and whose gradient is zero.
    """

    order: Tensor | None
    groups: list[list[Chunk]]
    counted: list[Chunk]

    def chunks(self) -> list[Chunk]:
        """All of them."""
        return [*(chunk for group in self.groups for chunk in group), *self.counted]


@dataclasses.dataclass(frozen=True)
class Tokens:
    """What decides whether a token's row has a gradient.

    Attributes:
        row: [T] the row that predicts it; None for its own.
        sequence: [T] the sequence that it is in, of `sequences`.
        sequences: B.
        active: [T] bool, its weight is not 0.
        pulls: [T] bool, it is active and the loss may have a gradient by its log-prob or entropy.
    """

    row: Tensor | None
    sequence: Tensor
    sequences: int
    active: Tensor
    pulls: Tensor


def plan_rows(
    tokens: Tokens, rows: int, most: int, *, gradient: bool, whole_sequences: bool
) -> Plan:
    """The plan, after one read from the device of the tokens (none while a graph is captured).

    Args:
        tokens: what is known of them.
        rows: R.
        most: rows of a chunk.
        gradient: whether anything is to be differentiated.
        whole_sequences: whether a token's gradient depends on the log-probs of its sequence.
    """
    if is_captured(tokens.active):
        chunks = split(0, rows, most)
        if not gradient:
            return Plan(None, [], chunks)
        return Plan(None, [chunks] if whole_sequences else [[chunk] for chunk in chunks], [])
    pulls = tokens.pulls & gradient
    if whole_sequences:
        pulls = tokens.active & any_of(pulls, tokens.sequence, tokens.sequences)[tokens.sequence]
    live, seen = (any_of(x, tokens.row, rows) for x in (pulls, tokens.active))
    order = (2 - live.long() - seen.long()).argsort(stable=True)
    facts = [live.sum().reshape(1), seen.sum().reshape(1)]
    if whole_sequences:
        position = inverse(order)
        if tokens.row is not None:
            position = position[tokens.row]
        facts.append(_straddled(position, tokens.sequence, pulls, (rows, tokens.sequences)))
    live_rows, seen_rows, *straddled = torch.cat(facts).tolist()

    groups = [[chunk] for chunk in split(0, live_rows, most)]
    if whole_sequences:
        cuts = [at for at in range(live_rows + 1) if not straddled[at]]
        groups = group_between(cuts, most)
    counted = split(live_rows, seen_rows, most)
    return Plan(None if live_rows == rows else order, groups, counted)


def group_between(cuts: Sequence[int], most: int) -> list[list[Chunk]]:
    """Groups that begin and end at cuts: one chunk where the rows up to a cut fit, or several."""
    groups, begin = [], 0
    while begin < cuts[-1]:
        end = cuts[bisect.bisect_right(cuts, begin + most) - 1]
        if end == begin:
            end = cuts[bisect.bisect_right(cuts, begin)]
        groups.append(split(begin, end, most))
        begin = end
    return groups


def is_captured(tensor: Tensor) -> bool:
    """Whether a CUDA graph is being recorded, which must not wait for the device."""
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()


def _straddled(position: Tensor, sequence: Tensor, pulls: Tensor, sizes: tuple[int, int]) -> Tensor:
    """[R + 1] how many sequences that pull have rows on both sides of a cut before each row."""
    rows, sequences = sizes
    ends = {}
    for side, nowhere in (("amin", rows), ("amax", -1)):
        start = position.new_full((sequences,), nowhere)
        inside = torch.where(pulls, position, nowhere)
        ends[side] = start.scatter_reduce(0, sequence, inside, side)
    there = (ends["amax"] >= 0).long()
    steps = position.new_zeros(rows + 2)
    steps.index_add_(0, torch.where(there > 0, ends["amin"] + 1, 0), there)
    steps.index_add_(0, torch.where(there > 0, ends["amax"] + 1, 0), -there)
    return steps.cumsum(0)[: rows + 1]
