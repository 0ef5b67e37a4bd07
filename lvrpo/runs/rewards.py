"""The rewards that a configuration names."""

from __future__ import annotations

import functools

from lvrpo.data.example import SKILLS, Skill
from lvrpo.rewards.combine import load_reward
from lvrpo.trainer.config import TrainConfig

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
