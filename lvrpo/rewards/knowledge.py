"""Knowledge consistency, r_kn: can a frozen answerer read from the drawing what was asked for."""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import torch
from torch import Tensor

from lvrpo.digits.phrases import questions_about
from lvrpo.digits.rules import digit_rule
from lvrpo.rewards.samples import Samples

#: (images [N, C, H, W], N questions, N answers) to [N], the probability of each answer in [0, 1].
AnswerProbability: TypeAlias = Callable[[Tensor, Sequence[str], Sequence[str]], Tensor]


@dataclass(frozen=True)
class KnowledgeReward:
    """Mean probability of the right answer to the questions that a prompt's rule settles.

    "draw 3 at top-left" settles "what digit is at top-left" and "how many digits are there". NaN
    for texts, for prompts without a rule, and where no question is left to ask.

    Args:
        answer_probability: of a frozen model; the policy's own answers would move with it.
        kinds: of question that the model has learned, see `scene_tasks.QUESTIONS`; its answers to
            others would be noise in the reward. None means all.
    """

    answer_probability: AnswerProbability
    kinds: Container[str] | None = None
    name: str = field(default="r_kn", init=False)
    may_be_nan: bool = field(default=True, init=False)

    @torch.no_grad()
    def __call__(self, samples: Samples) -> Tensor:
        """[B] fp32 in [0, 1], NaN where it does not apply.

        Raises:
            ValueError: the answerer returns another shape, or something that is no probability.
        """
        scores = torch.full((len(samples),), math.nan)
        drawings, owners, questions, answers = [], [], [], []
        for drawing, at in enumerate(samples.image_index):
            rule = digit_rule(samples.examples[at])
            for question, answer in questions_about(rule, self.kinds) if rule else ():
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
