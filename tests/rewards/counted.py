"""A reward that counts what it is asked, in a module that another process can import."""

from __future__ import annotations

import numpy as np

from lvrpo.data.example import Example
from lvrpo.rewards.cache import CachedReward
from lvrpo.rewards.reward import Samples

IMAGE = np.zeros((1, 8, 8), np.float32)


def texts(*given):
    examples = [Example("understand", f"q{t}", "what", image=IMAGE, answer="1") for t in given]
    return Samples.of_texts(examples, given)


class Counted:
    """Lengths of texts, brightnesses of drawings; NaN for "?"."""

    name, may_be_nan = "counted", True

    def __init__(self):
        self.asked = []

    def __call__(self, samples):
        drawn = dict(
            zip(samples.image_index, () if samples.images is None else samples.images, strict=True)
        )
        self.asked.append(len(samples))
        return [
            float(drawn[at].mean()) if text is None else None if text == "?" else float(len(text))
            for at, text in enumerate(samples.texts)
        ]


def fill(path, seed):
    reward = CachedReward(Counted(), path)
    for at in range(20):
        found = reward(texts(*("x" * ((seed * 7 + at * 3 + i) % 40 + 1) for i in range(10))))
        assert found.tolist() == [(seed * 7 + at * 3 + i) % 40 + 1 for i in range(10)]
