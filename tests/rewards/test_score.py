from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from lvrpo.data.example import Example
from lvrpo.rewards.reward import FunctionReward, RewardError, Samples
from lvrpo.rewards.score import score

IMAGE = np.zeros((1, 8, 8), np.float32)
EXAMPLES = [
    Example("understand", f"q{i}", f"question {i}", image=IMAGE, answer="1") for i in range(3)
]
SAMPLES = Samples.of_texts(EXAMPLES, ["1", "2", "x"])


@dataclass
class Fixed:
    values: object
    name: str = "fixed"
    may_be_nan: bool = False

    def __call__(self, samples):
        return self.values


def test_columns_are_rewards():
    rewards = [
        Fixed(torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)),
        Fixed([1, None, True], may_be_nan=True),
        Fixed(np.array([0, 1, 2])),
    ]
    table = score(rewards, SAMPLES)
    assert table.dtype == torch.float32
    expected = torch.tensor([[1, 1, 0], [2, math.nan, 1], [3, 1, 2]])
    assert torch.equal(table.nan_to_num(-1), expected.nan_to_num(-1))


def test_scores_carry_no_gradient():
    assert not score([Fixed(torch.ones(3, requires_grad=True))], SAMPLES).requires_grad


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        (Fixed([1.0, math.inf, 0.0]), r"'fixed' is infinite for sample 1 \(the text '2'\).*'q1'"),
        (Fixed([1.0, 0.0, -math.inf]), r"'fixed' is infinite for sample 2 .*'question 2'"),
        (Fixed([math.nan, 0.0, math.nan]), r"'fixed' is NaN for sample 0 .* and 1 more samples"),
        (Fixed([1.0]), r"'fixed' returned shape \(1,\) for 3 samples"),
        (Fixed(torch.ones(3, 1)), r"returned shape \(3, 1\)"),
        (Fixed(None), r"'fixed' returned None, expected one number per sample \(3\), at .*py:\d+$"),
        (Fixed(0.5), r"'fixed' returned float 0.5, expected one number per sample \(3\)"),
        (Fixed({"a": 1}), r"'fixed' returned dict \{'a': 1\}, expected"),
        (Fixed({1, 2, 3}), r"'fixed' returned set \{1, 2, 3\}, expected"),
        (Fixed("123"), r"'fixed' returned str '123', expected"),
        (Fixed([1.0, "0.5", 1.0]), r"'fixed' returned str '0.5' for sample 1, expected"),
        (Fixed(np.array(["1", "2", "3"])), r"'fixed' returned str '1' for sample 0, expected"),
        (Fixed([1.0, [2.0], 1.0]), r"'fixed' returned list \[2.0\] for sample 1, expected"),
        (Fixed(torch.ones(3, dtype=torch.complex64)), "returned a tensor of torch.complex64"),
        (
            FunctionReward(lambda samples: 1 / 0, "mine"),
            r"'mine' raised ZeroDivisionError.*'q0'.*at .*test_score.py:\d+$",
        ),
    ],
)
def test_a_bad_reward_is_named(reward, message):
    with pytest.raises(RewardError, match=message):
        score([reward], SAMPLES)


def test_none_needs_no_declaration():
    """It is written on purpose, unlike a NaN, which may come from 0 / 0."""
    assert score([Fixed([1, None, 3])], SAMPLES)[:, 0].isnan().tolist() == [False, True, False]
    assert score([Fixed([None] * 3)], SAMPLES).isnan().all()


def test_there_must_be_a_reward():
    with pytest.raises(ValueError, match="no rewards"):
        score([], SAMPLES)


def test_concat_shifts_the_images():
    drawing = Example("generate", "d", "draw")
    images = torch.rand(2, 1, 8, 8)
    both = Samples.concat([SAMPLES, Samples.of_images([drawing] * 2, images), SAMPLES])
    assert len(both) == 8
    assert list(both.image_index) == [3, 4]
    assert both.texts == ["1", "2", "x", None, None, "1", "2", "x"]
    assert torch.equal(both.images, images)
    assert Samples.concat([SAMPLES]).images is None


def test_samples_must_be_consistent():
    with pytest.raises(ValueError, match="2 texts of 3 examples"):
        Samples(EXAMPLES, ["1", "2"])
    with pytest.raises(ValueError, match="0 images, 1 in image_index"):
        Samples(EXAMPLES, ["1", "2", None], None, [2])
    with pytest.raises(ValueError, match="1 finish_reasons of 3 texts"):
        Samples(EXAMPLES, ["1", "2", "x"], finish_reasons=["end"])
    with pytest.raises(ValueError, match=r"finish_reasons\[1\] is 'eos', expected 'end', 'stop'"):
        Samples(EXAMPLES, ["1", "2", "x"], finish_reasons=["end", "eos", "length"])
    with pytest.raises(ValueError, match="exactly the samples without a text"):
        Samples(EXAMPLES, ["1", "2", None], torch.zeros(1, 1, 8, 8), [1])
