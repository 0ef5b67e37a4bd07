"""Whether rewards of docs/recipes/drawing.md tell a right picture from a wrong one, untrained.

A number is how often a photo of a word's class scores above one of another class (the area under
the ROC curve), the mean over the ten words and the least of them; .5 is blind.

    python -m lvrpo.real runs/real
    python benchmarks/real_drawings.py runs/real
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from sklearn.metrics import roc_auc_score
from torch import Tensor

from lvrpo.models.unified.latents import LinearAutoencoder
from lvrpo.real import fashion_mnist, imagenet, minilm
from lvrpo.real.class_names import BATCH, ClassNames, efficientnet_classifier
from lvrpo.real.drawings import WORDS, Judge

PHOTOS = 500
#: Numbers of a codec, in 8 tokens.
DIMS = (8, 16, 32)
#: Names that ConSE takes the mean of.
LIKELIEST = 10


def conse(
    pictures: Tensor,
    classify: Callable[[Tensor], Tensor],
    embed: Callable[[Sequence[str]], Tensor],
    names: Sequence[str],
) -> Tensor:
    """[N, W] cosines of words and the mean of the likeliest names (arXiv:1312.5650)."""
    logits = torch.cat([classify(batch).float() for batch in pictures.split(BATCH)])
    p, at = logits.softmax(dim=1).topk(LIKELIEST)
    of_names, of_words = (embed([f"a photo of a {each}" for each in of]) for of in (names, WORDS))
    seen = torch.nn.functional.normalize((p[..., None] * of_names[at]).sum(dim=1), dim=1)
    return seen @ of_words.T


def say(name: str, scores: Tensor, labels: np.ndarray) -> None:
    """A row of the table."""
    areas = [roc_auc_score(labels == k, scores[:, k]) for k in range(len(WORDS))]
    worst = int(np.argmin(areas))
    print(f"| {name} | {np.mean(areas):.2f} | {areas[worst]:.2f} ({WORDS[worst]}) |", flush=True)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="that `python -m lvrpo.real` wrote")
    folder: Path = parser.parse_args().folder
    data = fashion_mnist.load(folder)
    test, train = (
        torch.from_numpy(data[split].images[:count, None] / np.float32(255))
        for split, count in (("test", PHOTOS), ("train", 1024))
    )
    labels = data["test"].labels[:PHOTOS]
    embed, described = minilm.load(), imagenet.descriptions(folder)
    names = [text.partition(":")[0].partition(",")[0] for text in described]
    eyes = {side: efficientnet_classifier(side, negative=True) for side in (96, 192, 224)}
    for side in (96, 224):
        say(f"ConSE, {side} px", conse(test, eyes[side], embed, names), labels)
    judge = Judge(str(folder)).machine
    for texts, what in ((names, "names"), (described, "names and definitions")):
        say(f"class names, by {what}", ClassNames(WORDS, eyes[192], embed, texts)(test), labels)
    scores = ClassNames(WORDS, eyes[192], embed, described)
    for dim in DIMS:
        codec = LinearAutoencoder.fit(train, train.shape[-1], dim, tokens_per_patch=8)
        kept = codec.decode(codec.encode(test))
        error = (kept - test).square().mean(dim=(1, 2, 3))
        right = (judge.predict(kept.flatten(1).numpy()) == labels).mean()
        say(
            f"of a codec of {8 * dim} numbers ({float(-10 * error.log10().mean()):.1f} dB, "
            f"{100 * right:.1f} % right by the judge)",
            scores(kept),
            labels,
        )


if __name__ == "__main__":
    main()
