"""Samples for a reader to look at: what a prompt was, what came of it, and what it scored."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from lvrpo.rewards.registry import reward_label
from lvrpo.rewards.reward import Samples
from lvrpo.trainer.journal import GalleryItem

#: Prompts of each skill that are shown of a step, and samples of each.
PROMPTS, SAMPLES = 2, 4


def gallery_item(
    samples: Samples,
    row: int,
    seed: int,
    *,
    right: bool | None = None,
    scores: Mapping[str, float | None] | None = None,
) -> GalleryItem:
    """One sample.

    Args:
        samples: of one skill.
        row: of the sample.
        seed: of the sampling.
        right: the judge's verdict.
        scores: of each reward by label.
    """
    example = samples.examples[row]
    shown, source = example.image, None
    if samples.images is not None:
        shown, source = samples.images[row].numpy(), example.image
    return GalleryItem(
        task=example.task,
        uid=example.uid,
        prompt=example.prompt,
        seed=seed,
        image=shown,
        answer=samples.texts[row],
        expected=example.answer,
        right=right,
        source=source,
        scores=scores or {},
    )


def training_samples(
    samples: Samples, scores: Tensor, weights: Mapping[str, float], seed: int
) -> list[GalleryItem]:
    """Some samples of the first prompts, each time from the best to the worst.

    Args:
        samples: of one skill, in groups.
        scores: [B, K] of them, NaN for none.
        weights: of the K rewards by name.
        seed: of the run.
    """
    labels = list(map(reward_label, weights))
    total = (scores * torch.tensor(list(weights.values()))).nansum(dim=1)
    items = []
    for group in samples.groups()[:PROMPTS]:
        order = total[group.start : group.stop].argsort(descending=True, stable=True)
        count = min(SAMPLES, len(group))
        places = torch.linspace(0, len(group) - 1, count).round().long()
        for row in (group.start + order[places]).tolist():
            found = zip(labels, scores[row].tolist(), strict=True)
            told = {label: None if math.isnan(score) else score for label, score in found}
            items.append(gallery_item(samples, row, seed, scores=told))
    return items
