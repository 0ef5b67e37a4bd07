"""What ranks send each other: tensors, and whether they agree before they send them."""

from __future__ import annotations

import contextlib
import json
import zlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.distributed
from torch import Tensor

from lvrpo import checks

Group = torch.distributed.ProcessGroup | None

#: Bytes that a rank shows the others before a call, and of them for one fact.
MESSAGE_BYTES, FACT_LENGTH = 4096, 120


def gather(op: str, own: Tensor, group: Group) -> Tensor:
    """[ranks, ...] what each rank has, all of one shape; the same bits on every rank."""
    found = own.new_empty(torch.distributed.get_world_size(group), *own.shape)
    with all_there(op):
        torch.distributed.all_gather(list(found.unbind()), own.contiguous(), group=group)
    return found


def add_up(op: str, tensor: Tensor, group: Group) -> None:
    """The sum over ranks, in place."""
    with all_there(op):
        torch.distributed.all_reduce(tensor, group=group)


@contextlib.contextmanager
def agreement(op: str, group: Group, like: Tensor) -> Iterator[dict[str, Any]]:
    """Inside, a rank checks its arguments and notes what all ranks must have alike.

    A rank that waits for one that raised waits for ever, and so do two that send different sizes.
    Hence one small message before the first tensor: always on a CPU, and on a GPU, where it is a
    wait for the device, with LVRPO_CHECK=1.

    Args:
        op: who asks.
        group: the ranks.
        like: a tensor of the device that the group serves.

    Raises:
        ValueError: on every rank, if one raised it inside, or ranks noted different things.
    """
    facts: dict[str, Any] = {}
    refused: ValueError | None = None
    try:
        yield facts
    except ValueError as error:
        refused = error
    others: list[dict[str, str]] = []
    if checks.check_values(like):
        message = {"refused": str(refused)} if refused else facts
        others = _exchange(op, message, group, like.device)
    if refused is not None:
        raise refused
    for rank, other in enumerate(others):
        if "refused" in other:
            raise ValueError(f"{op}: rank {rank} of the group refused: {other['refused']}")
    for rank, other in enumerate(others):
        check_same(op, others[0], other, rank)


def check_same(op: str, first: Mapping[str, Any], other: Mapping[str, Any], rank: int) -> None:
    """A rank notes what rank 0 does.

    Raises:
        ValueError: it does not.
    """
    for name in [*first, *other]:
        if first.get(name) != other.get(name):
            raise ValueError(
                f"{op}: ranks disagree: {name} is {first.get(name)} on rank 0 of the group, but "
                f"{other.get(name)} on rank {rank}; expected the same on all of them"
            )


def _exchange(
    op: str, message: Mapping[str, Any], group: Group, device: torch.device
) -> list[dict[str, str]]:
    short = {name: _shortened(str(value)) for name, value in message.items()}
    if "refused" in message:
        short = {"refused": str(message["refused"])[: MESSAGE_BYTES // 8]}
    text = json.dumps(short).encode()
    assert len(text) <= MESSAGE_BYTES, text
    own = torch.tensor(list(text.ljust(MESSAGE_BYTES)), dtype=torch.uint8, device=device)
    return [json.loads(bytes(row)) for row in gather(op, own, group).tolist()]


def _shortened(text: str) -> str:
    """Text that says what differs, or at least that something does."""
    if len(text) <= FACT_LENGTH:
        return text
    return f"{text[:FACT_LENGTH]}... ({zlib.crc32(text.encode()):08x})"


@contextlib.contextmanager
def all_there(op: str) -> Iterator[None]:
    """Say of an error of the network what it most likely is."""
    try:
        yield
    except RuntimeError as error:
        why = str(error).splitlines()[0].partition(". ")[0]
        raise RuntimeError(
            f"{op}: a rank of the group did not answer ({why}); its process has ended or raised, "
            "or called something else: see its own output"
        ) from error
