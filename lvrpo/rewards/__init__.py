"""Rewards: instruction following, semantic grounding, knowledge consistency, and your own."""

from lvrpo.info import require

require("einops", "numpy")

from lvrpo.rewards.combine import (
    FunctionReward,
    Reward,
    RewardError,
    Truncated,
    load_reward,
    score,
)
from lvrpo.rewards.dual_encoder import DualEncoder, train_dual_encoder
from lvrpo.rewards.judge import digit_judge, gold_reader, read_pictures, reader_accuracy
from lvrpo.rewards.knowledge import KnowledgeReward
from lvrpo.rewards.rules import RuleChecks, RuleReward, check_samples
from lvrpo.rewards.samples import FinishReason, Samples
from lvrpo.rewards.semantic import SemanticReward

__all__ = [
    "DualEncoder",
    "FinishReason",
    "FunctionReward",
    "KnowledgeReward",
    "Reward",
    "RewardError",
    "RuleChecks",
    "RuleReward",
    "Samples",
    "SemanticReward",
    "Truncated",
    "check_samples",
    "digit_judge",
    "gold_reader",
    "load_reward",
    "read_pictures",
    "reader_accuracy",
    "score",
    "train_dual_encoder",
]
