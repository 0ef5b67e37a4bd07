"""The default dtype of torch, which a script may set, decides about no op."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from doors.calls import every_call


@pytest.fixture(params=[torch.float64, torch.bfloat16], ids=str)
def another_default(request) -> Iterator[torch.dtype]:
    before = torch.get_default_dtype()
    yield request.param
    torch.set_default_dtype(before)


@every_call
def test_the_default_dtype_changes_no_result(call, backend, another_default):
    given, again = call.inputs(backend), call.inputs(backend)
    expected = call.run(**given)
    expected = [*expected, *call.gradients(given, expected)]
    torch.set_default_dtype(another_default)
    ours = call.run(**again)
    ours = [*ours, *call.gradients(again, ours)]
    assert [x.dtype for x in ours] == [x.dtype for x in expected]
    assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))
