"""What the backward of a fused loss does to its gradient: as little as it can, and not on the host.

A GPU's launchers run on tensors without memory, whose launches and operators are recorded.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from lvrpo import backends
from lvrpo.backends.triton import INSTALLED
from lvrpo.ops.head import fused

TRITON = backends.named("triton")
needs_triton = pytest.mark.skipif(not INSTALLED, reason="triton is not installed")
interprets = pytest.mark.skipif(not backends.triton_interprets(), reason="not in the interpreter")
#: A gradient's dtype until it is scaled, and afterwards.
DTYPES = {
    "as it is": (torch.float32, torch.float32),
    "bf16": (torch.bfloat16, torch.bfloat16),
    "narrowed": (torch.float32, torch.bfloat16),
    "fp64": (torch.float64, torch.float64),
}
all_dtypes = pytest.mark.parametrize("dtypes", DTYPES.values(), ids=DTYPES)


class Operators(TorchDispatchMode):
    """Names of what PyTorch is asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


@needs_triton
@all_dtypes
def test_triton_passes_once_at_most_and_reads_nothing_on_the_host(dtypes):
    from lvrpo.kernels import _launch

    before, after = dtypes
    with FakeTensorMode(), _launch.record() as launches, Operators() as operators:
        gradients = [torch.empty(64, 999, dtype=before, device="cuda") for _ in range(2)]
        dloss = torch.empty((), dtype=torch.promote_types(before, torch.float32), device="cuda")
        operators.names.clear()
        saved = SimpleNamespace(traced=False, gradients=list(gradients))
        scaled = fused.release_gradients(saved, dloss, after, TRITON, list)
    assert len(launches) == len(scaled) == 2
    assert {x.dtype for x in scaled} == {after}
    moved = [name for name in operators.names if "empty" not in name and "detach" not in name]
    assert not moved, "these pass over a gradient once more, or wait for the device"
    if before == after:
        assert all(x is y for x, y in zip(scaled, gradients, strict=True))


@interprets
@all_dtypes
@pytest.mark.parametrize("factor", [1.0, 0.3, 0.0])
@pytest.mark.parametrize("columns", [1, 4096, 9000])
def test_triton_scales_as_a_multiplication_does(dtypes, factor, columns):
    before, after = dtypes
    by = torch.tensor(factor, dtype=torch.promote_types(before, torch.float32))
    buffer = torch.randn(3, columns + 5).to(before)
    for gradient in (buffer[:, 2:-3].contiguous(), buffer[:, 2:-3]):
        expected = (gradient * by).to(after)
        assert torch.equal(TRITON.scaled(gradient, by, after), expected)


@interprets
def test_triton_writes_nothing_for_a_factor_of_1(monkeypatch):
    from triton.runtime.interpreter import InterpreterBuilder

    gradient, one = torch.randn(3, 50), torch.ones(())
    monkeypatch.setattr(InterpreterBuilder, "create_masked_store", None)
    assert TRITON.scaled(gradient, one, torch.float32) is gradient
    with pytest.raises(Exception, match="not callable"):
        TRITON.scaled(gradient, 2 * one, torch.float32)
