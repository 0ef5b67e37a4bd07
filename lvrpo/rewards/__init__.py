"""Rewards: their contract, those that know no data set, and your own."""

from lvrpo.info import require

require("einops", "numpy")

from lvrpo.data.example import FinishReason
from lvrpo.rewards.combine import (
    FunctionReward,
    Reward,
    RewardError,
    Truncated,
    load_reward,
    score,
)
from lvrpo.rewards.knowledge import KnowledgeReward
from lvrpo.rewards.samples import Samples
from lvrpo.rewards.semantic import SemanticReward

__all__ = [
    "FinishReason",
    "FunctionReward",
    "KnowledgeReward",
    "Reward",
    "RewardError",
    "Samples",
    "SemanticReward",
    "Truncated",
    "load_reward",
    "score",
]
