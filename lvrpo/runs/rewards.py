"""The rewards that a configuration names."""

from __future__ import annotations

import functools
from itertools import chain

from lvrpo.data.example import SKILLS, Skill
from lvrpo.data.sources import SceneSource, Source
from lvrpo.rewards.combine import load_reward
from lvrpo.runs.inputs import reward_label
from lvrpo.trainer.config import ConfigError, TrainConfig

#: Rewards that come with lvrpo; any other name is imported as "module:function".
BUILT_IN = ("r_ins", "r_sem", "r_kn")

#: A user's file is executed once, however often its function is named.
own_reward = functools.cache(load_reward)


def used_rewards(config: TrainConfig) -> dict[Skill, dict[str, float]]:
    """Rewards with their weights, of the tasks that have prompts in a step."""
    return {
        task: getattr(config.rewards, task)
        for task in SKILLS
        if getattr(config.rollout, f"{task}_prompts")
    }


def check_rewards(config: TrainConfig, source: Source) -> None:
    """See that every reward exists and applies to the data.

    Raises:
        ConfigError: an unknown name, two of one name, or r_sem without digit scenes.
        RewardError: a reward of the user's cannot be imported.
    """
    used = set(chain.from_iterable(used_rewards(config).values()))
    labels: dict[str, str] = {}
    for name in sorted(used):
        other = labels.setdefault(reward_label(name), name)
        if other != name:
            raise ConfigError(
                f"rewards: {other!r} and {name!r} would both be reported as "
                f"{reward_label(name)!r}; rename one of the files"
            )
    for name in chain.from_iterable(used_rewards(config).values()):
        if ":" in name:
            own_reward(name)
        elif name not in BUILT_IN:
            raise ConfigError(
                f"rewards: unknown reward {name!r}; expected one of {', '.join(BUILT_IN)} or "
                "'module:function'"
            )
        elif name == "r_sem" and not isinstance(source, SceneSource):
            raise ConfigError(
                "rewards: r_sem comes with an encoder of digit scenes; with data.source = "
                f"{config.data.source!r} set rewards.generate to r_ins where drawings have rules, "
                "or to a reward of your own ('module:function')"
            )
