"""Device and dtype are the policy's, as for every family; see `models/test_device.py`."""

from __future__ import annotations

import copy
import dataclasses

import torch
from models.bagel.test_policy import OBJECTIVE, SAMPLING, SCHEDULE, answered, drawn, experience
from models.bagel.tiny_policy import questions, requests, tiny_policy
from models.other_device import Device, OnDevice, moved

from lvrpo.trainer.loop import check_ratio
from lvrpo.trainer.update import policy_gradient


def on_device(policy):
    policy = copy.deepcopy(policy)
    moved(policy.module)
    moved(policy.autoencoder)
    return policy


def test_texts_are_sampled_where_the_policy_is():
    """Read once per position, once at the end, and once for where pictures begin."""
    policy = tiny_policy(torch.float32)
    there = answered(policy, questions(3))
    with Device() as device:
        here = answered(on_device(policy), questions(3))
        assert device.reads <= SAMPLING.max_tokens + 2
    assert here.token_ids == there.token_ids


def test_pictures_are_sampled_where_the_policy_is():
    policy = tiny_policy(torch.float32)
    there = drawn(policy, requests(2))
    with Device() as device:
        here = drawn(on_device(policy), requests(2))
        assert device.reads == 2
    assert torch.equal(here.images, there.images)


def test_the_update_is_made_where_the_policy_is():
    """The metrics are read, all at once; and where pictures begin, once a forward pass."""
    policy, reference = tiny_policy(torch.float32), tiny_policy(torch.float32, seed=1)
    found = experience(policy)
    metrics = policy_gradient(policy, reference, found, SCHEDULE, OBJECTIVE)
    with Device() as device:
        here, there = on_device(tiny_policy(torch.float32)), on_device(reference)
        sampled = dataclasses.replace(
            experience(here),
            answer_advantages=OnDevice(found.answer_advantages),
            picture_advantages=OnDevice(found.picture_advantages),
        )
        device.reads = 0
        assert policy_gradient(here, there, sampled, SCHEDULE, OBJECTIVE) == metrics
        assert device.reads == 3


def test_a_policy_of_bf16_samples_and_updates():
    policy = tiny_policy(torch.bfloat16)
    policy = dataclasses.replace(policy, autoencoder=policy.autoencoder.float())
    found = experience(policy)
    assert found.answers.logprobs.dtype == torch.float32
    check_ratio(policy_gradient(policy, policy, found, SCHEDULE, OBJECTIVE), torch.bfloat16)
    for name, parameter in policy.module.named_parameters():
        assert parameter.grad is None or parameter.grad.dtype == torch.bfloat16, name
        assert parameter.grad is None or parameter.grad.isfinite().all(), name
