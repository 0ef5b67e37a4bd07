"""Samples that lie in any order, and whose groups have names, as groups that follow each other.

B samples.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from lvrpo import checks
from lvrpo.kept import kept_tensor

#: What the groups of samples are named by: integers as a tensor, or any equal-or-not things.
GroupIds = Tensor | Iterable[Hashable]


@dataclasses.dataclass(frozen=True)
class GroupOrder:
    """An order of the samples in which those of a group are next to each other.

    Attributes:
        order: [B], the sample at each place; samples of a group keep their order.
        place: [B], the place of each sample.
        offsets: [B + 1] of the groups in that order. Nobody waits for a device to count the groups:
            behind the last one there are empty ones, so that there are B.
    """

    order: Tensor
    place: Tensor
    offsets: Tensor


def group_order(op: str, group_ids: GroupIds, batch: int, device: torch.device) -> GroupOrder:
    """The order that puts samples of equal ids together.

    Args:
        op: who asks, for the errors.
        group_ids: one for each sample: integers of any dtype in a tensor, or any sequence or array
            of what can be compared, such as strings.
        batch: B.
        device: of the result.

    Raises:
        ValueError: there are not B of them, or they are floating numbers or cannot be compared.
    """
    if isinstance(group_ids, Tensor):
        numbers = checks.as_index(op, "group_ids", group_ids)
    else:
        numbers = torch.tensor(_numbered(op, group_ids), dtype=torch.int64, device=device)
    checks.check_shape(op, "group_ids", numbers, (batch,))
    ascending, order = numbers.sort(stable=True)
    starts = torch.ones_like(ascending)
    starts[1:] = ascending[1:] != ascending[:-1]
    offsets = torch.searchsorted(starts.cumsum(0) - 1, torch.arange(batch + 1, device=order.device))
    return GroupOrder(order, order.argsort(), offsets)


def group_offsets(
    op: str, groups: Tensor | Sequence[int] | int, batch: int, device: torch.device
) -> Tensor:
    """[P + 1] offsets of groups that follow each other, from offsets or the size of all of them.

    Raises:
        ValueError: the size does not divide the batch, or the offsets do not fit it.
    """
    if isinstance(groups, (Tensor, Sequence)):
        return checks.as_offsets(op, "groups", groups, batch, device)
    if groups < 1 or batch % groups != 0:
        raise ValueError(f"{op}: groups is {groups}, expected a size >= 1 that divides B = {batch}")
    return _equal_groups(batch, groups) if device.type == "cpu" else _arange(batch, groups, device)


def _arange(batch: int, size: int, device: torch.device | str) -> Tensor:
    return torch.arange(0, batch + 1, size, device=device)


@kept_tensor
def _equal_groups(batch: int, size: int) -> Tensor:
    return _arange(batch, size, "cpu")


def check_one(op: str, groups: object, group_ids: object) -> None:
    """Groups are given by their places or by their names.

    Raises:
        ValueError: both are given, or neither is.
    """
    if (groups is None) == (group_ids is None):
        given = "None" if groups is None else "given"
        raise ValueError(f"{op}: groups and group_ids are both {given}, expected one of them")


def _numbered(op: str, group_ids: Iterable[Any]) -> list[int]:
    """The ids in the order in which they come, as 0, 1, 2, ..."""
    found: dict[Any, int] = {}
    # An array's own items are no Python numbers.
    ids = group_ids.tolist() if hasattr(group_ids, "tolist") else list(group_ids)
    for name in ids:
        if isinstance(name, float) or not isinstance(name, Hashable):
            raise ValueError(
                f"{op}: group_ids has {name!r}, a {type(name).__name__}, expected integers, "
                "strings or other ids that are equal or not"
            )
    return [found.setdefault(name, len(found)) for name in ids]
