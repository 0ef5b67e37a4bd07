"""The rewards that a configuration names."""

from __future__ import annotations

import functools

from lvrpo.data.example import SKILLS, Skill
from lvrpo.rewards.registry import find_reward
from lvrpo.trainer.config import TrainConfig

#: A user's file is executed once, however often its function is named.
imported = functools.cache(find_reward)


def used_rewards(config: TrainConfig) -> dict[Skill, dict[str, float]]:
    """Rewards with their weights, of the skills that have prompts in a step."""
    return {
        skill: getattr(config.rewards, skill)
        for skill in SKILLS
        if getattr(config.rollout, f"{skill}_prompts")
    }
