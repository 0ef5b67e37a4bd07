"""r_sem of two encoders that nobody here trained: a classifier of photos, and one of texts.

The text encoder says which of the classifier's classes a word may mean,
q_w(k) = softmax over k of cos(word, description of class k) / TEMPERATURE, and a picture scores

    r(x, w) = sum over k of (q_w(k) - mean over all words v of q_v(k)) log p(k | x),

the cross entropy of p from q_w against that from the other words. ConSE (Norouzi et al.,
arXiv:1312.5650) compares the mean of the likeliest names instead, which on small photos says next
to nothing: docs/recipes/drawing.md.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from lvrpo.real import efficientnet, imagenet, minilm
from lvrpo.rewards.reward import Samples

#: Of the cosines; the best of .01, .02, .03, .05 and .1 on 500 validation photos.
TEMPERATURE = 0.05
#: Pictures that the classifier sees at once.
BATCH = 32


@dataclass(frozen=True, eq=False)
class ClassNames:
    """The scores of pictures for words.

    Args:
        words: W, that a picture may be asked for by; a score is against the mean of all.
        classify: [N, C, H, W] pictures in [0, 1] to [N, K] logits.
        embed: texts to unit vectors.
        descriptions: K, of the classes.
    """

    words: Sequence[str]
    classify: Callable[[Tensor], Tensor]
    embed: Callable[[Sequence[str]], Tensor]
    descriptions: Sequence[str]
    weights: Tensor = field(init=False, repr=False)  # [W, K]

    def __post_init__(self) -> None:
        if len(set(self.words)) < max(2, len(self.words)):
            raise ValueError(f"ClassNames: words is {list(self.words)}, expected several, no twins")
        cosines = self.embed(list(self.words)) @ self.embed(list(self.descriptions)).T
        meant = (cosines / TEMPERATURE).softmax(dim=1)
        object.__setattr__(self, "weights", meant - meant.mean(dim=0))

    def __call__(self, pictures: Tensor) -> Tensor:
        """[N, C, H, W] in [0, 1] to [N, W] fp32 scores in nats, which add up to 0."""
        batches = [self.classify(batch).float() for batch in pictures.split(BATCH)]
        return torch.cat(batches).log_softmax(dim=1) @ self.weights.T


def why_not(folder: Path) -> str:
    """What to install or download before `ClassNamesReward` can be made, or "".

    Args:
        folder: see `imagenet.descriptions`.
    """
    return efficientnet.why_not() or minilm.why_not() or imagenet.why_not(folder)


def efficientnet_classifier(side: int, *, negative: bool) -> Callable[[Tensor], Tensor]:
    """EfficientNet-Lite0 in bf16, which costs less than half of fp32 where a CPU has it.

    Args:
        side: pixels of a side of what it sees, a multiple of 32.
        negative: light and dark change places first.

    Raises:
        ModuleNotFoundError: a package is missing; says what to install.
        ValueError: it has other weights than those that results were published with.
    """
    model = efficientnet.load().to(memory_format=torch.channels_last)

    @torch.no_grad()
    def classify(pictures: Tensor) -> Tensor:
        seen = efficientnet.pixels(1 - pictures if negative else pictures, side)
        with torch.autocast("cpu", torch.bfloat16):
            logits: Tensor = model(seen.contiguous(memory_format=torch.channels_last)).logits
        return logits

    return classify


@dataclass(frozen=True)
class ClassNamesReward:
    """`ClassNames` of EfficientNet-Lite0 and MiniLM for drawings.

    The column "word" of an example says which of the words is asked for.

    Args:
        words: see `ClassNames`.
        folder: see `imagenet.descriptions`.
        side: see `efficientnet_classifier`.
        negative: likewise.

    Raises:
        ModuleNotFoundError: a package is missing; says what to install.
        FileNotFoundError: so is the wheel with the names of the classes.
    """

    words: Sequence[str]
    folder: str
    side: int = 192
    negative: bool = False
    name: str = field(default="class_names", init=False)
    may_be_nan: bool = field(default=True, init=False)
    _scores: ClassNames = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        classify = efficientnet_classifier(self.side, negative=self.negative)
        described = imagenet.descriptions(Path(self.folder))
        scores = ClassNames(self.words, classify, minilm.load(), described)
        object.__setattr__(self, "_scores", scores)

    def __call__(self, samples: Samples) -> Tensor:
        """[B] fp32 in nats, NaN for texts."""
        found = torch.full((len(samples),), math.nan)
        if samples.images is not None:
            drawn = list(samples.image_index)
            asked = [samples.examples[at].extra["word"] for at in drawn]
            place = torch.tensor([self.words.index(word) for word in asked])
            found[drawn] = self._scores(samples.images.cpu())[torch.arange(len(drawn)), place]
        return found
