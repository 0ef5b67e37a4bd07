"""What a run has for the rewards that are made for it: its rules, its encoder, its answerer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

from torch import Tensor

from lvrpo.data.example import Example
from lvrpo.rewards.reward import Samples

#: (images [N, C, H, W], N questions, N answers) to [N], the probability of each answer in [0, 1].
AnswerProbability: TypeAlias = Callable[[Tensor, Sequence[str], Sequence[str]], Tensor]


@dataclass(frozen=True)
class Verdicts:
    """What was checked, one entry per sample, NaN where nothing tells what is right.

    Args:
        strict: [B] fp32, 1 where everything is right, else 0.
        partial: [B] fp32 in [0, 1], the share of the requirement that is met. For a text: 1 for
            the right answer, else 0.
        format: [B] fp32, 1 where a text has the form of an answer; NaN for drawings.
    """

    strict: Tensor
    partial: Tensor
    format: Tensor


class Rules(Protocol):
    """What examples say of a right answer and a right drawing, read by whoever made them."""

    def check(self, samples: Samples) -> Verdicts:
        """Every sample against its own example."""

    def questions_about(self, example: Example) -> Sequence[tuple[str, str]]:
        """Questions, each with its one right answer, that a right drawing answers; maybe none."""


class PhraseEncoder(Protocol):
    """Unit vectors for pictures, patches, captions and phrases; similarity is a dot product."""

    def phrases_of(self, prompt: str) -> list[str]:
        """What a prompt asks for, piece by piece."""

    def implied_by(self, phrases: Sequence[str]) -> list[str]:
        """What else is then true of a right drawing: that nothing else is there; maybe none."""

    def knows(self, phrase: str) -> bool:
        """Whether it was trained on every word of a phrase."""

    def encode_images(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """[N, C, H, W] to ([N, dim] of pictures, [N, P, dim] of patches)."""

    def encode_phrases(self, phrases: Sequence[str]) -> Tensor:
        """[Q, dim] of phrases."""

    def encode_captions(self, captions: Sequence[Sequence[str]]) -> Tensor:
        """[Q, dim] of captions, each given as its phrases."""


@dataclass(frozen=True)
class RewardParts:
    """Parts of a run, for rewards that are made from them by a class method `from_parts`.

    Args:
        options: the section `[rewards]` of the configuration, by key.
        rules: of the data.
        answer_probability: of the frozen policy of the end of the warm start.
        encoder: fitted on the training data; None where there is none for it.
    """

    options: Mapping[str, Any]
    rules: Rules
    answer_probability: AnswerProbability
    encoder: PhraseEncoder | None = None
