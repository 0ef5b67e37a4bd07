"""Held-out measurement: sampled answers on test digits, drawings of prompts never trained on."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from typing import Any

import torch

from lvrpo.data.example import Example
from lvrpo.models.flow import FlowSchedule
from lvrpo.models.policy import Policy
from lvrpo.rewards.samples import FinishReason, Samples
from lvrpo.trainer.config import RolloutSection
from lvrpo.trainer.records import GalleryItem
from lvrpo.trainer.rollout import sample_answers, sample_pictures
from lvrpo.trainer.task import Task

#: Prompts evaluated at once; bounds the memory, changes no number.
CHUNK = 256
#: Evaluation samples come from streams of their own, the same before and after training.
EVALUATION_STEP = -1


def evaluate(
    policy: Policy,
    task: Task,
    rollout: RolloutSection,
    schedule: FlowSchedule,
    *,
    items: int,
    gallery_items: int,
    seed: int,
) -> tuple[dict[str, Any], list[GalleryItem]]:
    """One sampled answer or drawing for each of `items` held-out prompts per task.

    Args:
        policy: what is measured; it samples as in training, at the same temperature and noise.
        task: gives the prompts and judges the samples.
        rollout: sampling parameters.
        schedule: of the denoising.
        items: prompts per task.
        gallery_items: how many of them, in all, are returned as pictures.
        seed: of the samples.

    Returns:
        Counts keyed as a row of evals.jsonl, and the gallery.
    """
    row: dict[str, Any] = {}
    gallery: list[GalleryItem] = []
    questions = task.evaluation_examples("understand", items)
    if questions:
        texts: list[str] = []
        reasons: list[FinishReason] = []
        for chunk in _chunks(questions):
            answers = sample_answers(
                policy,
                chunk,
                1,
                max_tokens=rollout.max_answer_tokens,
                temperature=rollout.temperature,
                seed=seed,
                step=EVALUATION_STEP,
            )
            texts += answers.texts
            reasons += answers.finish_reasons
        samples = Samples.of_texts(questions, texts, reasons)
        row |= task.count(samples)
        row["truncated/understand"] = float(samples.truncated.float().mean())
        gallery += _gallery(task, samples, seed, gallery_items // 2)
    prompts = task.evaluation_examples("generate", items)
    if prompts:
        images = [
            sample_pictures(policy, chunk, 1, schedule, seed=seed, step=EVALUATION_STEP).images
            for chunk in _chunks(prompts)
        ]
        samples = Samples.of_images(prompts, torch.cat(images))
        row |= task.count(samples)
        gallery += _gallery(task, samples, seed, gallery_items - gallery_items // 2)
    return row, gallery


def _chunks(examples: Sequence[Example]) -> list[Sequence[Example]]:
    return [examples[i : i + CHUNK] for i in range(0, len(examples), CHUNK)]


def _gallery(task: Task, samples: Samples, seed: int, count: int) -> list[GalleryItem]:
    items = []
    right = task.is_right(samples)
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
