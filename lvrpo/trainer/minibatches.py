"""A rollout in parts, each of which makes an update of its own, in the manner of PPO.

The later updates of a step find weights that did not sample the rollout: their ratios leave one,
and the clip ranges have something to hold.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np
import torch

from lvrpo import random
from lvrpo.trainer.experience import Experience
from lvrpo.trainer.ranks import Ranks
from lvrpo.trainer.sharing import SharedPictures, takers_of


def minibatches(
    experience: Experience, epochs: int, count: int, *, seed: int, step: int
) -> Iterator[Experience]:
    """What each update of a step learns from, in order.

    Every pass over the rollout deals its groups out at random, those of either skill as evenly as
    they go. A group stays whole, groups keep their order, and one minibatch is the rollout itself.

    Args:
        experience: of the whole rollout.
        epochs: passes over it.
        count: of the minibatches of a pass.
        seed: of the run; with `step` it fixes which group is where.
        step: see `seed`.
    """
    for epoch in range(epochs):
        parts = [experience] * count
        for skill, sampled, take in (
            ("understand", experience.answers, take_answers),
            ("generate", experience.pictures, take_pictures),
        ):
            if sampled is not None:
                stream = random.stream(seed, "minibatches", step, epoch, skill)
                dealt = np.array_split(stream.permutation(len(sampled.examples)), count)
                parts = [take(part, groups) for part, groups in zip(parts, dealt, strict=True)]
        yield from parts


def own_share(experience: Experience, ranks: Ranks) -> Experience:
    """What this rank learns from of an update's groups: as many rows as any other, about.

    Args:
        experience: of all ranks.
        ranks: that share it; alone, everything.
    """
    if ranks.size == 1:
        return experience
    pictures = experience.pictures
    of_answers, of_pictures = takers_of(experience.answers, pictures, ranks)
    own = experience
    if experience.answers is not None:
        own = take_answers(own, np.flatnonzero(np.array(of_answers) == ranks.rank))
    if pictures is not None:
        assert isinstance(pictures, SharedPictures)
        advantages = experience.picture_advantages
        assert advantages is not None
        mine = torch.tensor(of_pictures) == ranks.rank
        mine = mine.repeat_interleave(pictures.group_size).to(advantages.device)
        own = dataclasses.replace(
            own, pictures=pictures.sent(of_pictures), picture_advantages=advantages[mine]
        )
    return own


def take_answers(experience: Experience, groups: np.ndarray) -> Experience:
    """The answers of these groups alone; pictures stay as they are."""
    answers, advantages = experience.answers, experience.answer_advantages
    assert answers is not None
    assert advantages is not None
    group = torch.arange(len(answers.examples)).repeat_interleave(torch.tensor(answers.group_sizes))
    kept = torch.isin(group, torch.from_numpy(groups))
    weights = experience.token_weights
    if weights is not None:
        lengths = torch.tensor([len(ids) for ids in answers.token_ids], dtype=torch.int64)
        weights = weights[kept.repeat_interleave(lengths).to(weights.device)]
    return dataclasses.replace(
        experience,
        answers=answers.where(kept),
        answer_advantages=advantages[kept.to(advantages.device)],
        token_weights=weights,
    )


def take_pictures(experience: Experience, groups: np.ndarray) -> Experience:
    """The pictures of these groups alone; answers stay as they are."""
    pictures, advantages = experience.pictures, experience.picture_advantages
    assert pictures is not None
    assert advantages is not None
    of_groups = torch.from_numpy(np.sort(groups))
    size = pictures.group_size
    samples = (of_groups[:, None] * size + torch.arange(size)).flatten()
    return dataclasses.replace(
        experience,
        pictures=pictures.take(of_groups.tolist()),
        picture_advantages=advantages[samples.to(advantages.device)],
    )
