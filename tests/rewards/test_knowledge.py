from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from lvrpo.data.example import Example
from lvrpo.digits.checks import DigitRules
from lvrpo.digits.rules import LayoutRule, RelationRule, SumRule
from lvrpo.rewards.knowledge import KnowledgeReward
from lvrpo.rewards.reward import RewardError, Samples
from lvrpo.rewards.score import score

IMAGE = np.zeros((1, 16, 16), np.float32)
LAYOUT = Example("generate", "l", "draw", rule=LayoutRule(2, 2, (3, None, None, 7)))
RELATION = Example("generate", "r", "draw", rule=RelationRule(2, 2, 3, "above", 7))
SUM = Example("generate", "s", "draw", rule=SumRule(9))
FREE = Example("generate", "f", "draw a boat")
QUESTION = Example("understand", "q", "what", image=IMAGE, answer="3")


def test_asks_what_the_rule_settles_about_the_right_picture():
    asked = []

    def answerer(images, questions, answers):
        asked.extend(zip(images[:, 0, 0, 0].tolist(), questions, answers, strict=True))
        return torch.tensor([0.5 if "how many" in question else 1.0 for question in questions])

    images = torch.arange(4.0).reshape(4, 1, 1, 1).expand(4, 1, 16, 16)
    samples = Samples.concat(
        [
            Samples.of_texts([QUESTION], ["3"]),
            Samples.of_images([LAYOUT, FREE, RELATION, SUM], images),
        ]
    )
    scores = KnowledgeReward(answerer, DigitRules().questions_about)(samples)
    assert asked == [
        (0, "what digit is at top-left", "3"),
        (0, "what digit is at bottom-right", "7"),
        (0, "how many digits are there", "2"),
        (2, "how many digits are there", "2"),
        (2, "what digit is above 7", "3"),
        (2, "what digit is below 3", "7"),
        (3, "how many digits are there", "2"),
    ]
    assert scores.isnan().tolist() == [True, False, True, False, False]
    assert scores[[1, 3, 4]].tolist() == pytest.approx([2.5 / 3, 2.5 / 3, 0.5])


def test_nothing_to_ask_asks_nothing():
    def never(images, questions, answers):
        raise AssertionError

    scores = KnowledgeReward(never, DigitRules().questions_about)(
        Samples.of_texts([QUESTION], ["3"])
    )
    assert math.isnan(scores.item())


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (torch.ones(2), r"shape \(2,\) for 3 questions"),
        (torch.tensor([0.1, 0.2, 1.5]), "expected probabilities"),
        (torch.tensor([0.1, math.nan, 0.5]), "expected probabilities"),
    ],
)
def test_a_bad_answerer_is_refused(given, message):
    reward = KnowledgeReward(lambda images, questions, answers: given, DigitRules().questions_about)
    with pytest.raises(RewardError, match=message):
        score([reward], Samples.of_images([LAYOUT], torch.zeros(1, 1, 16, 16)))


def test_only_learned_kinds_are_asked():
    asked = []

    def answerer(images, questions, answers):
        asked.extend(questions)
        return torch.ones(len(questions))

    samples = Samples.of_images([LAYOUT, SUM], torch.zeros(2, 1, 16, 16))
    scores = KnowledgeReward(answerer, DigitRules(kinds={"name": 1.0}).questions_about)(samples)
    assert asked == ["what digit is at top-left", "what digit is at bottom-right"]
    assert scores.isnan().tolist() == [False, True]
