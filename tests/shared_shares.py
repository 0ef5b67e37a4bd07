"""Random groups of samples that are on random ranks. To be run in every rank."""

from __future__ import annotations

import random
from typing import Any

import torch

from lvrpo.data.example import Example
from lvrpo.models.protocol import Answers, Pictures
from lvrpo.trainer.experience import Experience
from lvrpo.trainer.minibatches import own_share
from lvrpo.trainer.ranks import Ranks
from lvrpo.trainer.sharing import SharedPictures, of_rank

G, STEPS, TOKENS = 3, 2, 4


def _made(seed: int) -> tuple[Experience, list[int]]:
    """All groups, and who is to have those of pictures, of ranks without a bound."""
    draw, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    texts, images = draw.randint(1, 9), draw.randint(1, 9)
    lengths = [draw.randint(1, 12) for _ in range(texts * G)]
    tokens = torch.arange(sum(lengths), dtype=torch.float32)
    answers = Answers(
        [Example("understand", f"q{i}", "say", answer="x") for i in range(texts)],
        G,
        [part.long().tolist() for part in tokens.split(lengths)],
        [""] * len(lengths),
        tokens,
        ["end"] * len(lengths),
    )
    steps = [torch.randn(images * G, STEPS, TOKENS, 2, generator=generator) for _ in range(3)]
    if seed % 2:  # streams in place of noise
        steps[2] = torch.randint(1 << 40, (images * G, STEPS, 2), generator=generator)
    pictures = Pictures(
        [Example("generate", f"d{i}", "draw") for i in range(images)],
        G,
        torch.zeros(images * G, 1, 2, 2),
        *steps,
        list(range(STEPS)),
        "schedule",
    )
    advantages = torch.arange(texts * G).float(), torch.arange(images * G).float()
    found = Experience(answers, advantages[0], pictures, advantages[1], tokens / 2)
    return found, [draw.randint(0, 99) for _ in range(images)]


def share(seed: int) -> dict[str, list[Any]]:
    """What this rank learns from, when the pictures have been dealt at random."""
    ranks = Ranks.joined()
    found, owners = _made(seed)
    owners = [owner % ranks.size for owner in owners]
    pictures = found.pictures
    assert isinstance(pictures, Pictures)
    mine = pictures.take(of_rank(range(len(owners)), owners, ranks.rank))
    shared = SharedPictures(pictures.examples, owners, mine, ranks.rank)
    experience = Experience(
        found.answers,
        found.answer_advantages,
        shared,
        found.picture_advantages,
        found.token_weights,
    )
    return _listed(own_share(experience, ranks))


def whole(seed: int) -> dict[str, list[Any]]:
    """The same of one process."""
    return _listed(_made(seed)[0])


def _listed(found: Experience) -> dict[str, list[Any]]:
    answers, pictures = found.answers, found.pictures
    assert answers is not None
    assert isinstance(pictures, Pictures)
    assert found.answer_advantages is not None
    assert found.picture_advantages is not None
    assert found.token_weights is not None
    tokens = [tuple(ids) for ids in answers.token_ids]
    logprobs = zip(answers.logprobs.tolist(), found.token_weights.tolist(), strict=True)
    kept = pictures.latents, pictures.velocities, pictures.noise.double()
    steps = torch.cat([each.flatten(1) for each in kept], dim=1)
    uids = [example.uid for example in pictures.examples for _ in range(G)]
    own = [ids for _, group in answers.groups() for ids in group]
    assert own == answers.token_ids
    return {
        "answers": [*zip(tokens, found.answer_advantages.tolist(), strict=True)],
        "tokens": [*logprobs],
        "pictures": [*zip(uids, steps.tolist(), found.picture_advantages.tolist(), strict=True)],
        "rows": [
            *(sum(map(len, group)) for _, group in answers.groups()),
            *[G * STEPS * TOKENS] * len(pictures.examples),
        ],
    }
