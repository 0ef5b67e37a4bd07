"""Drawings of clothes: photos to learn from, a reward that is not trained here, and a judge.

The unified model learns to draw by flow matching on photos, then by LVRPO with `ClassNamesReward`.
The judge sees pixels and is fitted on other photos; nothing is trained on what it says.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from lvrpo.real import fashion_mnist
from lvrpo.real.fashion_mnist import Photos
from lvrpo.rewards.reward import Samples

#: What each class is called, in the order of `fashion_mnist.CLASSES`.
WORDS = (
    *("t-shirt", "trousers", "pullover", "dress", "coat"),
    *("sandal", "shirt", "sneaker", "bag", "ankle boot"),
)
#: Photos of each split that are drawn after: where they begin, how many.
DRAWN = {"train": (0, 3000), "validation": (0, 500), "test": (0, 500)}
#: Photos of the training split that the judge is fitted on, behind those that are drawn after.
JUDGED = slice(10_000, 15_000)

CONFIG = r"""# The unified model draws clothes: after photos, then for a reward that names them.
# docs/recipes/drawing.md has what comes of it.

[run]
steps = 40
checkpoint_every = 20
keep_checkpoints = 1
eval_items = 300
frontier_items = 0

[data]
source = "drawings/train.jsonl"
eval_source = "drawings/test.jsonl"
validation_source = "drawings/validation.jsonl"
channels = 1
height = 28
width = 28

[model]
image_patch = 7
latent_patch = 28  # the whole picture, so that there are no seams
latent_tokens_per_patch = 8
latent_dim = 8

[warm_start]
steps = 500
understand_batch = 0
generate_batch = 16

[rollout]
group_size = 8
understand_prompts = 0
generate_prompts = 8
window = "first"

[rewards]
generate = { "lvrpo.real.class_names:ClassNamesReward" = 1.0 }
right = { generate = "lvrpo.real.drawings:Judge" }

[rewards.arguments."lvrpo.real.class_names:ClassNamesReward"]
words = WORDS
folder = FOLDER
negative = true  # the photos are light on black, those of ImageNet seldom are

[rewards.arguments."lvrpo.real.drawings:Judge"]
folder = FOLDER

[optimizer]
lr = 3e-4
warmup_steps = 2
minibatches = 1
"""


@dataclass(frozen=True)
class Judge:
    """1 where a support vector machine on pixels sees the word that is asked for, else 0.

    Args:
        folder: see `fashion_mnist.load`.

    Raises:
        FileNotFoundError: there are no photos; says what to install.
    """

    folder: str
    name: str = field(default="judge", init=False)
    machine: Any = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        from sklearn.svm import SVC

        photos = fashion_mnist.load(Path(self.folder))["train"][JUDGED]
        pixels = photos.images.reshape(len(photos.labels), -1) / np.float32(255)
        object.__setattr__(self, "machine", SVC(C=10.0).fit(pixels, photos.labels))

    def __call__(self, samples: Samples) -> list[float]:
        """[B], of drawings of one channel."""
        assert samples.images is not None
        seen = self.machine.predict(samples.images.flatten(1).numpy())
        asked = (example.extra["word"] for example in samples.examples)
        return [float(WORDS[k] == word) for k, word in zip(seen, asked, strict=True)]


def write(folder: Path, photos: Mapping[str, Photos]) -> None:
    """`drawings.toml`, and the folder `drawings` with the prompts and photos that it names.

    Args:
        folder: of all, where Fashion-MNIST was unpacked.
        photos: by split, see `fashion_mnist.load`.
    """
    for split, (first, count) in DRAWN.items():
        lines = [*_lines(folder / "drawings", split, photos[split][first : first + count])]
        (folder / f"drawings/{split}.jsonl").write_text("".join(lines))
    # A list and a string of JSON are those of TOML.
    config = CONFIG.replace("WORDS", json.dumps(WORDS))
    config = config.replace("FOLDER", json.dumps(str(folder.resolve())))
    (folder / "drawings.toml").write_text(config)


def _lines(folder: Path, split: str, photos: Photos) -> Iterator[str]:
    """Lines of a JSONL file; the photos that they name are written."""
    from PIL import Image

    (folder / split).mkdir(parents=True, exist_ok=True)
    for number, (image, label) in enumerate(zip(photos.images, photos.labels, strict=True)):
        path = folder / split / f"{number:05d}.png"
        Image.fromarray(image).save(path)
        word = WORDS[label]
        row = {"task": "generate", "prompt": f"draw {article(word)}{word}", "word": word}
        row |= {"target": str(path.relative_to(folder)), "id": f"{split}-{number}", "kind": word}
        yield json.dumps(row) + "\n"


def article(word: str) -> str:
    """That goes before it, with a blank; none before what is a pair."""
    if word == "trousers":
        return ""
    return "an " if word[0] in "aeiou" else "a "
