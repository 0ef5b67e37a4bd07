"""A step of a model of transformers on a device that is not the host; see `models/test_device.py`.

What is on the device meets nothing of the host: rollout, update, clipping and the optimizer.
"""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from integrations.test_huggingface_policy import GROUP, MAX_TOKENS, policy_of, questions
from models.other_device import Device, OnDevice, moved
from runs.tiny import tiny_config

from lvrpo.models.flow import FlowSchedule
from lvrpo.models.huggingface.loading import trained_part
from lvrpo.models.huggingface.policy import HuggingFacePolicy
from lvrpo.models.sampling import Sampling
from lvrpo.trainer.experience import Experience
from lvrpo.trainer.objective import Objective
from lvrpo.trainer.state import TrainState
from lvrpo.trainer.update import policy_gradient

CONFIG = tiny_config("warm_start.steps=0", "rollout.generate_prompts=0")


def sampled(policy: HuggingFacePolicy, name: str) -> Experience:
    sampling = Sampling(max_tokens=MAX_TOKENS)
    answers = policy.sample_texts(questions(name), GROUP, sampling=sampling, seed=7, step=2)
    generator = torch.Generator().manual_seed(0)
    advantages = torch.randn(len(answers.token_ids), generator=generator)
    return Experience(answers, advantages, None, None)


def updated(policy: HuggingFacePolicy, experience: Experience) -> dict[str, float]:
    schedule, objective = FlowSchedule(num_steps=2), Objective.from_config(CONFIG)
    metrics = policy_gradient(policy, policy, experience, schedule, objective)
    return metrics | TrainState(policy.module, CONFIG).update()


@pytest.mark.parametrize("name", ["llama", "qwen3", "smolvlm"])
def test_a_step_is_made_where_the_policy_is(name):
    def fresh() -> HuggingFacePolicy:
        made = policy_of(name)
        model = copy.deepcopy(made.model)
        return dataclasses.replace(made, model=model, module=trained_part(model))

    policy = fresh()
    found = sampled(policy, name)
    expected = updated(policy, found)
    with Device() as device:
        model = moved(fresh().model)
        here = dataclasses.replace(policy, model=model, module=trained_part(model))
        device.reads = 0
        ours = sampled(here, name)
        assert device.reads <= len(questions(name)) + max(map(len, ours.answers.token_ids))
        assert ours.answers.token_ids == found.answers.token_ids
        ours = dataclasses.replace(ours, answer_advantages=OnDevice(found.answer_advantages))
        assert updated(here, ours) == pytest.approx(expected, rel=1e-4, abs=1e-6)
    for ours, theirs in zip(model.parameters(), policy.model.parameters(), strict=True):
        assert isinstance(ours, OnDevice)
        torch.testing.assert_close(ours.held, theirs)
