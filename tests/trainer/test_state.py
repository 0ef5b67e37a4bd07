"""What must not reach the weights."""

from __future__ import annotations

import math

import pytest
import torch
from runs.tiny import tiny_config

from lvrpo.runs.errors import USER_ERRORS
from lvrpo.runs.setup import load_or_fit_task
from lvrpo.trainer.state import DivergedError, TrainState


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("kind", ["supervised_step", "policy_step"])
def test_a_gradient_that_is_not_finite_stops_the_run(tmp_path, kind, value):
    config = tiny_config()
    state = TrainState.initial(config, load_or_fit_task(config, tmp_path))
    before = {name: tensor.clone() for name, tensor in state.tensors().items()}
    for parameter in state.model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    state.model.head.weight.grad[0, 0] = value
    with pytest.raises(DivergedError, match=r"step 1: the norm of the gradient is (nan|inf)"):
        getattr(state, kind)(config)
    after = state.tensors()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    assert DivergedError in USER_ERRORS
