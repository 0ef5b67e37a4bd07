"""What must not reach the weights, and what a snapshot must hold."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from runs.tiny import tiny_config
from torch import nn

from lvrpo.models.protocol import DivergedError
from lvrpo.runs.errors import USER_ERRORS
from lvrpo.trainer.journal import Snapshot
from lvrpo.trainer.schedule import learning_rate, warm_start_rate
from lvrpo.trainer.state import (
    TrainState,
    load_weights,
    optimizer_tensors,
    restore_optimizer,
)


def small_model(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))


def step(state: TrainState, *layers: int) -> dict[str, float]:
    """One update whose gradient depends on the step, of some layers only."""
    generator = torch.Generator().manual_seed(state.step)
    for layer in layers or (0, 2):
        for parameter in state.model[layer].parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
    metrics = state.update()
    state.finish()
    return metrics


def copied(state: TrainState) -> Snapshot:
    found = state.finished()
    assert found is not None
    return Snapshot(found.step, {name: t.clone() for name, t in found.tensors.items()})


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("warm_start", [0, 3])
def test_a_gradient_that_is_not_finite_stops_the_run(warm_start, value):
    state = TrainState(small_model(), tiny_config(f"warm_start.steps={warm_start}"))
    before = copied(state)
    for parameter in state.model.parameters():
        parameter.grad = torch.full_like(parameter, value)
    section = "warm_start" if warm_start else "optimizer"
    message = rf"step 1: the norm of the gradient is (nan|inf); a lower {section}\.lr"
    with pytest.raises(DivergedError, match=message):
        state.update()
    after = state.tensors()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.tensors.items())
    assert DivergedError in USER_ERRORS


@pytest.mark.parametrize("at", range(7))
def test_a_state_goes_on_from_a_snapshot_as_if_nothing_had_been(at):
    config = tiny_config()
    state = TrainState(small_model(), config)
    for _ in range(at):
        step(state)
    other = TrainState(small_model(seed=1), config, copied(state))
    for _ in range(at, 6):
        assert step(state) == step(other)
    ours, theirs = state.tensors(), other.tensors()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


def test_a_weight_without_a_gradient_so_far_has_no_history():
    config = tiny_config("warm_start.steps=0", "run.steps=9")
    state = TrainState(small_model(), config)
    for _ in range(3):
        step(state, 0)
    other = TrainState(small_model(seed=1), config, copied(state))
    assert not any(name.startswith("optimizer.state.2.") for name in other.tensors())
    for _ in range(3):
        assert step(state) == step(other)
    assert all(map(torch.equal, state.tensors().values(), other.tensors().values()))


OPTIMIZERS = [
    torch.optim.SGD,
    partial(torch.optim.SGD, momentum=0.9),
    torch.optim.Adafactor,
    torch.optim.Adagrad,
    torch.optim.NAdam,
    torch.optim.RMSprop,
]


@pytest.mark.parametrize("make", OPTIMIZERS)
@pytest.mark.parametrize("steps", [0, 3])
def test_any_optimizer_goes_on_from_its_tensors(make, steps):
    def train(model, optimizer, first, count):
        for seed in range(first, first + count):
            generator = torch.Generator().manual_seed(seed)
            for parameter in model.parameters():
                parameter.grad = torch.randn(parameter.shape, generator=generator)
            optimizer.step()
            optimizer.zero_grad()

    model = small_model()
    optimizer = make(model.parameters(), lr=0.01)
    train(model, optimizer, 0, steps)
    saved = {name: t.clone() for name, t in optimizer_tensors(model, optimizer).items()}
    other = small_model(seed=1)
    resumed = make(other.parameters(), lr=0.01)
    restore_optimizer(other, resumed, saved)
    other.load_state_dict(model.state_dict())
    train(model, optimizer, steps, 3)
    train(other, resumed, steps, 3)
    assert all(map(torch.equal, model.parameters(), other.parameters()))


def test_the_policy_begins_with_the_average_of_the_warm_start():
    config = tiny_config()
    state = TrainState(small_model(), config)
    averages = [parameter.detach().clone() for parameter in state.model.parameters()]
    for done in range(3):
        assert state.average is not None
        metrics = {**step(state)} if done < 2 else {}
        if done == 2:
            for parameter in state.model.parameters():
                parameter.grad = torch.ones_like(parameter)
            metrics = state.update()
        weights = [parameter.detach().clone() for parameter in state.model.parameters()]
        decay = (1 + done) / (10 + done)
        averages = [a.lerp(w, 1 - decay) for a, w in zip(averages, weights, strict=True)]
        assert metrics["lr"] == warm_start_rate(config.warm_start, done)
    state.finish()
    assert state.average is None
    assert all(map(torch.equal, state.model.parameters(), averages))
    assert {name.partition(".")[0] for name in state.tensors()} == {"model"}
    for done in range(3):
        assert step(state)["lr"] == learning_rate(config, done)


def test_between_two_updates_of_one_step_there_is_a_copy_or_nothing():
    state = TrainState(small_model(), tiny_config())
    step(state)
    before = copied(state)
    state.keep()
    for parameter in state.model.parameters():
        parameter.grad = torch.ones_like(parameter)
    state.update()
    kept = state.finished()
    assert kept is not None
    assert (kept.step, kept.tensors.keys()) == (1, before.tensors.keys())
    assert all(torch.equal(tensor, kept.tensors[name]) for name, tensor in before.tensors.items())
    state.finish()
    for parameter in state.model.parameters():
        parameter.grad = torch.ones_like(parameter)
    state.update()
    assert state.finished() is None


def test_weights_of_another_model_are_refused_by_name():
    snapshot = Snapshot(1, small_model().state_dict(), "run/step-1")
    with pytest.raises(ValueError, match=r"run/step-1 is of another model: size mismatch for 0"):
        load_weights(nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 2)), snapshot)
