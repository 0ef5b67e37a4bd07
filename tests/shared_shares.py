"""Random groups of samples that are on random ranks. To be run in every rank."""

from __future__ import annotations

import random
from itertools import chain
from typing import Any

import torch
from mistakes import Mistake
from trainer.fake_family import LinearPolicy
from trainer.test_fake_family import NoChecks, Numbers

from lvrpo.data.example import Example
from lvrpo.models.protocol import Answers, Pictures
from lvrpo.rewards.reward import FunctionReward
from lvrpo.runs.config_file import load_config
from lvrpo.trainer import experience
from lvrpo.trainer.experience import Experience, gather_experience
from lvrpo.trainer.minibatches import own_share
from lvrpo.trainer.ranks import ALONE, Ranks
from lvrpo.trainer.schedule import flow_schedule
from lvrpo.trainer.sharing import SharedPictures, gather_answers, of_rank
from lvrpo.trainer.task import Rewards, Task

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
    of_all = Experience(
        found.answers,
        found.answer_advantages,
        shared,
        found.picture_advantages,
        found.token_weights,
    )
    return _listed(own_share(of_all, ranks))


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
    assert len(found.picture_advantages) == len(uids)
    assert len(found.answer_advantages) == len(tokens)
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


def check_copies() -> None:
    """A step in which prompts come several times is that of one process."""
    assert _sampled_copies(Ranks.joined()) == _sampled_copies(ALONE)


def _sampled_copies(ranks: Ranks) -> tuple[list[list[int]], list[float], list[float]]:
    """Tokens, log-probs and advantages."""
    policy = LinearPolicy.fresh()
    reward = FunctionReward(lambda samples: [len(text or "") for text in samples.texts], "length")
    config = load_config(
        overrides=[
            *("rollout.understand_prompts=14", "rollout.generate_prompts=0"),
            *("rollout.group_size=3", "rewards.understand={length=1.0}"),
        ]
    )
    rewards: Rewards = {"understand": {"length": reward}}
    task = Task(Numbers(), NoChecks(), LinearPolicy.fresh, lambda reference: rewards, "numbers")
    found, _ = gather_experience(
        policy, task, rewards, config, flow_schedule(config.rollout), 1, ranks
    )
    answers = found.answers
    assert answers is not None
    assert found.answer_advantages is not None
    assert len({example.uid for example in answers.examples}) < len(answers.examples)
    return answers.token_ids, answers.logprobs.tolist(), found.answer_advantages.tolist()


def check_shares(seed: int) -> None:
    """All that ranks learn from is the whole, each group once."""
    ranks = Ranks.joined()
    found = ranks.gather(ranks.together(lambda: share(seed)))
    for name, expected in whole(seed).items():
        assert sorted(chain(*(each[name] for each in found))) == sorted(expected), name


#: By what is wrong; every rank makes them.
MISTAKES = {
    "copies of a prompt on any rank": Mistake(
        Ranks.deal,
        "copies.setdefault(example.uid, [])",
        "copies.setdefault(str(i), [])",
        check_copies,
    ),
    "answers in the order of the ranks": Mistake(
        gather_answers, ".take(places(owners))", ".take(range(len(owners)))", check_copies
    ),
    "scores in the order of the ranks": Mistake(
        experience._score, "torch.tensor(places(owners))", "torch.arange(len(owners))", check_copies
    ),
    "advantages of pictures that were sent away": Mistake(
        own_share,
        "torch.tensor(of_pictures) ==",
        "torch.tensor(pictures.owners) ==",
        check_shares,
        {"seed": 5},
    ),
    "every group of answers on every rank": Mistake(
        own_share,
        "np.array(of_answers) == ranks.rank",
        "np.array(of_answers) >= 0",
        check_shares,
        {"seed": 5},
    ),
}


def is_noticed(name: str) -> bool:
    return MISTAKES[name].is_noticed()
