"""What a run learns, as data: prompts, what is right, how a policy and its rewards are made."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from lvrpo import random
from lvrpo.data.example import Example, Skill
from lvrpo.data.sources import LabelErrors, Source
from lvrpo.models.protocol import Policy
from lvrpo.rewards.reward import Reward, Samples
from lvrpo.trainer.config import WarmStartSection
from lvrpo.trainer.curriculum import Curriculum

#: Of a drawing prompt in the warm start, each with a picture, noise and time of its own; the prompt
#: is computed once for all.
TARGETS_PER_PROMPT = 4
#: The rewards of each skill that is trained, by the names they are reported under, in the order of
#: the configuration's weights.
Rewards = Mapping[Skill, Mapping[str, Reward]]


class Checks(Protocol):
    """What is watched and never trained on."""

    def scores(self, samples: Samples) -> Mapping[str, Tensor]:
        """Scores of samples of one skill by measure, each [B] fp32, NaN where nothing tells.

        "right" (0 or 1) is always there; "partial" (0 to 1) and "gold" (0 or 1, by a reader that no
        reward uses) where there are any.
        """


@dataclass(frozen=True)
class Task:
    """Everything of a run that is fixed before its first step.

    Args:
        source: of the prompts.
        checks: of the samples.
        new_policy: makes a policy with the weights that the run begins with, the same every time.
        make_rewards: from the frozen policy of the end of the warm start, once in a run.
        fingerprint: of the parts that weights are made for, so that foreign weights can be told.
        curriculum: chooses the prompts of a step; None takes them as they are drawn.
    """

    source: Source
    checks: Checks
    new_policy: Callable[[], Policy]
    make_rewards: Callable[[Policy], Rewards]
    fingerprint: str
    curriculum: Curriculum | None = None


def mean_scores(scores: Mapping[str, Tensor], skill: Skill) -> dict[str, float]:
    """Metrics of what `Checks` found of a batch; those that nothing tells of are left out."""
    means = {
        f"{'strict' if name == 'right' else name}/{skill}": float(column.nanmean())
        for name, column in scores.items()
    }
    return {name: value for name, value in means.items() if not math.isnan(value)}


def training_examples(
    source: Source, skill: Skill, count: int, seed: int, step: int
) -> list[Example]:
    """Prompts of one policy step; `seed` is the run's."""
    return source.examples("train", skill, count, _seed(seed, "policy", step))


def further_examples(
    source: Source, skill: Skill, count: int, seen: Set[str], *, seed: int, step: int, turn: int
) -> list[Example]:
    """At most `count` other prompts of one policy step.

    Args:
        source: of the prompts.
        skill: of them.
        count: most of them.
        seen: uids of those that the step has already.
        seed: of the run.
        step: number of this step.
        turn: how often the step has asked, from 1.
    """
    # As many more as may turn out to be there already.
    drawn = source.examples(
        "train", skill, count + len(seen), _seed(seed, "policy", step, "further", turn)
    )
    others = {example.uid: example for example in drawn if example.uid not in seen}
    return list(others.values())[:count]


def warm_start_examples(
    source: Source, section: WarmStartSection, seed: int, step: int
) -> tuple[list[Example], list[list[Example]]]:
    """Questions, and groups of drawings of one prompt, of one supervised step.

    Some of their labels are wrong on purpose, independently within a group.

    Args:
        source: of the prompts.
        section: how many, and how wrong.
        seed: of the run.
        step: number of this step.
    """
    drawn = _seed(seed, "warm start", step)
    errors = LabelErrors(section.label_bias, section.label_noise)
    questions = source.labelled("understand", section.understand_batch, errors, drawn)
    drawings = source.labelled(
        "generate",
        section.generate_batch,
        errors,
        drawn,
        copies=TARGETS_PER_PROMPT,
    )
    return [group[0] for group in questions], drawings


def _seed(seed: int, *ids: int | str) -> int:
    return int(random.stream(seed, *ids).integers(1 << 62))
