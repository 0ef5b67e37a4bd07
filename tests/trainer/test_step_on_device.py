"""A whole step on a device that is not the host: samples, rewards, advantages, packs, optimizer.

No tensor of the device meets one of the host, and the numbers are those of the host to
rounding. What a real
device has beside is not covered: kernels of its own, streams, and its memory.
"""

from __future__ import annotations

import copy

import pytest
import torch
from models.other_device import Device, OnDevice, moved
from runs.tiny import tiny_config
from torch import Tensor
from trainer.whole_step import both_phases

from lvrpo.runs.setup import Setup

#: Every reward of the demo, that of the frozen policy among them, and what else a step may do.
OVERRIDES = (
    "warm_start.steps=1",
    "rewards.generate={ r_ins = 1.0, r_sem = 0.25, r_kn = 0.25 }",
    "optimizer.minibatches=2",
    "optimizer.max_rows=120",
    "loss.sampler_correction=tis",
    "rollout.top_k=50",
    "rollout.guidance=2.0",
    "rollout.resample_rounds=1",
    "run.shuffle_rewards=true",
)


def held(tensor: Tensor) -> Tensor:
    assert isinstance(tensor, OnDevice)
    return tensor.held


def test_a_step_of_both_phases_is_made_where_the_policy_is(tmp_path):
    config = tiny_config(*OVERRIDES)
    setup = Setup(config)
    task = setup.task(setup.frozen_parts(tmp_path))
    policy, reference = task.new_policy(), task.new_policy()
    there, frozen = copy.deepcopy(policy), copy.deepcopy(reference)
    expected = both_phases(config, task, policy, reference)
    with Device():
        for each in (there, frozen):
            moved(each.module)
            moved(each.autoencoder)
        found = both_phases(config, task, there, frozen)
    assert found.pop("rollout: alarm") == expected.pop("rollout: alarm")
    assert found == pytest.approx(expected, rel=1e-4, abs=1e-6)
    for ours, theirs in zip(there.module.parameters(), policy.module.parameters(), strict=True):
        torch.testing.assert_close(held(ours), theirs)
