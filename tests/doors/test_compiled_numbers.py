"""No number that a schedule or a step may change is a constant of a compiled graph."""

from __future__ import annotations

import pytest
import torch
from doors.calls import CALLS, VALUES, device_of, every_call, with_numbers
from torch._dynamo.testing import CompileCounterWithBackend

from lvrpo import info

SETTINGS = {
    f"{call.op}-{setting.name}": (call, setting)
    for call in CALLS.values()
    for setting in call.settings
}


def test_every_op_has_a_row():
    assert set(CALLS) == set(info.op_names())


@every_call
def test_every_number_has_values(call):
    given = {name for setting in call.settings for name in setting.numbers}
    assert call.numbers() <= given | set(call.shapes)
    for setting in call.settings:
        assert all(len(values) == VALUES for values in setting.numbers.values())


@pytest.mark.parametrize(("call", "setting"), SETTINGS.values(), ids=SETTINGS.keys())
def test_two_graphs_serve_all_values(call, setting, backend):
    if backend == "torch" and len(call.settings) > 1:
        pytest.skip("minutes of tracing what torch.compile does to torch's own operations")
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(call.run, fullgraph=True, backend=counter)
    inputs = call.inputs(backend)
    device = device_of(inputs)
    inputs |= {k: x.to(device) if torch.is_tensor(x) else x for k, x in setting.inputs.items()}
    for step in range(VALUES):
        numbers = {name: values[step] for name, values in setting.numbers.items()}
        given = with_numbers(inputs, numbers)
        results = []
        for run in (compiled, call.run):
            outputs = run(**given)
            results.append([*outputs, *call.gradients(given, outputs)])
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True)), numbers
    assert counter.frame_count <= 2
