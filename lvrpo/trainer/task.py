"""What a run learns: its prompts, its rewards, and the frozen parts of its policy."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from lvrpo import random
from lvrpo.data.example import Example
from lvrpo.data.example import Task as TaskName
from lvrpo.data.jsonl import read_jsonl
from lvrpo.data.phrases import scene_words
from lvrpo.data.scenes import SceneConfig, scene_examples, with_label_noise
from lvrpo.models.answering import answer_probability
from lvrpo.models.flow import FlowSchedule
from lvrpo.models.latents import LinearAutoencoder
from lvrpo.models.policy import Policy
from lvrpo.models.tokenizer import Tokenizer
from lvrpo.models.unified import UnifiedConfig, UnifiedModel
from lvrpo.rewards.combine import Reward, Samples, load_reward
from lvrpo.rewards.judge import gold_reader
from lvrpo.rewards.knowledge import KnowledgeReward
from lvrpo.rewards.rules import RuleReward, check_samples
from lvrpo.rewards.semantic import SemanticReward, fit_semantic
from lvrpo.trainer.config import ConfigError, RolloutSection, TrainConfig


def flow_schedule(rollout: RolloutSection) -> FlowSchedule:
    """The schedule that a configuration describes: the first steps stochastic, the rest ODE."""
    return FlowSchedule(
        num_steps=rollout.denoise_steps,
        shift=rollout.shift,
        dynamics=rollout.dynamics,  # type: ignore[arg-type]
        noise_level=rollout.noise_level,
        window=(0, rollout.stochastic_steps - 1),
    )
