"""What is counted of an evaluation and watched in training."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from lvrpo.data.example import Example
from lvrpo.rewards.answers import check_answers
from lvrpo.rewards.checks import ChecksBySkill, RewardCheck, VerdictChecks
from lvrpo.rewards.matching import NumberReward
from lvrpo.rewards.parts import Verdicts
from lvrpo.rewards.reward import FunctionReward, Samples
from lvrpo.trainer.task import mean_scores

IMAGE = np.zeros((1, 8, 8), np.float32)


def questions(*kinds: str) -> list[Example]:
    return [
        Example("understand", f"q{i}", "what", image=IMAGE, answer="1", kind=kind)
        for i, kind in enumerate(kinds)
    ]


def test_answers_are_right_or_wrong():
    samples = Samples.of_texts(questions("a", "b", "a", ""), ["1", "1", "2", "2"])
    scores = VerdictChecks(check_answers).scores(samples)
    assert {name: column.tolist() for name, column in scores.items()} == {"right": [1, 1, 0, 0]}


@pytest.mark.parametrize(("cut_is_wrong", "right"), [(True, [0, 1]), (False, [1, 1])])
def test_a_cut_answer_is_wrong_unless_it_is_scored_as_it_is(cut_is_wrong, right):
    samples = Samples.of_texts(questions("", ""), ["1", "1"], ["length", "end"])
    checks = VerdictChecks(check_answers, cut_is_wrong=cut_is_wrong)
    assert checks.scores(samples)["right"].tolist() == right


def test_a_second_opinion_on_drawings_is_told_beside_the_first():
    def verdicts(strict, partial):
        return lambda samples: Verdicts(*torch.tensor([strict, partial, [torch.nan] * 2]))

    prompts = [Example("generate", f"d{i}", "draw") for i in range(2)]
    samples = Samples.of_images(prompts, torch.zeros(2, 1, 8, 8))
    checks = VerdictChecks(
        verdicts([1.0, torch.nan], [1.0, torch.nan]),
        audits={"gold": verdicts([0.0, torch.nan], [0.5, torch.nan])},
    )
    found = {name: column.tolist() for name, column in checks.scores(samples).items()}
    assert {name: column[0] for name, column in found.items()} == {
        "right": 1,
        "partial": 1,
        "gold": 0,
    }
    assert all(math.isnan(column[1]) for column in found.values())
    assert mean_scores(checks.scores(samples), "generate") == {
        "strict/generate": 1,
        "partial/generate": 1,
        "gold/generate": 0,
    }
    # Without a rule nothing is said at all.
    assert mean_scores(VerdictChecks(check_answers).scores(samples), "generate") == {}


def test_a_reward_says_what_is_right_where_it_gives_all_there_is():
    scores = [1.0, 0.999, 0.0, -2.0, 1.5, None]
    samples = Samples.of_texts(questions(*"abcdef"), ["x"] * 6)
    verdicts = RewardCheck(FunctionReward(lambda _: scores, "graded"))(samples)
    nan = math.nan
    torch.testing.assert_close(
        verdicts.strict, torch.tensor([1.0, 0, 0, 0, 1, nan]), equal_nan=True
    )
    torch.testing.assert_close(
        verdicts.partial, torch.tensor([1.0, 0.999, 0, 0, 1, nan]), equal_nan=True
    )


def test_every_skill_has_a_check_of_its_own():
    answers = Samples.of_texts(questions("", ""), ["1.0", "it is 1"])
    drawings = Samples.of_images([Example("generate", "d", "draw")], torch.zeros(1, 1, 8, 8))
    checks = VerdictChecks(
        ChecksBySkill({"understand": RewardCheck(NumberReward(anywhere=True))}, check_answers)
    )
    assert checks.scores(answers)["right"].tolist() == [1, 1]
    assert math.isnan(checks.scores(drawings)["right"].item())
