"""Drawings made to please a reward, whatever they show: from pixels alone, by search, by gradient.

Nothing here knows what a right drawing is. What is wrong in a way of its own, an extra digit, comes
from the data.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from lvrpo.data.example import Example
from lvrpo.rewards.reward import Reward, Samples
from lvrpo.rewards.score import score
from lvrpo.rewards.semantic import SemanticReward

_GREYS = (0.0, 0.25, 0.5, 0.75, 1.0)
_ASCENT_STEP = 1 / 16  # of the range of a pixel


def plain_attacks(
    count: int, shape: tuple[int, int, int], rng: np.random.Generator
) -> dict[str, Tensor]:
    """Pictures that show nothing, by name, each [count, C, H, W].

    Args:
        count: of pictures.
        shape: [C, H, W] of each.
        rng: of the noise.
    """
    found = {f"grey {level:g}": torch.full((count, *shape), level) for level in _GREYS}
    rows, columns = torch.arange(shape[1])[:, None], torch.arange(shape[2])
    found["checkerboard"] = ((rows + columns) % 2).float().expand(count, *shape).clone()
    found["noise"] = _uniform(rng, count, *shape)
    return found


def search(
    reward: Reward,
    examples: Sequence[Example],
    start: Tensor,
    rng: np.random.Generator,
    queries: int,
) -> Tensor:
    """Random search: a square of one grey level is kept in each drawing that scores higher by it.

    It needs scores alone, as the square attack of Andriushchenko et al. 2020 does.

    Args:
        reward: to please.
        examples: [N], the prompts.
        start: [N, C, H, W] in [0, 1], where the search begins.
        rng: of the squares.
        queries: times that all drawings are scored.

    Returns:
        [N, C, H, W], none of which scores below its start.
    """
    best = start.clone()
    best_scores = scores_of(reward, examples, best)
    height, width = start.shape[2:]
    rows, columns = torch.arange(height)[:, None], torch.arange(width)
    for _ in range(queries):
        side, top, left, level = _uniform(rng, 4, len(start), 1, 1)
        side = 1 + (side**2 * min(height, width) / 2).floor()
        top, left = (top * (height + 1 - side)).floor(), (left * (width + 1 - side)).floor()
        inside = (rows >= top) & (rows < top + side) & (columns >= left) & (columns < left + side)
        tried = torch.where(inside[:, None], level[:, None], best)
        scores = scores_of(reward, examples, tried)
        better = scores > best_scores
        best[better], best_scores[better] = tried[better], scores[better]
    return best


def ascend(
    reward: SemanticReward, examples: Sequence[Example], start: Tensor, steps: int
) -> Tensor:
    """Projected gradient ascent on all pixels (Madry et al. 2018), bounded by [0, 1] alone.

    Args:
        reward: to please, the one whose gradient is known.
        examples: [N], the prompts.
        start: [N, C, H, W] in [0, 1].
        steps: each moves every pixel by a sixteenth.

    Returns:
        [N, C, H, W].
    """
    drawings = start.clone()
    for _ in range(steps):
        drawings.requires_grad_()
        total = reward.similarity(examples, drawings).nansum()
        (gradient,) = torch.autograd.grad(total, drawings)
        drawings = (drawings.detach() + _ASCENT_STEP * gradient.sign()).clamp(0, 1)
    return drawings


def scores_of(reward: Reward, examples: Sequence[Example], drawings: Tensor) -> Tensor:
    """[N] fp32 of one drawing per prompt, NaN where the reward has none."""
    return score([reward], Samples.of_images(examples, drawings))[:, 0]


def _uniform(rng: np.random.Generator, *shape: int) -> Tensor:
    return torch.from_numpy(rng.random(shape, dtype=np.float32))
