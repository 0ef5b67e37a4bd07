"""Rollout, rewards, advantages: everything of a step before the gradient."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lvrpo import random
from lvrpo.data.example import Example, Skill
from lvrpo.models.flow import FlowSchedule
from lvrpo.models.protocol import Answers, Pictures, Policy
from lvrpo.ops.normalize_advantages import normalize_advantages
from lvrpo.params.advantages import AdvantageParams
from lvrpo.rewards.registry import reward_label
from lvrpo.rewards.reward import Samples
from lvrpo.rewards.score import score_samples
from lvrpo.trainer.config import TrainConfig
from lvrpo.trainer.correction import correct_sampler, truncation_metrics
from lvrpo.trainer.resampling import Groups, resample
from lvrpo.trainer.sampling import answer_sampling
from lvrpo.trainer.schedule import flow_guidance
from lvrpo.trainer.task import Rewards, Task, further_examples, mean_scores, training_examples


@dataclass(frozen=True)
class Experience:
    """One rollout with its advantages, on the policy's device: what an update learns from."""

    answers: Answers | None
    answer_advantages: Tensor | None  # [P_text * G]
    pictures: Pictures | None
    picture_advantages: Tensor | None  # [P_image * G]
    token_weights: Tensor | None = None  # [T] factors of the policy term of the answers' tokens


def gather_experience(
    policy: Policy,
    task: Task,
    rewards: Rewards,
    config: TrainConfig,
    schedule: FlowSchedule,
    step: int,
) -> tuple[Experience, dict[str, Any]]:
    """Sample the groups of one step and score them.

    Args:
        policy: that samples.
        task: its prompts and checks.
        rewards: of the skills that are trained.
        config: in force.
        schedule: of the denoising.
        step: number of this step; with the run's seed it fixes every draw.

    Returns:
        The experience, and metrics: rewards, each reward's share of the advantage variance, the
        fraction of constant groups, times, and "alarm", a list of sentences.

    Raises:
        DivergedError: what the policy sampled is not finite; no reward has seen it.
        RewardError: see `score_samples`.
    """
    rollout, seed = config.rollout, config.run.seed
    metrics: dict[str, Any] = {"alarm": []}
    clock = _Clock()
    answers = pictures = None

    def sample_texts(examples: list[Example]) -> Answers:
        sampling = answer_sampling(rollout)
        return policy.sample_texts(
            examples, rollout.group_size, sampling=sampling, seed=seed, step=step
        )

    def sample_images(examples: list[Example]) -> Pictures:
        return policy.sample_images(
            examples,
            rollout.group_size,
            schedule,
            guidance=flow_guidance(rollout),
            seed=seed,
            step=step,
        )

    if rollout.understand_prompts:
        answers = sample_texts(_prompts(task, "understand", config, step))
    if rollout.generate_prompts:
        pictures = sample_images(_prompts(task, "generate", config, step))
    metrics["time/rollout"] = clock.lap()

    tables: dict[Skill, Tensor] = {}
    sampled: dict[Skill, Answers | Pictures | None] = {"understand": answers, "generate": pictures}
    for skill, groups in sampled.items():
        if groups is not None:
            samples = _samples_of(groups)
            tables[skill], reported = score_samples(rewards[skill], samples, config.rewards)
            _merge(metrics, reported | mean_scores(task.checks, samples))
    metrics["time/rewards"] = clock.lap()

    if rollout.resample_rounds:
        more = _Resampling(task, rewards, config, step, metrics)
        if answers is not None:
            answers, tables["understand"] = more.of(answers, tables["understand"], sample_texts)
        if pictures is not None:
            pictures, tables["generate"] = more.of(pictures, tables["generate"], sample_images)
        metrics["time/resampling"] = clock.lap()

    advantages: dict[Skill, Tensor] = {}
    for skill, table in tables.items():
        if config.run.shuffle_rewards:
            table = shuffle_within_groups(table, rollout.group_size, seed, step, skill)
        # A drawing is as long as any other.
        lengths = [1] * len(table)
        if skill == "understand" and answers is not None:
            lengths = [len(ids) for ids in answers.token_ids]
        advantages[skill], reported = _advantages(table, lengths, skill, config)
        _merge(metrics, reported)
    if answers is not None and config.rewards.truncated == "mask":
        kept = ~_samples_of(answers).truncated
        advantages["understand"] = advantages["understand"][kept]
        answers = answers.where(kept)
    moved = {skill: values.to(policy.device) for skill, values in advantages.items()}
    metrics["time/advantages"] = clock.lap()
    weights = None
    if answers is not None:
        metrics |= truncation_metrics(answers)
        answers, weights, reported = correct_sampler(policy, answers, config)
        metrics |= reported
    experience = Experience(
        answers, moved.get("understand"), pictures, moved.get("generate"), weights
    )
    return experience, metrics


def _prompts(task: Task, skill: Skill, config: TrainConfig, step: int) -> list[Example]:
    count, hook = getattr(config.rollout, f"{skill}_prompts"), task.curriculum
    drawn = count * (hook.pool if hook else 1)
    examples = training_examples(task.source, skill, drawn, config.run.seed, step)
    return hook.pick(examples, count, step - config.warm_start.steps) if hook else examples


@dataclass(frozen=True)
class _Resampling:
    """Other prompts for groups without a signal, see `resample`."""

    task: Task
    rewards: Rewards
    config: TrainConfig
    step: int
    metrics: dict[str, Any]

    def of(
        self, groups: Groups, table: Tensor, sample: Callable[[list[Example]], Groups]
    ) -> tuple[Groups, Tensor]:
        """The groups of one skill that are learned from, and their scores."""
        skill, config = groups.examples[0].task, self.config

        def draw(turn: int, count: int, seen: set[str]) -> Groups | None:
            key = {"seed": config.run.seed, "step": self.step, "turn": turn}
            hook = self.task.curriculum
            drawn = count * (hook.pool if hook else 1)
            examples = further_examples(self.task.source, skill, drawn, seen, **key)
            if hook and examples:
                examples = hook.pick(examples, count, self.step - config.warm_start.steps)
            return sample(examples) if examples else None

        def rate(more: Groups) -> Tensor:
            scores, found = score_samples(self.rewards[skill], _samples_of(more), config.rewards)
            self.metrics["alarm"] += found["alarm"]
            return scores

        chosen, scores, found = resample(
            groups,
            table,
            weights=list(getattr(config.rewards, skill).values()),
            rounds=config.rollout.resample_rounds,
            draw=draw,
            rate=rate,
        )
        self.metrics.update({f"resampling/{name}/{skill}": value for name, value in found.items()})
        return chosen, scores


def _samples_of(groups: Answers | Pictures) -> Samples:
    examples = _repeat(groups.examples, groups.group_size)
    if isinstance(groups, Pictures):
        return Samples.of_images(examples, groups.images)
    return Samples.of_texts(examples, groups.texts, groups.finish_reasons)


def _merge(metrics: dict[str, Any], found: dict[str, Any]) -> None:
    alarms = [*metrics["alarm"], *found.get("alarm", ())]
    metrics |= found
    metrics["alarm"] = alarms


def _advantages(
    rewards: Tensor, lengths: list[int], skill: Skill, config: TrainConfig
) -> tuple[Tensor, dict[str, Any]]:
    weights = getattr(config.rewards, skill)
    result = normalize_advantages(
        rewards,
        config.rollout.group_size,
        weights=list(weights.values()),
        lengths=lengths,
        params=AdvantageParams.preset(config.rewards.advantage, clip=config.loss.advantage_clip),
        backend=config.run.backend or None,
    )
    stats = result.stats
    metrics: dict[str, Any] = {"alarm": []}
    for k, name in enumerate(map(reward_label, weights)):
        metrics[f"reward/{skill}/{name}"] = float(stats.mean[k])
        metrics[f"share/{skill}/{name}"] = float(stats.share[k])
        metrics[f"constant_groups/{skill}/{name}"] = float(stats.constant_groups[k])
    zero = result.values.view(-1, config.rollout.group_size).eq(0).all(dim=1)
    metrics[f"constant_groups/{skill}"] = float(zero.float().mean())
    if bool(stats.all_zero):
        metrics["alarm"].append(f"every {skill} advantage is zero: this step teaches nothing")
    return result.values, metrics


def shuffle_within_groups(
    rewards: Tensor, group_size: int, seed: int, step: int, skill: str
) -> Tensor:
    """The control experiment: each sample gets the rewards of a random sample of its group.

    Args:
        rewards: [P * G, K].
        group_size: G.
        seed: of the run; with `step` and `skill` it fixes the permutation.
        step: see `seed`.
        skill: see `seed`.
    """
    groups = rewards.view(-1, group_size, rewards.shape[1])
    keys = random.stream(seed, "shuffle", step, skill).random(groups.shape[:2])
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
