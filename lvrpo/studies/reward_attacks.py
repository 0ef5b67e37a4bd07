"""How well the rewards of a run tell right drawings from drawings made to please them.

Each attack is set against the right drawing of the same held-out prompt. A reward under which an
attack wins can be raised without drawing what was asked for.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from lvrpo import random
from lvrpo.data.example import Example, Picture
from lvrpo.data.jsonl import DataError
from lvrpo.rewards.parts import Verdicts
from lvrpo.rewards.reward import Reward, Samples
from lvrpo.rewards.semantic import SemanticReward
from lvrpo.runs.directory import RunDirectoryError
from lvrpo.runs.inference import load_reference, read_run
from lvrpo.runs.setup import Setup
from lvrpo.studies.attacks import ascend, plain_attacks, scores_of, search
from lvrpo.trainer.placement import place_frozen

RIGHT = "right drawing"
_QUERIES, _STEPS = 200, 60  # of a search and of an ascent
_SEARCHED = 16  # prompts: a query of the answerer costs what a forward pass costs


@dataclass(frozen=True)
class RewardUnderAttack:
    """One reward of one kind of drawing.

    Attributes:
        mean: of its scores.
        right: mean score of the right drawings of the same prompts.
        wins: share of the prompts in which the attack scores above the right drawing.
        count: of prompts that have a score of both; where there is none, the others are None.
    """

    mean: float | None
    right: float | None
    wins: float | None
    count: int


@dataclass(frozen=True)
class Attack:
    """One kind of drawing, of the prompts that it can be made for.

    Attributes:
        name: of the kind.
        count: of prompts.
        strict: shares of drawings that are right after all, by reader: the judge, "gold"; None
            where nothing tells.
        rewards: by label.
    """

    name: str
    count: int
    strict: Mapping[str, float | None]
    rewards: Mapping[str, RewardUnderAttack]


@dataclass(frozen=True)
class RewardAttacks:
    """The result of the study.

    Attributes:
        items: drawing prompts.
        seed: of the attacks.
        attacks: the right drawings first.
    """

    items: int
    seed: int
    attacks: Sequence[Attack]

    def lines(self) -> list[str]:
        """A table: mean score and share of prompts won of each reward; then who finds it right."""
        labels, readers = list(self.attacks[0].rewards), list(self.attacks[0].strict)
        wide = max(len(attack.name) for attack in self.attacks)
        head = "".join(f"  {label:>14}" for label in labels)
        head += "".join(f"  {reader:>7}" for reader in readers)
        lines = [f"{'drawing':<{wide}}  prompts{head}"]
        for attack in self.attacks:
            cells = "".join(
                f"  {_shown(each.mean, '.3f', 6)} {_shown(each.wins, '.1%', 7)}"
                for each in attack.rewards.values()
            )
            cells += "".join(f"  {_shown(share, '.1%', 7)}" for share in attack.strict.values())
            lines.append(f"{attack.name:<{wide}}  {attack.count:7}{cells}")
        return lines

    def to_json(self) -> str:
        """All of it."""
        return json.dumps(asdict(self), indent=1, allow_nan=False)


def reward_attacks(
    directory: Path, *, items: int, seed: int, device: str | None = None
) -> RewardAttacks:
    """Attack every reward of drawings that a run has, as it was during its training.

    Args:
        directory: of a run whose warm start is finished: its end is the frozen answerer.
        items: held-out drawing prompts.
        seed: of the attacks; the prompts are those of an evaluation.
        device: in place of `run.device`; None for that.

    Raises:
        ConfigError: there is no such device here.
        DataError: no held-out drawing prompt has a target to set an attack against.
        RewardError: a reward cannot be made, or fails.
        RunDirectoryError: no run, its warm start goes on, or it has no reward of drawings.
    """
    setup, parts = read_run(directory, device)
    task = setup.task(parts)
    reference = load_reference(directory, setup, parts)
    if reference is None:
        raise RunDirectoryError(
            f"{directory} has not finished its warm start, whose end its rewards are made from: "
            f"lvrpo train {directory}"
        )
    reference = place_frozen(reference, setup.config.run)
    rewards = task.make_rewards(reference).get("generate", {})
    if not rewards:
        raise RunDirectoryError(f"{directory} has no rewards of drawings: it draws nothing")
    found = task.source.examples("test", "generate", items, 0)
    examples = [example for example in found if example.target is not None]
    if not examples:
        raise DataError(f"{directory}: no held-out drawing prompt has a target to compare with")
    right = _stacked([example.target for example in examples])
    readers = {"judge": setup.data.rules.check, **setup.checks.audits}
    right_scores = {name: scores_of(r, examples, right) for name, r in rewards.items()}
    attacks = [
        _measured(name, at, drawings, examples, rewards, right_scores, readers)
        for name, at, drawings in _drawings(setup, examples, right, rewards, seed)
    ]
    return RewardAttacks(len(examples), seed, attacks)


def _drawings(
    setup: Setup,
    examples: Sequence[Example],
    right: Tensor,
    rewards: Mapping[str, Reward],
    seed: int,
) -> Iterator[tuple[str, list[int], Tensor]]:
    """Names, the prompts each is made for, and [N, C, H, W] drawings."""
    every = list(range(len(examples)))
    yield RIGHT, every, right
    shape = setup.data.source.picture_shape
    plain = plain_attacks(len(examples), shape, random.stream(seed, "noise"))
    for name, drawings in plain.items():
        yield name, every, drawings
    starts = {"blank": torch.zeros_like(right)}
    if len(examples) > 1:
        starts["another prompt's drawing"] = right.roll(1, 0)
        yield "another prompt's drawing", every, right.roll(1, 0)
    for name, made in setup.data.attacks(examples, seed).items():
        yield name, list(made), _stacked(list(made.values()))
    some = every[:_SEARCHED]
    for label, reward in rewards.items():
        for name, start in starts.items():
            rng = random.stream(seed, "search", label, name)
            found = search(reward, examples[:_SEARCHED], start[some], rng, _QUERIES)
            yield f"search for {label} from {name}", some, found
            if isinstance(reward, SemanticReward):
                found = ascend(reward, examples, start, _STEPS)
                yield f"ascent of {label} from {name}", every, found


def _measured(
    name: str,
    at: Sequence[int],
    drawings: Tensor,
    examples: Sequence[Example],
    rewards: Mapping[str, Reward],
    right_scores: Mapping[str, Tensor],
    readers: Mapping[str, Callable[[Samples], Verdicts]],
) -> Attack:
    asked = [examples[i] for i in at]
    samples = Samples.of_images(asked, drawings)
    return Attack(
        name,
        len(asked),
        {who: _mean(read(samples).strict) for who, read in readers.items()},
        {
            label: _compared(scores_of(reward, asked, drawings), right_scores[label][list(at)])
            for label, reward in rewards.items()
        },
    )


def _compared(scores: Tensor, right: Tensor) -> RewardUnderAttack:
    both = ~(scores.isnan() | right.isnan())
    scores, right = scores[both], right[both]
    wins = (scores > right).float()
    return RewardUnderAttack(_mean(scores), _mean(right), _mean(wins), len(wins))


def _mean(values: Tensor) -> float | None:
    mean = float(values.nanmean())
    return None if math.isnan(mean) else mean


def _shown(value: float | None, form: str, width: int) -> str:
    return f"{'-' if value is None else format(value, form):>{width}}"


def _stacked(pictures: Sequence[Picture | None]) -> Tensor:
    return torch.stack([torch.from_numpy(picture) for picture in pictures if picture is not None])
