"""What a rollout makes under inference_mode is data of the update, in any op."""

from __future__ import annotations

import pytest
import torch
from doors.calls import every_call


@every_call
def test_data_may_be_inference_tensors(call, backend):
    normal = call.inputs(backend)
    with torch.inference_mode():
        data = call.make(torch.float32)
    leaves = {name: normal[name] for name in call.differentiable}
    results = []
    for inputs in (normal, data | leaves | {"backend": backend}):
        outputs = call.run(**inputs)
        results.append([*outputs, *call.gradients(inputs, outputs)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@every_call
def test_a_frozen_part_may_be_an_inference_tensor(call, backend):
    if len(call.differentiable) < 2:
        pytest.skip("it has one input with a gradient, or none")
    for frozen in call.differentiable:
        results = []
        for inference in (False, True):
            inputs = call.inputs(backend)
            with torch.inference_mode(inference):
                inputs[frozen] = inputs[frozen].detach().clone()
            outputs = call.run(**inputs)
            results.append([*outputs, *call.gradients(inputs, outputs)])
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@every_call
def test_a_whole_call_under_inference_mode(call, backend):
    expected = [result.detach() for result in call.run(**call.inputs(backend))]
    with torch.inference_mode():
        ours = call.run(**call.make(torch.float32), backend=backend)
    assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))
