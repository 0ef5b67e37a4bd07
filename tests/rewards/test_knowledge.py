from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from lvrpo.data.example import Example
from lvrpo.digits.attacks import layout_attacks
from lvrpo.digits.checks import DigitRules
from lvrpo.digits.phrases import cell_names
from lvrpo.digits.pictures import dissect, read_source
from lvrpo.digits.rules import LayoutRule, RelationRule, SumRule
from lvrpo.digits.scenes import SceneConfig, scene_examples
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
        return torch.tensor([0.5 if "many" in question else 1.0 for question in questions])

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
        (0, "how many 3 are there", "1"),
        (0, "how many 7 are there", "1"),
        (0, "what digits are there", "3 7"),
        (2, "how many digits are there", "2"),
        (2, "what digit is above 7", "3"),
        (2, "what digit is below 3", "7"),
        (3, "how many digits are there", "2"),
    ]
    assert scores.isnan().tolist() == [True, False, True, False, False]
    assert scores[[1, 3, 4]].tolist() == pytest.approx([4.5 / 6, 2.5 / 3, 0.5])


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
        (torch.ones(2), r"shape \(2,\) for 6 questions"),
        (torch.tensor([0.1, 0.2, 1.5, 0.0, 0.0, 0.0]), "expected probabilities"),
        (torch.tensor([0.1, math.nan, 0.5, 0.0, 0.0, 0.0]), "expected probabilities"),
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


class Oracle:
    """Knows what is drawn by the pixels of the source images, and says it with probability 0.9."""

    def __call__(self, images, questions, answers):
        pairs = zip(images.numpy(), questions, answers, strict=True)
        return torch.tensor([0.9 if self.answer(i, q) == a else 0.05 for i, q, a in pairs])

    def answer(self, image, question):
        cells = [self.read(cell) for cell in dissect(image[None], 2, 2)[0]]
        drawn = [cell for cell in cells if cell is not None]
        words = question.split()
        if words[:3] == ["what", "digit", "is"]:
            return str(cells[cell_names(2, 2).index(words[-1])])
        if words == ["what", "digits", "are", "there"]:
            return " ".join(map(str, drawn))
        if words == ["how", "many", "digits", "are", "there"]:
            return str(len(drawn))
        assert words[:2] + words[3:] == ["how", "many", "are", "there"]
        return str(drawn.count(int(words[2])))

    def read(self, cell):
        try:
            return read_source(cell, "test")
        except ValueError:  # several digits at once
            return 8


def scores_against_right(kinds):
    """By attack, r_kn of the right drawings minus that of the attacks."""
    scenes = scene_examples(SceneConfig(), "test", "generate", 150, 0)
    reward = KnowledgeReward(Oracle(), DigitRules(kinds).questions_about)
    right = torch.from_numpy(np.stack([example.target for example in scenes]))
    right = reward(Samples.of_images(scenes, right))
    found = {}
    for name, made in layout_attacks(scenes, np.random.default_rng(0)).items():
        pictures = torch.from_numpy(np.stack(list(made.values())))
        attacked = reward(Samples.of_images([scenes[i] for i in made], pictures))
        found[name] = right[list(made)] - attacked
    return found


def test_to_an_oracle_every_wrong_drawing_answers_worse_than_the_right_one():
    for name, difference in scores_against_right(None).items():
        assert (difference > 0).all(), name


def test_the_names_of_the_digits_alone_do_not_tell_of_a_digit_too_many():
    differences = scores_against_right({"name"})
    for name in ("a digit too many", "extra digits everywhere"):
        assert (differences[name] == 0).all()
