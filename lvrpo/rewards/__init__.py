"""Rewards: their contract, those that know no data set, and your own."""

from lvrpo.info import require

require("numpy")

from lvrpo.data.example import FinishReason
from lvrpo.rewards.answers import RuleReward, check_answers
from lvrpo.rewards.boxes import Box, BoxReward
from lvrpo.rewards.cache import CachedReward
from lvrpo.rewards.detection import ObjectColors, ObjectDetector
from lvrpo.rewards.formats import FormatReward, answer_format
from lvrpo.rewards.geneval import Detection, GenevalReward
from lvrpo.rewards.knowledge import KnowledgeReward
from lvrpo.rewards.matching import MatchReward
from lvrpo.rewards.ocr import OcrReward
from lvrpo.rewards.parts import AnswerProbability, PhraseEncoder, RewardParts, Rules, Verdicts
from lvrpo.rewards.registry import FoundReward, find_reward, load_reward
from lvrpo.rewards.remote import EndpointError, HttpReward
from lvrpo.rewards.reward import FunctionReward, Reward, RewardError, Samples
from lvrpo.rewards.score import Truncated, score
from lvrpo.rewards.semantic import SemanticReward
from lvrpo.rewards.siglip import SiglipReward
from lvrpo.rewards.vqa import VqaReward

__all__ = [
    "AnswerProbability",
    "Box",
    "BoxReward",
    "CachedReward",
    "Detection",
    "EndpointError",
    "FinishReason",
    "FormatReward",
    "FoundReward",
    "FunctionReward",
    "GenevalReward",
    "HttpReward",
    "KnowledgeReward",
    "MatchReward",
    "ObjectColors",
    "ObjectDetector",
    "OcrReward",
    "PhraseEncoder",
    "Reward",
    "RewardError",
    "RewardParts",
    "RuleReward",
    "Rules",
    "Samples",
    "SemanticReward",
    "SiglipReward",
    "Truncated",
    "Verdicts",
    "VqaReward",
    "answer_format",
    "check_answers",
    "find_reward",
    "load_reward",
    "score",
]
