"""A user's own data set, small: pictures that are dark or light, questions and requests."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from PIL import Image

REWARD = '''
def brightness(samples):
    """Drawings of a light square should be light, those of a dark one dark."""
    wanted = [1.0 if "light" in example.prompt else 0.0 for example in samples.examples]
    drawn = samples.images.mean(dim=(1, 2, 3)).tolist()
    return [1.0 - abs(a - b) for a, b in zip(wanted, drawn)]
'''


def write_own_data(folder: Path) -> list[str]:
    """train.jsonl, test.jsonl, their pictures and reward.py; returns the overrides to use them."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 6), ("test", 3)):
        rows = []
        for i in range(count):
            shade = ("dark", "light")[i % 2]
            for name in ("q", "t"):
                pixels = rng.integers(0, 64, (16, 16, 3)) + 191 * (shade == "light")
                Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{split}-{name}{i}.png")
            question = {"prompt": "is it dark or light", "image": f"{split}-q{i}.png"}
            rows.append({"task": "understand", "answer": shade, **question})
            request = {"prompt": f"draw a {shade} square number {i} of {split}"}
            rows.append({"task": "generate", "target": f"{split}-t{i}.png", **request})
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{split}.jsonl").write_text(lines)
    (folder / "reward.py").write_text(REWARD)
    return [
        f"data.source={folder / 'train.jsonl'}",
        f"data.eval_source={folder / 'test.jsonl'}",
        "data.channels=3",
        "data.height=16",
        "data.width=16",
        f"rewards.generate={{ '{folder / 'reward.py'}:brightness' = 1.0 }}",
    ]
