"""Groups that ranks have sampled apart: what of them goes where.

Answers are a few bytes a token, and every rank gets all of them. The latents of a picture are
thousands of times as many (a drawing of 4,096 tokens of 64 numbers: 3 MiB for each trained step):
they stay on the rank that drew them, and only a group that another rank has the time for is sent,
to that rank alone, before the update that it is learned from in.

P prompts of one skill, G samples of each.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TypeVar

import torch
import torch.distributed
from torch import Tensor

from lvrpo.data.example import Example
from lvrpo.distributed.ranks import all_there
from lvrpo.models.protocol import Answers, Pictures
from lvrpo.models.sampling import SampledFrom
from lvrpo.trainer.ranks import Ranks, balance

T = TypeVar("T")


def of_rank(items: Sequence[T], owners: Sequence[int], rank: int) -> list[T]:
    """Those that a rank owns, in order."""
    return [item for item, owner in zip(items, owners, strict=True) if owner == rank]


def places(owners: Sequence[int]) -> list[int]:
    """[P] where each group is among those of rank 0, then those of rank 1, and so on."""
    order = sorted(range(len(owners)), key=lambda group: owners[group])
    found = [0] * len(owners)
    for place, group in enumerate(order):
        found[group] = place
    return found


def gather_answers(
    own: Answers | None,
    examples: Sequence[Example],
    owners: Sequence[int],
    ranks: Ranks,
    device: torch.device,
) -> Answers:
    """The answers of all ranks, on every rank.

    Args:
        own: those of this rank's prompts; None where it has none.
        examples: [P] prompts of all ranks.
        owners: [P] ranks that sampled them.
        ranks: that sampled.
        device: for the result.
    """
    parts = [part for part in ranks.gather(own and _on_host(own)) if part is not None]
    of_ranks = sorted(range(len(examples)), key=lambda group: owners[group])
    found = dataclasses.replace(
        Answers.concat(parts), examples=[examples[group] for group in of_ranks]
    ).take(places(owners))
    moved = found.sampled_from and SampledFrom(*(x.to(device) for x in found.sampled_from))
    return dataclasses.replace(found, logprobs=found.logprobs.to(device), sampled_from=moved)


def _on_host(own: Answers) -> Answers:
    """To be sent: every rank knows the prompts."""
    moved = own.sampled_from and SampledFrom(*(x.cpu() for x in own.sampled_from))
    return dataclasses.replace(
        own, examples=[], sizes=own.group_sizes, logprobs=own.logprobs.cpu(), sampled_from=moved
    )


@dataclass(frozen=True)
class SharedPictures:
    """Groups of pictures of which each rank has its own, and all know whose the others are.

    Attributes:
        examples: [P] prompts of all.
        owners: [P] the rank that has each group.
        own: the groups of this rank, in order; there may be none.
        rank: of this process.
    """

    examples: list[Example]
    owners: list[int]
    own: Pictures
    rank: int

    @classmethod
    def of(
        cls,
        own: Pictures | None,
        examples: Sequence[Example],
        owners: Sequence[int],
        ranks: Ranks,
        device: torch.device,
    ) -> SharedPictures:
        """What ranks have drawn; see `gather_answers`."""
        shapes = [shape for shape in ranks.gather(own and _without_groups(own, "cpu")) if shape]
        if own is None:
            own = _without_groups(shapes[0], device)
        return cls(list(examples), list(owners), own, ranks.rank)

    @property
    def group_size(self) -> int:
        """G."""
        return self.own.group_size

    @property
    def steps(self) -> list[int]:
        """See `Pictures`."""
        return self.own.steps

    @property
    def fingerprint(self) -> str:
        """See `Pictures`."""
        return self.own.fingerprint

    @classmethod
    def concat(cls, parts: Sequence[SharedPictures]) -> SharedPictures:
        """The groups of all parts, in order."""
        return dataclasses.replace(
            parts[0],
            examples=[example for part in parts for example in part.examples],
            owners=[owner for part in parts for owner in part.owners],
            own=Pictures.concat([part.own for part in parts]),
        )

    def take(self, groups: Sequence[int]) -> SharedPictures:
        """Some groups, in the order given; none is sent."""
        mine = of_rank(range(len(self.owners)), self.owners, self.rank)
        here = {group: place for place, group in enumerate(mine)}
        return dataclasses.replace(
            self,
            examples=[self.examples[group] for group in groups],
            owners=[self.owners[group] for group in groups],
            own=self.own.take([here[group] for group in groups if group in here]),
        )

    def sent(self, takers: Sequence[int]) -> Pictures:
        """This rank's groups when every group is where `takers` says, in order.

        Their images stay behind: rewards have seen them.
        """
        return dataclasses.replace(
            self.own,
            examples=of_rank(self.examples, takers, self.rank),
            images=self.own.images[:0],
            latents=self._sent(self.own.latents, takers),
            velocities=self._sent(self.own.velocities, takers),
            noise=self._sent(self.own.noise, takers),
        )

    def _sent(self, tensor: Tensor, takers: Sequence[int]) -> Tensor:
        own = iter(tensor.split(self.group_size))
        found = [tensor[:0]]
        for owner, taker in zip(self.owners, takers, strict=True):
            group = next(own) if owner == self.rank else None
            with all_there("train"):
                if group is not None and taker != self.rank:
                    torch.distributed.send(group.contiguous(), taker)
                elif group is None and taker == self.rank:
                    group = tensor.new_empty(self.group_size, *tensor.shape[1:])
                    torch.distributed.recv(group, owner)
            if taker == self.rank:
                assert group is not None
                found.append(group)
        return torch.cat(found)


def _without_groups(pictures: Pictures, device: torch.device | str) -> Pictures:
    names = ("images", "latents", "velocities", "noise")
    tensors = {name: getattr(pictures, name)[:0] for name in names}
    moved = {name: t.to("cpu" if name == "images" else device) for name, t in tensors.items()}
    return dataclasses.replace(pictures, examples=[], **moved)


def shared_over_answers(
    answers: Answers, compute: Callable[[Answers], Tensor], ranks: Ranks
) -> Tensor:
    """A number for each token, of which each rank computes those of some groups.

    Args:
        answers: of all ranks.
        compute: [T] of some answers.
        ranks: of which every one has the answers.

    Returns:
        [T] on the device of the log-probs.
    """
    if ranks.size == 1:
        return compute(answers)
    owners = balance(_tokens(answers), ranks.size)
    mine = answers.take(of_rank(range(len(owners)), owners, ranks.rank))
    own = ranks.apart(lambda: compute(mine) if mine.token_ids else answers.logprobs[:0])
    found = torch.cat(ranks.gather(own.cpu()))
    of_ranks = sorted(range(len(owners)), key=lambda group: owners[group])
    ordered = dataclasses.replace(answers.take(of_ranks), logprobs=found, sampled_from=None)
    return ordered.take(places(owners)).logprobs.to(answers.logprobs.device)


def _tokens(answers: Answers) -> list[int]:
    """[P] of the samples of each group together."""
    lengths = map(len, answers.token_ids)
    return [sum(islice(lengths, size)) for size in answers.group_sizes]


def takers_of(
    answers: Answers | None,
    pictures: SharedPictures | Pictures | None,
    ranks: Ranks,
) -> tuple[list[int], list[int]]:
    """Which rank learns from each group of an update: [P] of the answers, [P] of the pictures.

    Groups are dealt by the rows that their samples take in a pack. A group of pictures stays where
    it is unless another rank has less to do.
    """
    costs: list[int] = []
    stay: list[int] = []
    if answers is not None:
        costs += _tokens(answers)
        stay += ranks.deal(answers.examples)
    if isinstance(pictures, SharedPictures):
        rows = pictures.group_size * len(pictures.steps) * pictures.own.latents.shape[2]
        costs += [rows] * len(pictures.examples)
        stay += pictures.owners
    chosen = balance(costs, ranks.size, stay)
    count = 0 if answers is None else len(answers.examples)
    return chosen[:count], chosen[count:]
