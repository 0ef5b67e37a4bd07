"""Device and dtype are the policy's: whatever samples, scores or trains with it follows."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from models.other_device import Device, OnDevice, moved
from torch import Tensor
from trainer.small_policy import (
    MAX_TOKENS,
    OBJECTIVE,
    SAMPLING,
    SCHEDULE,
    experience,
    pictures,
    prompts,
    small_policy,
)

from lvrpo.models.answering import answer_probability
from lvrpo.models.unified.decoding import BLOCK, Decoding
from lvrpo.models.unified.policy import UnifiedPolicy
from lvrpo.runs.config_file import load_config
from lvrpo.trainer.correction import correct_sampler
from lvrpo.trainer.loop import check_ratio
from lvrpo.trainer.update import policy_gradient
from lvrpo.trainer.warm_start import supervised_gradient


def on_device(policy: UnifiedPolicy) -> UnifiedPolicy:
    policy = copy.deepcopy(policy)
    moved(policy.module)
    moved(policy.autoencoder)
    return policy


def held(tensor: Tensor | None) -> Tensor:
    assert isinstance(tensor, OnDevice)
    return tensor.held


def assert_same_gradients(ours: UnifiedPolicy, theirs: UnifiedPolicy) -> None:
    expected = dict(theirs.module.named_parameters())
    for name, parameter in ours.module.named_parameters():
        if expected[name].grad is None:
            assert parameter.grad is None
        else:
            assert torch.equal(held(parameter.grad), expected[name].grad), name


def test_an_op_on_both_devices_is_an_error():
    with Device():
        ours = OnDevice(torch.ones(2))
        with pytest.raises(RuntimeError, match="of the host"):
            ours + torch.ones(2)
        with pytest.raises(RuntimeError, match="of the host"):
            ours[torch.tensor([0])]
        assert (ours + 1).cpu().tolist() == [2, 2]


def test_texts_are_sampled_where_the_policy_is():
    """And read once per position, to learn who goes on."""
    policy, questions = small_policy(torch.float32), prompts("understand", 3)
    changed = dataclasses.replace(
        SAMPLING, top_k=50, top_p=0.9, min_p=0.01, repetition_penalty=1.2, min_tokens=1
    )
    for sampling in (SAMPLING, changed, dataclasses.replace(changed, temperature=0.0)):
        key = {"sampling": sampling, "seed": 7, "step": 2}
        there = policy.sample_texts(questions, 3, **key)
        with Device() as device:
            here = on_device(policy).sample_texts(questions, 3, **key)
            assert device.reads == max(map(len, there.token_ids)) <= MAX_TOKENS
        assert here.token_ids == there.token_ids
        assert torch.equal(held(here.logprobs), there.logprobs)
        assert (here.sampled_from is None) == (not sampling.changes or not sampling.temperature)


def test_a_position_sends_no_more_than_its_answers_need():
    """Whatever room the answers have: neither rows nor masks of the whole buffer are sent again."""
    policy, questions = small_policy(torch.float32), prompts("understand", 3)
    layouts = [policy.prompt(question) for question in questions]
    sent = []
    for most in (8, BLOCK):
        with Device() as device:
            here = on_device(policy)
            decoding = Decoding(here.module, here.builder, layouts, 4, most, "torch")
            ids = torch.full((12,), 300).to(here.device)
            decoding.append(ids, torch.arange(12))
            device.sent = device.reads = 0
            decoding.append(ids, torch.arange(12))
            assert device.reads == 0
            sent.append(device.sent)
            rows = decoding.cache.keys.shape[1]
    assert sent[1] < 2 * sent[0]
    assert sent[1] < rows


def test_pictures_are_sampled_where_the_policy_is():
    """And come back at the end, with one look at whether they are finite."""
    policy, requests = small_policy(torch.float32), prompts("generate", 2)
    there = pictures(policy, requests)
    with Device() as device:
        here = pictures(on_device(policy), requests)
        assert device.reads == 2
    assert torch.equal(here.images, there.images)
    for name in ("latents", "velocities", "noise"):
        assert torch.equal(held(getattr(here, name)), getattr(there, name))


def test_the_update_is_made_where_the_policy_is():
    """Only the metrics are read, all at once."""
    policy, reference = small_policy(torch.float32), small_policy(torch.float32, seed=1)
    found = experience(policy, 2, 2)
    metrics = policy_gradient(policy, reference, found, SCHEDULE, OBJECTIVE)
    with Device() as device:
        here, there = on_device(small_policy(torch.float32)), on_device(reference)
        sampled = dataclasses.replace(
            experience(here, 2, 2),
            answer_advantages=OnDevice(found.answer_advantages),
            picture_advantages=OnDevice(found.picture_advantages),
        )
        device.reads = 0
        assert policy_gradient(here, there, sampled, SCHEDULE, OBJECTIVE) == metrics
        assert device.reads == 1
        assert_same_gradients(here, policy)


def test_a_sampler_is_corrected_where_the_policy_is():
    policy = small_policy(torch.float32)
    config = load_config(overrides=["loss.sampler_correction=icepop"])  # at another temperature
    found = experience(policy, 3, 0).answers
    there, weights, metrics = correct_sampler(policy, found, config)
    with Device() as device:
        here = on_device(policy)
        found = experience(here, 3, 0).answers
        device.reads = 0
        corrected, ours, told = correct_sampler(here, found, config)
        assert device.reads == 1
    assert told == metrics
    assert torch.equal(held(ours), weights)
    assert torch.equal(held(corrected.logprobs), there.logprobs)


def test_the_warm_start_is_made_where_the_policy_is():
    policy = small_policy(torch.float32)
    blank = torch.zeros(1, 16, 16).numpy()
    questions = prompts("understand", 3)
    drawings = [[dataclasses.replace(e, target=blank)] * 2 for e in prompts("generate", 2)]
    metrics = supervised_gradient(policy, questions, drawings, seed=0, step=1)
    with Device():
        here = on_device(small_policy(torch.float32))
        assert supervised_gradient(here, questions, drawings, seed=0, step=1) == metrics
        assert_same_gradients(here, policy)


def test_answers_are_judged_where_the_policy_is():
    policy, words = small_policy(torch.float32), (["what digit is at top-left"] * 2, ["3", "4"])
    images = torch.rand(2, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    there = answer_probability(policy, images, *words)
    with Device():
        assert torch.equal(held(answer_probability(on_device(policy), images, *words)), there)


def test_a_policy_of_bf16_samples_and_updates():
    policy = small_policy(torch.bfloat16)
    policy = dataclasses.replace(policy, autoencoder=policy.autoencoder.float())
    found = experience(policy, 2, 2)
    assert found.answers.logprobs.dtype == torch.float32
    metrics = policy_gradient(policy, policy, found, SCHEDULE, OBJECTIVE)
    check_ratio(metrics, torch.bfloat16)
    for name, parameter in policy.module.named_parameters():
        assert parameter.grad.dtype == torch.bfloat16, name
        assert parameter.grad.isfinite().all(), name
