"""Knowledge consistency, r_kn: can a frozen answerer read from the drawing what was asked for."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from lvrpo.data.example import Example
from lvrpo.rewards.parts import AnswerProbability, RewardParts
from lvrpo.rewards.reward import Samples


@dataclass(frozen=True)
class KnowledgeReward:
    """Mean probability of the right answer to the questions that a prompt settles.

    "draw 3 at top-left" settles "what digit is at top-left" and "how many digits are there". NaN
    for texts, and where there is no question to ask.

    Args:
        answer_probability: of a frozen model; the policy's own answers would move with it.
        questions_about: what a right drawing of an example answers, each question with its one
            right answer. Kinds that the model has not learned would be noise in the reward.
    """

    answer_probability: AnswerProbability
    questions_about: Callable[[Example], Sequence[tuple[str, str]]]
    name: str = field(default="r_kn", init=False)
    may_be_nan: bool = field(default=True, init=False)
    needs: ClassVar[tuple[str, ...]] = ("answer_probability", "rules")

    @classmethod
    def from_parts(cls, parts: RewardParts) -> KnowledgeReward:
        """The reward of a run; an example's own column "questions" comes before its rule."""
        rules = parts.rules
        return cls(
            parts.answer_probability,
            lambda example: questions_of(example) or rules.questions_about(example),
        )

    @torch.no_grad()
    def __call__(self, samples: Samples) -> Tensor:
        """[B] fp32 in [0, 1], NaN where it does not apply.

        Raises:
            ValueError: the answerer returns another shape, or something that is no probability.
        """
        scores = torch.full((len(samples),), math.nan)
        drawings, owners, questions, answers = [], [], [], []
        for drawing, at in enumerate(samples.image_index):
            for question, answer in self.questions_about(samples.examples[at]):
                drawings.append(drawing)
                owners.append(at)
                questions.append(question)
                answers.append(answer)
        if not questions or samples.images is None:
            return scores
        given = self.answer_probability(samples.images[drawings], questions, answers)
        if given.shape != (len(questions),):
            raise ValueError(
                f"answer_probability returned shape {tuple(given.shape)} for {len(questions)} "
                "questions"
            )
        given = given.detach().to("cpu", torch.float32)
        # A sum of exponentials may end a rounding error above one; NaN must fail.
        if not bool(((given >= 0) & (given <= 1 + 1e-4)).all()):
            raise ValueError(
                f"answer_probability returned {float(given.min())} to {float(given.max())}, "
                "expected probabilities"
            )
        owner = torch.tensor(owners)
        total = torch.zeros(len(samples)).index_add_(0, owner, given)
        count = owner.bincount(minlength=len(samples))
        return torch.where(count > 0, total / count, scores)


def questions_of(example: Example) -> list[tuple[str, str]]:
    """The column "questions" of an example: pairs of a question and its right answer; maybe none.

    Raises:
        ValueError: the column has something else.
    """
    given = example.extra.get("questions", [])
    pairs = given if isinstance(given, list) else [given]
    for pair in pairs:
        is_pair = isinstance(pair, (list, tuple)) and len(pair) == 2
        if not is_pair or not all(isinstance(text, str) and text for text in pair):
            raise ValueError(
                f"questions of {example.uid!r} has {pair!r}, expected [question, answer]"
            )
    return [(question, answer) for question, answer in pairs]
