"""How a vocabulary is split over ranks, and which part of an op's targets a rank has.

R rows, T tokens, V columns of the whole vocabulary.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import sys
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed
from torch import Tensor

from lvrpo.backends import FLOATING
from lvrpo.distributed.ranks import Group, check_same, gather
from lvrpo.ops.head.rows import OUTSIDE
from lvrpo.ops.head.targets import Targets, VocabRange, is_pair

_NAME = "VocabShards"
#: Among the numbers that ranks exchange: not given.
_NONE = -1


@dataclasses.dataclass(frozen=True)
class VocabShards:
    """Which columns of a vocabulary each rank of a group has; `of` asks the ranks once.

    Attributes:
        ranges: by rank of the group, its first column and one past its last, in any order; equal
            where it has none. Together they are [0, V).
        group: the ranks; None for all.
    """

    ranges: tuple[tuple[int, int], ...]
    group: Group = None

    def __post_init__(self) -> None:
        end = 0
        for low, high in sorted(self.ranges):
            if low == high:
                continue
            if not low == end < high:
                problem = "overlap" if low < end else "do not cover the vocabulary"
                raise ValueError(
                    f"{_NAME}: ranges is {self.ranges}, which {problem} at column "
                    f"{min(low, end)}; expected every column once, from 0"
                )
            end = high
        if not end:
            raise ValueError(f"{_NAME}: ranges is {self.ranges}, expected at least one column")

    @classmethod
    def of(
        cls,
        shard: Tensor,
        first: int | None = None,
        *,
        dim: int = 0,
        vocab_size: int | None = None,
        group: Group = None,
    ) -> VocabShards:
        """From what every rank has; all of them call it, once, when the model is set up.

        One message of a few numbers, which the host waits for.

        Args:
            shard: [V of this rank, H], the rank's rows of the weight; or logits with `dim=-1`. V
                may differ from rank to rank, and be 0.
            first: the rank's first column; None: ranks have theirs in the order of their numbers.
            dim: of the vocabulary in `shard`.
            vocab_size: V that the shards must add up to, if it is known.
            group: the ranks; None for all.

        Raises:
            ValueError: on every rank: the shards overlap or leave something out, or ranks
                disagree about the dtype, the other sizes or the vocabulary.
        """
        sizes = list(shard.shape)
        numbers = {
            "columns": sizes.pop(dim),
            "first": _NONE if first is None else first,
            "vocab_size": _NONE if vocab_size is None else vocab_size,
            "dtype": FLOATING.index(shard.dtype) if shard.dtype in FLOATING else _NONE,
            "dimensions": 1 + len(sizes),
            "width": sizes[-1] if sizes and dim == 0 else 0,
        }
        own = torch.tensor(list(numbers.values()), dtype=torch.int64, device=shard.device)
        of_ranks = [
            dict(zip(numbers, row, strict=True)) for row in gather(_NAME, own, group).tolist()
        ]
        for rank, found in enumerate(of_ranks):
            check_same(_NAME, _alike(of_ranks[0]), _alike(found), rank)
        ends = itertools.accumulate(found["columns"] for found in of_ranks)
        ranges = []
        for end, found in zip(ends, of_ranks, strict=True):
            low = end - found["columns"] if first is None else found["first"]
            ranges.append((low, low + found["columns"]))
        shards = cls(tuple(ranges), group)
        if vocab_size not in (None, shards.vocab_size):
            raise ValueError(
                f"{_NAME}: vocab_size is {vocab_size}, but the shards {shards.ranges} have "
                f"{shards.vocab_size} columns"
            )
        return shards

    @property
    def vocab_size(self) -> int:
        """V."""
        return max(high for _, high in self.ranges)

    @property
    def own(self) -> tuple[int, int]:
        """The columns of this rank."""
        return self.ranges[torch.distributed.get_rank(self.group)]

    def owners(self, token_ids: Tensor) -> Tensor:
        """The rank of the group that has each column."""
        firsts, ranks = _owners(self.ranges, token_ids.device)
        at = torch.searchsorted(firsts, token_ids, right=True) - 1
        return ranks[at.clamp(min=0)]


def _alike(found: Mapping[str, int]) -> dict[str, Any]:
    """What ranks have to have alike, of what one of them has."""
    dtype = found["dtype"]
    return {
        "first is given": found["first"] != _NONE,
        "vocab_size": found["vocab_size"],
        "dtype": None if dtype == _NONE else FLOATING[dtype],
        "dimensions": found["dimensions"],
        "width": found["width"],
    }


@functools.lru_cache(maxsize=64)
def _owners(ranges: tuple[tuple[int, int], ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """The first columns of the shards that have any, ascending, and their ranks."""
    filled = sorted((low, rank) for rank, (low, high) in enumerate(ranges) if low < high)
    with torch.inference_mode(False):
        firsts, ranks = torch.tensor(filled, dtype=torch.int64, device=device).unbind(1)
        return firsts.contiguous(), ranks.contiguous()


def is_dtensor(tensor: Any) -> bool:
    """Whether it is a DTensor; imports nothing for it."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def local_shard(
    op: str, name: str, tensor: Tensor, shards: VocabShards | None, dim: int
) -> tuple[Tensor, VocabShards]:
    """This rank's part of a tensor whose dimension `dim` is the vocabulary, and all shards.

    Args:
        op: who asks.
        name: of the tensor.
        tensor: the part; or a DTensor, whose placement says what `shards` otherwise does.
        shards: None with a DTensor.
        dim: 0, or -1 for the last.

    Raises:
        ValueError: neither says how the vocabulary is split, the part has another size than its
            shard, or the placement is of another kind.
    """
    if is_dtensor(tensor):
        placed = _shards_of_dtensor(op, name, tensor, dim)
        if shards is not None and shards.ranges != placed.ranges:
            raise ValueError(
                f"{op}: shards has ranges {shards.ranges}, but {name} is a DTensor with "
                f"{placed.ranges}; leave shards out"
            )
        return tensor.to_local(), placed  # type: ignore[attr-defined]
    if shards is None:
        raise ValueError(
            f"{op}: shards is None and {name} is no DTensor; make shards once with "
            f"VocabShards.of({name}{'' if dim == 0 else f', dim={dim}'}, group=...)"
        )
    return tensor, shards


def check_own_columns(op: str, name: str, columns: int, shards: VocabShards) -> None:
    """A part has the columns that its shard says.

    Raises:
        ValueError: it has more or fewer.
    """
    low, high = shards.own
    if columns != high - low:
        raise ValueError(
            f"{op}: {name} has {columns} columns of the vocabulary, but shards has [{low}, {high}) "
            "for this rank"
        )


def replicated(op: str, name: str, tensor: Tensor) -> Tensor:
    """A tensor that all ranks have; a replicated DTensor as its local tensor.

    Raises:
        ValueError: a DTensor that is split.
    """
    if not is_dtensor(tensor):
        return tensor
    if not all(placement.is_replicate() for placement in tensor.placements):  # type: ignore[attr-defined]
        raise ValueError(
            f"{op}: {name} has placements {tensor.placements}, expected Replicate(): "  # type: ignore[attr-defined]
            f"{name}.redistribute(placements=[Replicate()])"
        )
    # The op adds up the gradient over ranks itself.
    return tensor.to_local(grad_placements=tensor.placements)  # type: ignore[attr-defined, no-any-return]


def _shards_of_dtensor(op: str, name: str, tensor: Any, dim: int) -> VocabShards:
    mesh, placements = tensor.device_mesh, tensor.placements
    split = [i for i, placement in enumerate(placements) if not placement.is_replicate()]
    dim = dim % tensor.dim()
    if len(split) != 1 or not placements[split[0]].is_shard(dim):
        raise ValueError(
            f"{op}: {name} has placements {placements}, expected Shard({dim}) over one dimension "
            "of its mesh and Replicate() over the others"
        )
    axis = split[0]
    here: list[Any] = list(mesh.get_coordinate())
    here[axis] = slice(None)
    ranks = mesh.mesh[tuple(here)].tolist()
    if ranks != sorted(ranks):  # torch itself sends parts by the order of a group, which ascends
        raise ValueError(
            f"{op}: {name} is split over the ranks {ranks}, expected a mesh of ascending ranks"
        )
    vocab = tensor.shape[dim]
    size = -(-vocab // len(ranks))  # as torch.chunk cuts: the last ones may have less, or nothing
    ends = [min(place * size, vocab) for place in range(len(ranks) + 1)]
    return VocabShards(tuple(itertools.pairwise(ends)), mesh.get_group(axis))


@dataclasses.dataclass(frozen=True)
class OwnTargets:
    """The targets of an op, as far as they are this rank's.

    Attributes:
        columns: of the rank's part that are multiplied: the first, and one past the last.
        token_ids: [T] counted from the first of them; OUTSIDE where there is no such column.
        row_index: [T] or None.
        ranges: [R, 2] of these columns, or None for all of them.
        owner: [T] the rank of the group that has the token's column, -1 for an ignored token.
        widest: columns of the rank that multiplies most.
    """

    columns: tuple[int, int]
    token_ids: Tensor
    row_index: Tensor | None
    ranges: Tensor | None
    owner: Tensor
    widest: int

    @property
    def elsewhere(self) -> Tensor:
        """[T] whether another rank has the token's column."""
        return (self.token_ids == OUTSIDE) & (self.owner >= 0)


def own_targets(
    op: str, shards: VocabShards, targets: Targets, vocab_range: VocabRange
) -> OwnTargets:
    """The part of checked targets; a pair for `vocab_range` is cut out of the columns.

    Raises:
        ValueError: the pair is no range of the vocabulary.
    """
    ids, row_index, ranges = targets.indices()
    pair = (0, shards.vocab_size)
    if is_pair(vocab_range):
        pair, ranges = vocab_range, None  # type: ignore[assignment]
    parts = [
        (max(low, pair[0]), max(low, pair[0], min(high, pair[1]))) for low, high in shards.ranges
    ]
    start, _ = shards.own
    low, high = parts[torch.distributed.get_rank(shards.group)]
    asked = ids != targets.ignore_index
    mine = asked & (ids >= low) & (ids < high)
    columns = (low - start, high - start) if high > low else (0, 0)
    if ranges is not None:
        ranges = (ranges - low).clamp(0, high - low)
    return OwnTargets(
        columns,
        torch.where(mine, ids - low, OUTSIDE),
        row_index,
        ranges,
        torch.where(asked, shards.owners(ids), -1),
        max(high - low for low, high in parts),
    )
