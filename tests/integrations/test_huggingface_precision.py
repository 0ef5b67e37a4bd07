"""A model of transformers that computes in bf16 over weights in fp32, with adapters and without."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from integrations.test_huggingface_device import sampled, updated
from integrations.test_huggingface_policy import policy_of
from runs.tiny import tiny_config

from lvrpo.models.huggingface.loading import Lora, with_lora
from lvrpo.models.huggingface.policy import trained_part
from lvrpo.trainer.loop import check_ratio
from lvrpo.trainer.placement import leaves_no_group, place_trained, whole

RUN = tiny_config("run.precision=bf16").run


@pytest.mark.parametrize("name", ["llama", "smolvlm"])
@pytest.mark.parametrize("adapters", [False, True])
@leaves_no_group()
def test_an_update_in_bf16_moves_weights_in_fp32(name, adapters):
    made = policy_of(name)
    model = copy.deepcopy(made.model)
    if adapters:
        model = with_lora(model, Lora(2, 4.0, ()))
    policy = place_trained(dataclasses.replace(made, model=model, module=trained_part(model)), RUN)
    before = {name: p.detach().clone() for name, p in policy.module.named_parameters()}
    with whole(policy):
        assert policy.model.get_input_embeddings().weight.dtype == torch.bfloat16
        found = sampled(policy, name)
    check_ratio(updated(policy, found), torch.bfloat16)
    moved = [not torch.equal(p, before[name]) for name, p in policy.module.named_parameters()]
    assert sum(moved) >= len(moved) // 2
    assert all(("lora" in name) == adapters for name in before)
    assert {p.dtype for p in policy.module.parameters()} == {torch.float32}
