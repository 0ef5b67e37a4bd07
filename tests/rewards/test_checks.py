"""What is counted of an evaluation and watched in training."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lvrpo.data.example import Example
from lvrpo.rewards.answers import check_answers
from lvrpo.rewards.checks import VerdictChecks
from lvrpo.rewards.parts import Verdicts
from lvrpo.rewards.reward import Samples

IMAGE = np.zeros((1, 8, 8), np.float32)


def questions(*kinds: str) -> list[Example]:
    return [
        Example("understand", f"q{i}", "what", image=IMAGE, answer="1", kind=kind)
        for i, kind in enumerate(kinds)
    ]


def test_answers_are_counted_in_all_and_by_kind():
    samples = Samples.of_texts(questions("a", "b", "a", ""), ["1", "1", "2", "2"])
    checks = VerdictChecks(check_answers)
    assert checks.right(samples).tolist() == [1, 1, 0, 0]
    assert checks.measure(samples) == {"strict/understand": 0.5}
    assert checks.count(samples) == {
        "understand/correct": 2,
        "understand/total": 4,
        "understand/a/correct": 1,
        "understand/a/total": 2,
        "understand/b/correct": 1,
        "understand/b/total": 1,
    }
    alone = Samples.of_texts(questions("a", "a"), ["1", "2"])
    assert checks.count(alone) == {"understand/correct": 1, "understand/total": 2}


@pytest.mark.parametrize(("cut_is_wrong", "right"), [(True, [0, 1]), (False, [1, 1])])
def test_a_cut_answer_is_wrong_unless_it_is_scored_as_it_is(cut_is_wrong, right):
    samples = Samples.of_texts(questions("", ""), ["1", "1"], ["length", "end"])
    assert VerdictChecks(check_answers, cut_is_wrong=cut_is_wrong).right(samples).tolist() == right


def test_a_second_opinion_on_drawings_is_told_beside_the_first():
    def verdicts(strict, partial):
        return lambda samples: Verdicts(*torch.tensor([strict, partial, [torch.nan] * 2]))

    prompts = [Example("generate", f"d{i}", "draw") for i in range(2)]
    samples = Samples.of_images(prompts, torch.zeros(2, 1, 8, 8))
    checks = VerdictChecks(
        verdicts([1.0, torch.nan], [1.0, torch.nan]),
        audits={"gold": verdicts([0.0, torch.nan], [0.5, torch.nan])},
    )
    assert checks.measure(samples) == {
        "strict/generate": 1,
        "partial/generate": 1,
        "gold/generate": 0,
    }
    assert checks.count(samples) == {
        "generate/strict": 1,
        "generate/total": 1,
        "generate/gold": 0,
        "generate/partial": 1,
    }
    # Without a rule nothing is said at all.
    assert VerdictChecks(check_answers).count(samples) == {}
    assert VerdictChecks(check_answers).measure(samples) == {}
