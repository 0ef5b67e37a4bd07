"""A BAGEL policy whose tokens are letters."""

from __future__ import annotations

import string
from collections.abc import Sequence

import numpy as np
import torch
from models.bagel.folder import tiny_autoencoder
from models.bagel.tiny import tiny_bagel

from lvrpo.data.example import Example
from lvrpo.models.bagel import BagelPolicy, PictureSides


class Letters:
    """A `ChatTokenizer`: 27 tokens, then those of the chat, as Qwen2.5 has them at the end."""

    letters = string.ascii_lowercase + " "
    start, end, markers = 40, 41, (42, 43)

    def encode(self, text: str) -> list[int]:
        return [self.letters.index(letter) for letter in text]

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(self.letters[token] for token in ids if token < len(self.letters))


SIDES = PictureSides(stride=4, shortest=8, longest=24)
GRID = (2, 3)


def tiny_policy(
    dtype: torch.dtype = torch.float64, backend: str | None = "torch", seed: int = 0
) -> BagelPolicy:
    module = tiny_bagel(dtype, seed)
    with torch.no_grad():  # some answers are to end before the limit
        module.head.weight[Letters.end] *= 3
    autoencoder = tiny_autoencoder(dtype).eval().requires_grad_(False)
    return BagelPolicy(module, Letters(), autoencoder, GRID, (0, 42), SIDES, backend)


def questions(count: int, seed: int = 0) -> list[Example]:
    """Each with a picture of its own size."""
    generator = np.random.default_rng(seed)
    found = []
    for i in range(count):
        height, width = generator.integers(6, 30, 2)
        image = generator.random((3, height, width), dtype=np.float32)
        found.append(
            Example("understand", f"question {i}", letters(generator), image=image, answer="a")
        )
    return found


def requests(count: int, seed: int = 0) -> list[Example]:
    generator = np.random.default_rng(seed + 100)
    return [Example("generate", f"request {i}", letters(generator)) for i in range(count)]


def letters(generator: np.random.Generator) -> str:
    chosen = generator.choice(list(Letters.letters), generator.integers(1, 7))
    return "".join(chosen)
