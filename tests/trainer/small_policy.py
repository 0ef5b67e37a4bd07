"""A policy in fp64 on the torch backend: equality is to rounding, and about layouts alone."""

from __future__ import annotations

import torch
from torch import Tensor

from lvrpo.data.example import Example, Skill
from lvrpo.digits.phrases import scene_words
from lvrpo.digits.scenes import SceneConfig, scene_examples
from lvrpo.models.flow import FlowSchedule
from lvrpo.models.protocol import Answers, Pictures, Policy
from lvrpo.models.sampling import Sampling
from lvrpo.models.unified.latents import LinearAutoencoder
from lvrpo.models.unified.model import UnifiedConfig, UnifiedModel
from lvrpo.models.unified.policy import UnifiedPolicy
from lvrpo.models.unified.tokenizer import EOS, Tokenizer
from lvrpo.params.flow import FlowLossParams
from lvrpo.params.policy_loss import LossParams
from lvrpo.trainer.experience import Experience
from lvrpo.trainer.objective import Objective

SCHEDULE = FlowSchedule(num_steps=5, window=(0, 2))
GROUP = 3
MAX_TOKENS = 4
TEMPERATURE = 1.3
SAMPLING = Sampling(max_tokens=MAX_TOKENS, temperature=TEMPERATURE)
OBJECTIVE = Objective(
    text=LossParams(beta=0.1),
    image=FlowLossParams(clip_low=0.2, clip_high=0.2, log_ratio_scale=0.5, beta=0.3),
    text_weight=0.7,
    image_weight=1.9,
    temperature=TEMPERATURE,
    max_rows=1 << 20,
)


class WithoutNoise(UnifiedPolicy):
    """Its drawings keep streams."""

    keeps_noise = False


def small_policy(
    dtype: torch.dtype = torch.float64,
    backend: str | None = "torch",
    seed: int = 11,
    *,
    keeps_noise: bool = True,
) -> UnifiedPolicy:
    tokenizer = Tokenizer(scene_words())
    config = UnifiedConfig(
        len(tokenizer),
        hidden=16,
        layers=2,
        heads=2,
        kv_heads=1,
        head_dim=8,
        mlp=24,
        latent_dim=3,
    )
    torch.manual_seed(seed)
    model = UnifiedModel(config).to(dtype)
    for parameter in model.parameters():  # a zero-initialised output would hide everything
        torch.nn.init.normal_(parameter, std=0.2)
    # Logits are nearly equal; with this seed some answers end before the limit, and some do not.
    with torch.no_grad():
        model.head.weight[EOS] *= 60
    autoencoder = LinearAutoencoder(1, 16, 16, patch=8, dim=3).to(dtype)
    family = UnifiedPolicy if keeps_noise else WithoutNoise
    return family(model, tokenizer, autoencoder, (2, 2), tokenizer.word_token_range, backend)


def prompts(task: Skill, count: int, seed: int = 0) -> list[Example]:
    return scene_examples(SceneConfig(), "train", task, count, seed)


def answers(policy: Policy, examples: list[Example], group_size: int = GROUP) -> Answers:
    return policy.sample_texts(examples, group_size, sampling=SAMPLING, seed=7, step=2)


def pictures(policy: Policy, examples: list[Example], group_size: int = GROUP) -> Pictures:
    return policy.sample_images(examples, group_size, SCHEDULE, seed=7, step=2)


def experience(policy: Policy, questions: int, drawings: int) -> Experience:
    """Groups with random advantages."""
    generator = torch.Generator().manual_seed(1)

    def advantages(count: int) -> Tensor:
        return torch.randn(count * GROUP, generator=generator)

    return Experience(
        answers(policy, prompts("understand", questions)) if questions else None,
        advantages(questions) if questions else None,
        pictures(policy, prompts("generate", drawings)) if drawings else None,
        advantages(drawings) if drawings else None,
    )
