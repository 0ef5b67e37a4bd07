"""Held-out measurement: rules and rewards on one sample for each prompt that was not trained on."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import islice
from typing import Any

import torch

from lvrpo.data.example import Example, FinishReason
from lvrpo.intervals import Mean, clustered_mean
from lvrpo.models.flow import FlowSchedule
from lvrpo.models.protocol import Policy
from lvrpo.rewards.reward import Samples
from lvrpo.rewards.score import score_samples
from lvrpo.trainer.config import TrainConfig
from lvrpo.trainer.journal import GalleryItem
from lvrpo.trainer.task import Checks, Rewards, Task

#: Prompts evaluated at once; bounds the memory, changes no number.
CHUNK = 256
#: Evaluation samples come from streams of their own, the same before and after training.
EVALUATION_STEP = -1


def evaluate(
    policy: Policy,
    task: Task,
    rewards: Rewards,
    config: TrainConfig,
    schedule: FlowSchedule,
    *,
    items: int,
    gallery_items: int = 12,
    seed: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[dict[str, Any], list[GalleryItem]]:
    """One sampled answer or drawing for each of `items` held-out prompts per skill.

    Args:
        policy: what is measured; it samples as in training, at the same temperature and noise.
        task: gives the prompts and judges the samples.
        rewards: to report the means of; may be empty.
        config: in force: how is sampled and scored.
        schedule: of the denoising.
        items: prompts per skill.
        gallery_items: how many of them, in all, are returned as pictures.
        seed: of the samples.
        progress: told how many prompts are sampled, and of how many.

    Returns:
        Counts and means of rewards, keyed as a row of evals.jsonl, and the gallery.

    Raises:
        RewardError: as in training.
    """
    row: dict[str, Any] = {}
    gallery: list[GalleryItem] = []
    # The same prompts for every seed, before and after.
    questions = task.source.examples("test", "understand", items, 0)
    prompts = task.source.examples("test", "generate", items, 0)
    total = len(questions) + len(prompts)
    if questions:
        texts: list[str] = []
        reasons: list[FinishReason] = []
        for chunk in _chunks(questions):
            answers = policy.sample_texts(
                chunk,
                1,
                max_tokens=config.rollout.max_answer_tokens,
                temperature=config.rollout.temperature,
                seed=seed,
                step=EVALUATION_STEP,
            )
            texts += answers.texts
            reasons += answers.finish_reasons
            progress(len(texts), total)
        samples = Samples.of_texts(questions, texts, reasons)
        row |= task.checks.count(samples) | _reward_means(rewards, samples, config)
        row["truncated/understand"] = float(samples.truncated.float().mean())
        gallery += _gallery(task.checks, samples, seed, gallery_items // 2)
    if prompts:
        images = []
        for chunk in _chunks(prompts):
            drawn = policy.sample_images(chunk, 1, schedule, seed=seed, step=EVALUATION_STEP)
            images.append(drawn.images)
            progress(len(questions) + CHUNK * (len(images) - 1) + len(chunk), total)
        samples = Samples.of_images(prompts, torch.cat(images))
        row |= task.checks.count(samples) | _reward_means(rewards, samples, config)
        gallery += _gallery(task.checks, samples, seed, gallery_items - gallery_items // 2)
    return row, gallery


def _chunks(examples: Sequence[Example]) -> list[Sequence[Example]]:
    return [examples[i : i + CHUNK] for i in range(0, len(examples), CHUNK)]


def _reward_means(rewards: Rewards, samples: Samples, config: TrainConfig) -> dict[str, Any]:
    """The mean of every configured reward, over the samples that it has a score for."""
    skill = samples.examples[0].task
    own = rewards.get(skill, {})
    if not own:
        return {}
    # No larger batches than in training: a reward's time limit is for those.
    size = config.rollout.group_size * getattr(config.rollout, f"{skill}_prompts")
    tables = [
        score_samples(
            own, samples.take(range(start, min(start + size, len(samples)))), config.rewards
        )[0]
        for start in range(0, len(samples), size)
    ]
    clusters = [_asked(example) for example in samples.examples]
    row: dict[str, Any] = {}
    for name, column in zip(own, torch.cat(tables).T.tolist(), strict=True):
        pairs = zip(column, clusters, strict=True)
        known = [(score, cluster) for score, cluster in pairs if not math.isnan(score)]
        if known:
            scores, prompts = zip(*known, strict=True)
            row |= reward_row(skill, name, clustered_mean(scores, prompts))
    return row


def reward_row(task: str, name: str, mean: Mean) -> dict[str, Any]:
    """The keys of an evaluation row that hold the mean of one reward."""
    key = f"{task}/{name}"
    return {
        f"reward/{key}": mean.value,
        f"reward_error/{key}": mean.error,
        f"reward_count/{key}": mean.count,
    }


def _asked(example: Example) -> str:
    """Equal for two prompts that ask for the same: their samples are not independent."""
    if example.task == "generate" and example.rule is None:
        return example.prompt
    assert example.identity is not None
    return example.identity.digest


def _gallery(checks: Checks, samples: Samples, seed: int, count: int) -> list[GalleryItem]:
    items = []
    right = checks.right(samples)
    for i, example in islice(enumerate(samples.examples), count):
        drawn = None if samples.images is None else samples.images[i].numpy()
        shown = drawn if drawn is not None else example.image
        assert shown is not None
        items.append(
            GalleryItem(
                task=example.task,
                uid=example.uid,
                prompt=example.prompt,
                seed=seed,
                image=shown,
                answer=samples.texts[i],
                expected=example.answer,
                right=None if right[i].isnan() else bool(right[i]),
            )
        )
    return items
