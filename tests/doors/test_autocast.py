"""Under autocast an op does what torch's own op of its sort does, with sums in fp32.

The peers are torch's: F.linear and log_softmax for a linear head, scaled_dot_product_attention with
a dense mask for attention. All other ops are of the sort of log_softmax and the losses, which
autocast runs in fp32: it changes none of their bits.
"""

from __future__ import annotations

import pytest
import torch
from doors.calls import CALLS, device_of, every_call
from torch import Tensor
from torch.nn import functional as F

import lvrpo
from lvrpo.testing import DEFAULT_ULPS, check_against_plain

LIKE_LINEAR = ("linear_logprobs", "linear_grpo_loss")
LIKE_ATTENTION = ("packed_attention",)
ON_POLICY = {
    "old_logprobs": None,
    "ref_logprobs": None,
    "mask": None,
    "policy_weights": None,
    "params": lvrpo.LossParams(),
}


@every_call
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_ops_in_fp32_are_not_changed(call, dtype, backend):
    if call.op in (*LIKE_LINEAR, *LIKE_ATTENTION):
        pytest.skip("autocast lowers its factors")
    inputs = call.inputs(backend, dtype)
    results = []
    for enabled in (False, True):
        with torch.autocast(device_of(inputs), torch.bfloat16, enabled=enabled):
            outputs = call.run(**inputs)
        gradients = call.gradients(inputs, outputs)
        results.append([*outputs, *gradients])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert outputs[0].dtype == wide
    assert all(gradient.dtype == dtype for gradient in gradients)


@every_call
def test_fp64_is_left_alone(call, backend):
    inputs = call.inputs(backend, torch.float64)
    results = []
    for enabled in (False, True):
        with torch.autocast(device_of(inputs), torch.bfloat16, enabled=enabled):
            results.append(call.run(**inputs))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def head_of_torch(hidden: Tensor, weight: Tensor, bias: Tensor, ids: Tensor) -> Tensor:
    logits = F.linear(hidden, weight, bias)
    log_p = logits.log_softmax(dim=-1, dtype=None if logits.dtype == torch.float64 else torch.float)
    ignored = ids == -100
    return log_p.gather(1, ids.clamp(0)[:, None]).squeeze(1).masked_fill(ignored, 0.0)


def compare(call, inputs, own, peer, gradient_scale=1.0):
    """Results and gradients of `own` against `peer` under the same autocast, and that in fp64."""
    # What autocast makes of the factors, exactly; everything after that is rounding.
    lowered = {name: inputs[name].detach().bfloat16().double() for name in call.differentiable}
    every = []
    for run, changes, enabled in ((own, {}, True), (peer, {}, True), (peer, lowered, False)):
        given = call.with_leaves(inputs | changes)
        with torch.autocast(device_of(given), torch.bfloat16, enabled=enabled):
            result = run(given)
        every.append([result.detach(), *call.gradients(given, [result])])
    results, *gradients = zip(*every, strict=True)
    ours, plain, gold = results
    assert ours.dtype == plain.dtype
    check_against_plain(ours, gold, plain, scale=gold.abs().max(), name="result")
    for name, (ours, plain, gold) in zip(call.differentiable, gradients, strict=True):
        assert ours.dtype == inputs[name].dtype
        # They came through a factor of 16 bits, whatever they are in now.
        narrow = ours.bfloat16(), gold, plain.bfloat16()
        check_against_plain(*narrow, scale=gradient_scale * gold.abs().max(), name=f"d{name}")


@pytest.mark.parametrize("mixed", [False, True], ids=["fp32", "16-bit weights"])
@pytest.mark.parametrize("op", LIKE_LINEAR)
def test_a_linear_head_does_what_linear_does(op, mixed, backend):
    call = CALLS[op]
    inputs = call.inputs(backend)
    if mixed:
        inputs |= {name: inputs[name].detach().bfloat16() for name in call.narrow}

    def own(given):
        if op == "linear_logprobs":
            return lvrpo.linear_logprobs(**given)[0]
        return lvrpo.linear_grpo_loss(**given | ON_POLICY).loss

    def peer(given):
        heads = (given[name] for name in ("hidden", "weight", "bias"))
        logprobs = head_of_torch(*heads, given["token_ids"])
        if op == "linear_logprobs":
            return logprobs
        # The published loss on policy: a mean over sequences of means over tokens of A * ratio.
        terms, counts = (logprobs - logprobs.detach()).exp(), given["token_ids"] != -100
        means = []
        for begin, end, advantage in zip((0, 2, 4), (2, 4, 5), given["advantages"], strict=True):
            means.append(advantage * terms[begin:end][counts[begin:end]].mean())
        return -torch.stack(means).mean()

    compare(call, inputs, own, peer)


@pytest.mark.parametrize("mixed", [False, True], ids=["fp32", "16-bit keys and values"])
def test_attention_does_what_sdpa_does(mixed, backend):
    call = CALLS["packed_attention"]
    inputs = call.inputs(backend)
    if mixed:
        inputs |= {name: inputs[name].detach().bfloat16() for name in call.narrow}

    def own(given):
        return lvrpo.packed_attention(**given)

    def peer(given):
        q, k, v = (given[name].transpose(0, 1)[None] for name in ("q", "k", "v"))
        seen = given["mask"].to_dense()
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, enable_gqa=True)
        return out[0].transpose(0, 1)

    # Its backward reads the result as stored: half a unit of 16 bits in every summand.
    half_a_unit = torch.finfo(torch.bfloat16).eps / torch.finfo(torch.float32).eps / 2
    compare(call, inputs, own, peer, gradient_scale=half_a_unit / DEFAULT_ULPS)
