"""Which of more prompts than a step needs it learns from: a function of the user's own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from lvrpo.data.example import Example


class CurriculumError(ValueError):
    """The function failed, or chose something else than it was asked for."""


@dataclass(frozen=True)
class Curriculum:
    """A hook for the prompts of a step.

    A run that is killed and resumed goes on bit for bit where the function depends on its arguments
    alone.

    Args:
        choose: (prompts of one skill, how many to choose, number of the policy step from 1) to the
            chosen ones.
        pool: prompts to choose from, times those of a step.
    """

    choose: Callable[[list[Example], int, int], Any]
    pool: int

    def pick(self, examples: Sequence[Example], count: int, step: int) -> list[Example]:
        """`count` of the prompts, or all where there are fewer.

        Args:
            examples: to choose from.
            count: how many.
            step: of the policy phase, from 1.

        Raises:
            CurriculumError: the function raised, or returned another number of prompts, one twice,
                or one that was not among them.
        """
        wanted = min(count, len(examples))
        try:
            chosen = list(self.choose(list(examples), wanted, step))
        except Exception as error:
            raise CurriculumError(
                f"rollout.curriculum raised {type(error).__name__}: {error}, at step {step}"
            ) from error
        given = {id(example) for example in examples}
        if len(chosen) != wanted or not {id(example) for example in chosen} <= given:
            raise CurriculumError(
                f"rollout.curriculum chose {len(chosen)} prompts at step {step}, expected {wanted} "
                f"of the {len(examples)} that it was given"
            )
        if len({id(example) for example in chosen}) < wanted:
            raise CurriculumError(
                f"rollout.curriculum chose a prompt twice at step {step}, expected {wanted} of "
                f"the {len(examples)} that it was given, each once"
            )
        return chosen
