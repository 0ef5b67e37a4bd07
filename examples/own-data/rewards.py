"""A reward of our own, by a column of our own."""

from __future__ import annotations

from PIL import ImageColor

from lvrpo.rewards import Samples


def colour(samples: Samples) -> list[float | None]:
    """How near a drawing's darkest parts are to the colour that `wanted` names, from 0 to 1."""
    scores: list[float | None] = [None] * len(samples)
    drawings = [] if samples.images is None else samples.images
    for at, drawing in zip(samples.image_index, drawings, strict=True):
        named = ImageColor.getrgb(samples.examples[at].extra["wanted"])
        ink = 1 - drawing.mean(dim=0)  # [H, W], 0 where it is white
        seen = (drawing * ink).sum(dim=(1, 2)) / ink.sum().clamp(min=1e-6)
        distance = sum(abs(float(s) - n / 255) for s, n in zip(seen, named[:3], strict=True))
        scores[at] = 1 - distance / 3
    return scores
