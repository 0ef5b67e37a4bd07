"""Which steps of the denoising a policy step trains: every kind of window, over every schedule."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from runs.tiny import Stop, StopAfter, tiny_config
from trainer.memory_journal import MemoryJournal

from lvrpo.runs.setup import Setup
from lvrpo.runs.signals import Signals
from lvrpo.trainer import loop
from lvrpo.trainer.config import RolloutSection, TrainConfig, WarmStartSection
from lvrpo.trainer.loop import train
from lvrpo.trainer.schedule import every_window, flow_schedule, window_start

WINDOWS = ("first", "sliding", "random")


@st.composite
def configs(draw: st.DrawFn) -> TrainConfig:
    steps = draw(st.integers(1, 12))
    dynamics = draw(st.sampled_from(["flow_sde", "dance_sde", "cps"]))
    # The last step of "cps" draws no noise.
    rollout = RolloutSection(
        denoise_steps=steps + (dynamics == "cps"),
        stochastic_steps=draw(st.integers(1, steps)),
        dynamics=dynamics,
        window=draw(st.sampled_from(WINDOWS)),
        window_interval=draw(st.integers(1, 4)),
    )
    return TrainConfig(rollout=rollout, warm_start=WarmStartSection(steps=draw(st.integers(0, 3))))


def steps_of(config: TrainConfig, count: int) -> list[tuple[int, ...]]:
    """The stochastic steps of so many policy steps."""
    first = config.warm_start.steps + 1
    return [
        flow_schedule(config.rollout, window_start(config, step)).stochastic_steps
        for step in range(first, first + count)
    ]


@given(configs())
def test_a_window_is_of_steps_one_after_the_other_that_all_draw_noise(config):
    found = steps_of(config, 40)
    for steps in found:
        assert len(steps) == config.rollout.stochastic_steps
        assert steps == tuple(range(steps[0], steps[0] + len(steps)))
        assert 0 <= steps[0] <= steps[-1] < config.rollout.denoise_steps
    assert {k for steps in found for k in steps} <= {*every_window(config.rollout).stochastic_steps}
    assert found == steps_of(config, 40)


@given(configs())
def test_where_it_goes(config):
    starts = [steps[0] for steps in steps_of(config, 60)]
    noisy = config.rollout.denoise_steps - (config.rollout.dynamics == "cps")
    room = noisy - config.rollout.stochastic_steps
    match config.rollout.window:
        case "first":
            assert set(starts) == {0}
        case "sliding":
            assert all(0 <= later - earlier <= 1 for earlier, later in pairwise(starts))
            stays = config.rollout.window_interval
            for start in range(room):
                assert starts.count(start) == stays
            assert starts[0] == 0
            assert max(starts) == room
        case "random":
            assert set(starts) <= set(range(room + 1))


def test_a_random_window_is_anywhere_and_each_run_s_own():
    rollout = RolloutSection(denoise_steps=6, stochastic_steps=2, window="random")
    config = TrainConfig(rollout=rollout)
    starts = [steps[0] for steps in steps_of(config, 300)]
    # Five places, sixty each: seven standard deviations are 48.
    assert all(12 < starts.count(start) < 108 for start in range(5))
    other = dataclasses.replace(config, run=dataclasses.replace(config.run, seed=1))
    assert starts != [steps[0] for steps in steps_of(other, 300)]


@pytest.fixture(scope="module", params=WINDOWS)
def moving(request) -> TrainConfig:
    return tiny_config(f"rollout.window={request.param}", "rollout.window_interval=1")


@contextmanager
def seen(monkeypatch) -> Iterator[list[tuple[str, str, list[int]]]]:
    """What each update is told: fingerprints of the rollout and of the schedule, and the steps."""
    found: list[tuple[str, str, list[int]]] = []
    gradient = loop.policy_gradient

    def told(policy, reference, experience, schedule, *others):
        pictures = experience.pictures
        found.append((pictures.fingerprint, schedule.fingerprint(), pictures.steps))
        return gradient(policy, reference, experience, schedule, *others)

    with monkeypatch.context() as patched:
        patched.setattr(loop, "policy_gradient", told)
        yield found


def test_an_update_is_of_the_window_that_was_sampled_and_resumes_in_it(
    moving, tmp_path, monkeypatch
):
    setup = Setup(moving)
    task = setup.task(setup.frozen_parts(tmp_path))
    whole, stopped = MemoryJournal(), MemoryJournal()
    with seen(monkeypatch) as straight:
        train(moving, task, whole, Signals())
    assert all(sampled == updated for sampled, updated, _ in straight)
    assert [tuple(steps) for _, _, steps in straight] == steps_of(moving, 3)
    with seen(monkeypatch) as resumed:
        with pytest.raises(Stop):
            train(moving, task, stopped, StopAfter(moving.warm_start.steps + 1))
        stopped.saved.append(stopped.end[2])
        train(moving, task, stopped, Signals())
    assert resumed == straight
    ours, theirs = stopped.saved[-1].tensors, whole.saved[-1].tensors
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
