"""Rollout, rewards, advantages: everything of a step before the gradient."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor

from lvrpo import random
from lvrpo.data.example import Example
from lvrpo.data.example import Task as TaskName
from lvrpo.models.flow import FlowSchedule
from lvrpo.models.policy import Policy
from lvrpo.ops.normalize_advantages import AdvantageParams, normalize_advantages
from lvrpo.rewards.combine import Samples, score
from lvrpo.trainer.config import TrainConfig
from lvrpo.trainer.rollout import sample_answers, sample_pictures
from lvrpo.trainer.task import Task
from lvrpo.trainer.update import Experience


def gather_experience(
    policy: Policy,
    reference: Policy,
    task: Task,
    config: TrainConfig,
    schedule: FlowSchedule,
    step: int,
) -> tuple[Experience, dict[str, Any]]:
    """Sample the groups of one step and score them.

    Returns:
        The experience, and metrics: rewards, each reward's share of the advantage variance, the
        fraction of constant groups, times, and "alarm", a list of sentences.
    """
    rollout, seed = config.rollout, config.run.seed
    metrics: dict[str, Any] = {"alarm": []}
    clock = _Clock()
    answers = pictures = None
    if rollout.understand_prompts:
        answers = sample_answers(
            policy,
            task.training_examples("understand", rollout.understand_prompts, step),
            rollout.group_size,
            max_tokens=rollout.max_answer_tokens,
            temperature=rollout.temperature,
            seed=seed,
            step=step,
        )
    if rollout.generate_prompts:
        pictures = sample_pictures(
            policy,
            task.training_examples("generate", rollout.generate_prompts, step),
            rollout.group_size,
            schedule,
            seed=seed,
            step=step,
        )
    metrics["time/rollout"] = clock.lap()

    tables: dict[TaskName, Tensor] = {}
    if answers is not None:
        samples = Samples.of_texts(_repeat(answers.examples, rollout.group_size), answers.texts)
        tables["understand"] = score(task.rewards(reference)["understand"], samples)
        metrics |= task.measure(samples)
    if pictures is not None:
        samples = Samples.of_images(_repeat(pictures.examples, rollout.group_size), pictures.images)
        tables["generate"] = score(task.rewards(reference)["generate"], samples)
        metrics |= task.measure(samples)
    metrics["time/rewards"] = clock.lap()

    advantages: dict[TaskName, Tensor] = {}
    for modality, rewards in tables.items():
        if config.run.shuffle_rewards:
            rewards = shuffle_within_groups(rewards, rollout.group_size, seed, step, modality)
        advantages[modality], reported = _advantages(rewards, modality, config)
        metrics["alarm"] += reported.pop("alarm")
        metrics |= reported
    metrics["time/advantages"] = clock.lap()
    experience = Experience(
        answers, advantages.get("understand"), pictures, advantages.get("generate")
    )
    return experience, metrics


def _advantages(
    rewards: Tensor, modality: TaskName, config: TrainConfig
) -> tuple[Tensor, dict[str, Any]]:
    weights = getattr(config.rewards, modality)
    result = normalize_advantages(
        rewards,
        config.rollout.group_size,
        weights=list(weights.values()),
        params=AdvantageParams.preset(config.rewards.advantage, clip=config.loss.advantage_clip),
        backend=config.run.backend or None,
    )
    stats = result.stats
    metrics: dict[str, Any] = {"alarm": []}
    for k, name in enumerate(weights):
        metrics[f"reward/{modality}/{name}"] = float(stats.mean[k])
        metrics[f"share/{modality}/{name}"] = float(stats.share[k])
        metrics[f"constant_groups/{modality}/{name}"] = float(stats.constant_groups[k])
    zero = result.values.view(-1, config.rollout.group_size).eq(0).all(dim=1)
    metrics[f"constant_groups/{modality}"] = float(zero.float().mean())
    if bool(stats.all_zero):
        metrics["alarm"].append(f"every {modality} advantage is zero: this step teaches nothing")
    return result.values, metrics


def shuffle_within_groups(
    rewards: Tensor, group_size: int, seed: int, step: int, modality: str
) -> Tensor:
    """The control experiment: each sample gets the rewards of a random sample of its group.

    Args:
        rewards: [P * G, K].
        group_size: G.
        seed: of the run; with `step` and `modality` it fixes the permutation.
        step: see `seed`.
        modality: see `seed`.
    """
    groups = rewards.view(-1, group_size, rewards.shape[1])
    keys = random.stream(seed, "shuffle", step, modality).random(groups.shape[:2])
    order = torch.from_numpy(keys.argsort(axis=1))
    return groups.gather(1, order[:, :, None].expand_as(groups)).reshape(rewards.shape)


def _repeat(examples: list[Example], times: int) -> list[Example]:
    return [example for example in examples for _ in range(times)]


class _Clock:
    def __init__(self) -> None:
        self.last = time.perf_counter()

    def lap(self) -> float:
        now = time.perf_counter()
        elapsed, self.last = now - self.last, now
        return elapsed
