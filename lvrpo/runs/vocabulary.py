"""What a run takes from its training data for good, because its weights are made for it."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lvrpo.data.sources import Source
from lvrpo.models.unified.tokenizer import Tokenizer, words_of
from lvrpo.trainer.config import ConfigError


@dataclass(frozen=True)
class Vocabulary:
    """What the weights of a run speak and see; kept with them, for data files change.

    Attributes:
        words: of one token each; their order fixes their ids.
        picture_shape: [C, H, W].
        answer_range: [low, high) of the tokens that answers are sampled from.
    """

    words: tuple[str, ...]
    picture_shape: tuple[int, int, int]
    answer_range: tuple[int, int]

    @classmethod
    def of(
        cls, words: Sequence[str], picture_shape: tuple[int, int, int], *, spelled: bool
    ) -> Vocabulary:
        """The vocabulary of a run that begins; `spelled` says whether answers may hold bytes."""
        tokenizer = Tokenizer(words)
        answers = tokenizer.text_token_range if spelled else tokenizer.word_token_range
        return cls(tuple(words), picture_shape, answers)

    @classmethod
    def from_json(cls, saved: Mapping[str, Any]) -> Vocabulary:
        """The inverse of `dataclasses.asdict`, by way of JSON."""
        return cls(*(tuple(saved[field.name]) for field in dataclasses.fields(cls)))


def common_words(texts: Iterable[str], most: int = 4096) -> list[str]:
    """The most frequent words, by count and then by spelling."""
    counts = Counter(word for text in texts for word in words_of(text))
    return [word for word, _ in sorted(counts.items(), key=lambda kv: (-kv[1], kv[0]))[:most]]


def pictures_to_fit(source: Source) -> Tensor:
    """[N, C, H, W] target pictures; where there is none, the pictures that are asked about."""
    pictures = [example.target for (example,) in source.labelled("generate", 1024, 0.0, 0)]
    if not any(picture is not None for picture in pictures):
        pictures = [example.image for (example,) in source.labelled("understand", 1024, 0.0, 0)]
    found = [torch.from_numpy(picture) for picture in pictures if picture is not None]
    if not found:
        raise ConfigError("data: the training file has no picture to fit the latents on")
    return torch.stack(found)
