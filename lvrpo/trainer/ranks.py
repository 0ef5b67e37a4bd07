"""The processes that share a run: what each is told of the others, and how all end together.

Every process makes the same calls in the same order. What one of them raises, or a signal that it
has had, is known to all at the next call, and all raise it there: none waits for one that is gone.
"""

from __future__ import annotations

import contextlib
import pickle
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import groupby
from typing import Any, TypeVar

import torch
import torch.distributed
from torch import Tensor, nn

from lvrpo.data.example import Example
from lvrpo.distributed.ranks import all_there
from lvrpo.trainer.placement import as_stored, is_split

T = TypeVar("T")

#: Bytes of gradients that are added up in one message.
BUCKET_BYTES = 64 << 20


def nothing_heard() -> None:
    """No signal."""


@dataclass(frozen=True)
class Ranks:
    """The ranks of a run, of which this process is one.

    Alone, as by default, nothing is sent and nothing is copied.

    Attributes:
        rank: of this process.
        size: how many there are.
        group: for messages between hosts; tensors of the model go by the default group.
        heard: what has to end the run, a signal say, that this process alone knows of.
        interruptible: inside, that is raised at once, as a `KeyboardInterrupt`.
    """

    rank: int = 0
    size: int = 1
    group: torch.distributed.ProcessGroup | None = None
    heard: Callable[[], BaseException | None] = nothing_heard
    interruptible: Callable[[], AbstractContextManager[None]] = contextlib.nullcontext

    @classmethod
    def joined(cls) -> Ranks:
        """The processes of `torch.distributed`, all of which call; alone where there are none."""
        if not torch.distributed.is_initialized() or torch.distributed.get_world_size() == 1:
            return cls()
        rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
        return cls(rank, size, torch.distributed.new_group(backend="gloo"))

    @property
    def is_first(self) -> bool:
        """Whether it is this process that writes and speaks."""
        return self.rank == 0

    def gather(self, own: T) -> list[T]:
        """[size] what each rank has; it has to be on the host.

        Raises:
            RuntimeError: a rank does not answer.
        """
        if self.size == 1:
            return [own]
        found: list[Any] = [None] * self.size
        try:
            with all_there("train"):
                torch.distributed.all_gather_object(found, own, group=self.group)
        except RuntimeError as error:
            if not self.is_first:
                setattr(error, _SAID_BY_FIRST, True)
            raise
        return found

    def together(self, own: Callable[[], T]) -> T:
        """What a call gives here, when all ranks have made theirs.

        Raises:
            BaseException: on every rank, what the call raised on the first that it did on, or what
                one has heard.
        """
        if self.size == 1:
            return own()
        raised: BaseException | None = None
        try:
            result = own()
        except (Exception, KeyboardInterrupt) as error:
            raised = error
        for rank, ended in enumerate(self.gather(_to_send(raised or self.heard()))):
            if ended is not None:
                # Its own error knows where it was raised.
                reason = raised if raised is not None and rank == self.rank else ended
                setattr(reason, _RAISED_BY_ALL, True)
                setattr(reason, _SAID_BY_FIRST, not self.is_first)
                raise reason
        return result

    def apart(self, own: Callable[[], T]) -> T:
        """As `together`, of a call that sends nothing: what ends the run ends it in its middle.

        A process may sample for minutes, and is killed seconds after it was told to end.
        """

        def work() -> T:
            with self.interruptible():
                return own()

        return self.together(work)

    def part(self, error: BaseException) -> None:
        """Wait until all ranks have done what they do after an error that all of them raised.

        A process that ends earlier may take the others with it.
        """
        if _has(error, _RAISED_BY_ALL):
            with contextlib.suppress(RuntimeError):
                self.gather(None)

    def first(self, own: Callable[[], T]) -> T:
        """What a call gives on the first rank, which alone makes it.

        Raises:
            BaseException: as `together`.
        """
        return self.gather(self.together(own if self.is_first else lambda: None))[0]  # type: ignore

    def deal(self, examples: Sequence[Example]) -> list[int]:
        """[P] which rank samples each prompt: as many each as can be.

        Copies of a prompt, whose samples are told apart by how many came before, stay together.
        """
        copies: dict[str, list[int]] = {}
        for i, example in enumerate(examples):
            copies.setdefault(example.uid, []).append(i)
        owners = [0] * len(examples)
        dealt = balance([len(places) for places in copies.values()], self.size)
        for places, rank in zip(copies.values(), dealt, strict=True):
            for i in places:
                owners[i] = rank
        return owners


#: One process.
ALONE = Ranks()


#: Attributes of errors.
_RAISED_BY_ALL, _SAID_BY_FIRST = "raised_by_all_ranks", "said_by_first_rank"


def is_raised_by_all(error: BaseException) -> bool:
    """Whether every rank has it, and goes on alike."""
    return _has(error, _RAISED_BY_ALL)


def is_said_by_first(error: BaseException) -> bool:
    """Whether this is another rank than the first, which says the same."""
    return _has(error, _SAID_BY_FIRST)


def _has(error: BaseException, attribute: str) -> bool:
    """Of an error or of what caused it."""
    if getattr(error, attribute, False):
        return True
    return error.__cause__ is not None and _has(error.__cause__, attribute)


def _to_send(error: BaseException | None) -> BaseException | None:
    """An error as it is, or one of the same words where others could not make it."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


def balance(costs: Sequence[float], size: int, preferred: Sequence[int] | None = None) -> list[int]:
    """Which of `size` ranks does each piece of work: the longest first, by who has least to do.

    No rank has more than the mean and the longest piece together (Graham 1969: at most 4/3 of what
    the best deal gives the busiest one).

    Args:
        costs: of the pieces.
        size: ranks.
        preferred: rank that each piece is with already, and leaves only for one with less to do.
    """
    loads = [0.0] * size
    chosen = [0] * len(costs)
    longest_first = sorted(range(len(costs)), key=lambda i: -costs[i])
    for cost, equal in groupby(longest_first, key=lambda i: costs[i]):
        left = list(equal)
        while left:
            idle = [rank for rank in range(size) if loads[rank] == min(loads)]
            i, rank = left[0], idle[0]
            if preferred is not None:
                i = next((i for i in left if preferred[i] in idle), i)
                rank = preferred[i] if preferred[i] in idle else rank
            left.remove(i)
            chosen[i] = rank
            loads[rank] += cost
    return chosen


def has_parts(module: nn.Module) -> bool:
    """Whether ranks have parts of its parameters, so that all make each of its passes together."""
    return any(map(is_split, module.parameters()))


def sum_gradients(module: nn.Module, ranks: Ranks) -> None:
    """Add up over ranks the gradients of the parameters that every rank has whole.

    Those of parts are sums already. A parameter without a gradient on any rank has none.
    """
    if ranks.size == 1:
        return
    whole = [p for p in module.parameters() if p.requires_grad and not is_split(p)]
    given = ranks.gather([parameter.grad is not None for parameter in whole])
    used = [p for p, has in zip(whole, zip(*given, strict=True), strict=True) if any(has)]
    for parameter in used:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    gradients = [p.grad for p in used if p.grad is not None]
    for bucket in _buckets([*map(as_stored, gradients)]):
        flat = torch.cat([gradient.flatten() for gradient in bucket])
        with all_there("train"):
            torch.distributed.all_reduce(flat)
        for gradient, part in zip(bucket, flat.split([g.numel() for g in bucket]), strict=True):
            gradient.copy_(part.view_as(gradient))


def _buckets(tensors: Sequence[Tensor]) -> list[list[Tensor]]:
    """Neighbours of one dtype and device, `BUCKET_BYTES` at most unless one alone has more."""
    buckets: list[list[Tensor]] = []
    room = 0
    for tensor in tensors:
        last = buckets[-1][-1] if buckets else None
        size = tensor.numel() * tensor.element_size()
        alike = last is not None and (last.dtype, last.device) == (tensor.dtype, tensor.device)
        if not alike or size > room:
            buckets.append([])
            room = BUCKET_BYTES
        buckets[-1].append(tensor)
        room -= size
    return buckets
