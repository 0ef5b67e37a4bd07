"""What digit drawings satisfy, read cell by cell, and the rules of a run made of it."""

from __future__ import annotations

import math
from collections.abc import Container, Sequence
from dataclasses import dataclass

from lvrpo.data.example import Example
from lvrpo.digits.judge import DigitReader, digit_judge, gold_reader, read_pictures
from lvrpo.digits.phrases import questions_about
from lvrpo.digits.pictures import Cell
from lvrpo.digits.rules import LayoutRule, digit_rule
from lvrpo.rewards.answers import check_answers
from lvrpo.rewards.parts import Verdicts
from lvrpo.rewards.reward import Samples


def check_samples(samples: Samples, reader: DigitReader | None = None) -> Verdicts:
    """Check every sample against its own example.

    Args:
        samples: texts and drawings.
        reader: of the drawn digits; None means the judge. Give `gold_reader()` to measure without
            the judge's blind spots.

    Raises:
        ValueError: a drawing does not have the size of its rule's canvas.
    """
    verdicts = check_answers(samples)
    seen: list[tuple[Cell, ...]] = []
    if samples.images is not None and any(example.rule for example in samples.examples):
        seen = read_pictures(reader or digit_judge(), samples.images)
    for cells, at in zip(seen, samples.image_index, strict=False):
        verdicts.strict[at], verdicts.partial[at] = _check_drawing(samples.examples[at], cells)
    return verdicts


def gold_check(samples: Samples) -> Verdicts:
    """`check_samples` by the reader that no reward uses."""
    return check_samples(samples, gold_reader())


def _check_drawing(example: Example, cells: Sequence[Cell]) -> tuple[float, float]:
    rule = digit_rule(example)
    if rule is None:
        return math.nan, math.nan
    if isinstance(rule, LayoutRule) and len(rule.digits) != len(cells):
        raise ValueError(
            f"drawing of {example.uid!r} has {len(cells)} cells, its rule {rule.rows} x {rule.cols}"
        )
    return float(rule.satisfied_by(cells)), rule.partial(cells)


@dataclass(frozen=True)
class DigitRules:
    """The rules of a run's examples; a `lvrpo.rewards.parts.Rules`.

    Args:
        kinds: of question to ask about a drawing, of `questions.QUESTIONS`; None means all.
    """

    kinds: Container[str] | None = None

    def check(self, samples: Samples) -> Verdicts:
        """By the judge."""
        return check_samples(samples)

    def questions_about(self, example: Example) -> list[tuple[str, str]]:
        """What a drawing true to the rule of an example answers."""
        rule = digit_rule(example)
        return questions_about(rule, self.kinds) if rule else []
