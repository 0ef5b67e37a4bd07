"""Dynamic sampling (DAPO, Yu et al. 2025, arXiv 2503.14476): prompts whose samples teach something.

A group whose samples all score the same has advantage zero: it costs a rollout and an update and
changes nothing. Other prompts are sampled in its place, for a bounded number of rounds, so that a
step keeps its number of prompts; what still has no signal then stays.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from lvrpo.data.example import Example

G = TypeVar("G", bound="AnyGroups")


class AnyGroups(Protocol):
    """P groups of samples of one skill."""

    @property
    def examples(self) -> list[Example]:
        """[P] the prompt of each."""

    @property
    def group_size(self) -> int:
        """G, samples of each."""

    @classmethod
    def concat(cls: type[G], parts: Sequence[G]) -> G:
        """The groups of all parts, in order."""

    def take(self: G, groups: Sequence[int]) -> G:
        """Some whole groups, in the order given."""


Groups = TypeVar("Groups", bound=AnyGroups)


def has_signal(table: Tensor, group_size: int, weights: Sequence[float]) -> Tensor:
    """[P] bool: the groups in which some reward of a weight sets samples apart.

    Args:
        table: [P * G, K] scores, NaN where a reward has none.
        group_size: G.
        weights: K of them.
    """
    groups = table.view(-1, group_size, table.shape[1])
    scored = ~groups.isnan()
    high = groups.masked_fill(~scored, -torch.inf).amax(dim=1)
    low = groups.masked_fill(~scored, torch.inf).amin(dim=1)
    counted = torch.tensor([weight != 0 for weight in weights])
    return ((high > low) & counted).any(dim=1)


def resample(
    groups: Groups,
    table: Tensor,
    *,
    weights: Sequence[float],
    rounds: int,
    draw: Callable[[int, int, set[str]], Groups | None],
    rate: Callable[[Groups], Tensor],
) -> tuple[Groups, Tensor, dict[str, Any]]:
    """The groups that have a signal, filled up to as many as there were.

    Args:
        groups: P groups of G samples of one skill.
        table: [P * G, K] of their scores.
        weights: of the K rewards.
        rounds: most times that other prompts are sampled.
        draw: of a round (from 1), a number of groups, and the uids of the prompts of this step so
            far: at most as many groups of other prompts, or None where there are none.
        rate: scores groups, [n * G, K].

    Returns:
        P groups: those with a signal, in the order in which they were sampled, then those first
        sampled of the others. Their scores. And metrics: "signal", the share of the first P groups
        that have one, "rounds", and "resampled", groups that were sampled beyond P, over P.
    """
    prompts, size = len(groups.examples), groups.group_size
    first = has_signal(table, size, weights)
    parts, tables, signals = [groups], [table], [first]
    found, sampled, used = int(first.sum()), 0, 0
    for turn in range(1, rounds + 1):
        if found >= prompts:
            break
        seen = {example.uid for part in parts for example in part.examples}
        more = draw(turn, prompts - found, seen)
        if more is None:
            break
        used, sampled = turn, sampled + len(more.examples)
        parts.append(more)
        tables.append(rate(more))
        signals.append(has_signal(tables[-1], size, weights))
        found += int(signals[-1].sum())
    metrics = {
        "signal": int(first.sum()) / prompts,
        "rounds": used,
        "resampled": sampled / prompts,
    }
    if not used:
        return groups, table, metrics
    signal = torch.cat(signals)
    order = torch.cat([signal.nonzero().flatten(), (~signal).nonzero().flatten()])[:prompts]
    scores = torch.cat(tables).view(-1, size, table.shape[1])[order].flatten(0, 1)
    chosen: Groups = type(groups).concat(parts).take(order.tolist())
    return chosen, scores, metrics
