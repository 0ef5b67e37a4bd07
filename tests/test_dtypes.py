from __future__ import annotations

import math

import pytest
import torch
from torch._subclasses import FakeTensor, FakeTensorMode

from lvrpo.dtypes import numbers

VALUES = (0.5, -0.0, math.inf, 1 / 3)


def test_numbers_that_are_kept_are_real_whatever_was_asked_for_first():
    with FakeTensorMode():
        assert isinstance(numbers(*VALUES), FakeTensor)
    for _ in range(2):
        kept = numbers(*VALUES)
        assert not isinstance(kept, FakeTensor)
        assert kept.tolist() == list(VALUES)
        assert kept.dtype == torch.float64
    with FakeTensorMode():
        assert isinstance(numbers(*VALUES), FakeTensor)


def test_numbers_that_inference_made_can_be_saved_for_a_gradient():
    with torch.inference_mode():
        kept = numbers(0.125, 7.5)
    x = torch.ones(2, dtype=torch.float64, requires_grad=True)
    (x * numbers(0.125, 7.5)).sum().backward()
    assert x.grad.tolist() == kept.tolist() == [0.125, 7.5]


@pytest.mark.parametrize("first", [0.25, torch.tensor(0.25)])
def test_a_number_that_changed_is_not_the_one_that_was_kept(first):
    before = numbers(first).tolist()
    if isinstance(first, torch.Tensor):
        first.mul_(2)
        assert numbers(first).tolist() == [0.5]
    assert before == [0.25]
