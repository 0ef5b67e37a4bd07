"""What the backward of a fused loss does to its gradient: as little as it can, and not on the host.

A GPU's launchers run on tensors without memory, whose launches and operators are recorded.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from runnable import WITH_KERNELS
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from lvrpo import backends
from lvrpo.backends import Backend, library
from lvrpo.backends.triton import INSTALLED
from lvrpo.ops.head import fused

#: Those with a kernel that looks at the factor: on a CPU the host does.
LOOKING = [name for name in WITH_KERNELS if name != "cpp"]
kernels = pytest.mark.parametrize("backend", LOOKING, indirect=True)
needs_triton = pytest.mark.skipif(not INSTALLED, reason="triton is not installed")
needs_extension = pytest.mark.skipif(bool(library.MISSING), reason=library.MISSING)
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


def scaled_on_a_gpu(backend: Backend, dtypes: tuple[torch.dtype, torch.dtype]) -> list[str]:
    """The operators that scaling two gradients takes, but for those that make tensors."""
    before, after = dtypes
    with FakeTensorMode(), Operators() as operators:
        gradients = [torch.empty(64, 999, dtype=before, device="cuda") for _ in range(2)]
        dloss = torch.empty((), dtype=torch.promote_types(before, torch.float32), device="cuda")
        operators.names.clear()
        saved = SimpleNamespace(traced=False, gradients=list(gradients))
        scaled = fused.release_gradients(saved, dloss, after, backend, list)
    assert [x.dtype for x in scaled] == [after, after]
    if before == after:
        assert all(x is y for x, y in zip(scaled, gradients, strict=True))
    return [name for name in operators.names if "empty" not in name and "detach" not in name]


@needs_triton
@all_dtypes
def test_triton_passes_once_at_most_and_reads_nothing_on_the_host(dtypes):
    from lvrpo.kernels import _launch

    with _launch.record() as launches:
        moved = scaled_on_a_gpu(backends.named("triton"), dtypes)
    assert len(launches) == 2
    assert not moved, "these pass over a gradient once more, or wait for the device"


@needs_extension
@all_dtypes
def test_cuda_passes_once_at_most_and_reads_nothing_on_the_host(monkeypatch, dtypes):
    monkeypatch.setitem(library.KERNELS, "CUDA", {"scale_gradient"})
    moved = scaled_on_a_gpu(backends.named("cuda"), dtypes)
    assert moved == 2 * ["lvrpo.scale_gradient.default"]


#: Gradients out of a buffer [R, C]: dense, beginning anywhere in memory, with gaps between rows.
CUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "dense": lambda buffer: buffer[:, 2:-3].contiguous(),
    "anywhere": lambda buffer: buffer.flatten()[3:-2],
    "gaps": lambda buffer: buffer[:, 2:-3],
}


@kernels
@all_dtypes
@pytest.mark.parametrize("factor", [1.0, 0.3, 0.0])
@pytest.mark.parametrize("columns", [1, 4096, 9000])
def test_a_kernel_scales_as_a_multiplication_does(backend, dtypes, factor, columns):
    before, after = dtypes
    by = torch.tensor(factor, dtype=torch.promote_types(before, torch.float32))
    for name, cut in CUTS.items():
        buffer = torch.randn(3, columns + 5).to(before)
        around, expected = buffer.clone(), (cut(buffer) * by).to(after)
        scaled = backends.named(backend).scaled(cut(buffer), by, after)
        assert torch.equal(scaled, expected), name
        for x in (buffer, around):
            cut(x).zero_()
        assert torch.equal(buffer, around), f"{name}: written outside the gradient"


@kernels
def test_a_kernel_writes_nothing_for_a_factor_of_1(backend):
    # Arithmetic turns a signaling NaN into a quiet one, even a multiplication by 1.
    signaling = torch.full((3, 50), 0x7F800001, dtype=torch.int32)
    for factor, is_left_alone in ((1.0, True), (2.0, False)):
        gradient = signaling.clone().view(torch.float32)
        by = torch.tensor(factor)
        assert backends.named(backend).scaled(gradient, by, torch.float32) is gradient
        assert torch.equal(gradient.view(torch.int32), signaling) is is_left_alone


@pytest.mark.parametrize("backend", [x for x in LOOKING if x != "triton"], indirect=True)
def test_a_compiled_kernel_refuses_what_does_not_fit(backend):
    scale, x, one = backends.named(backend).op("scale_gradient"), torch.randn(4, 6), torch.ones(())
    wrong = {
        "scaled must be contiguous": (x.t(), x, one),
        "gradient must be contiguous": (torch.empty(6, 4), x.t(), one),
        "scaled has 23 elements": (torch.empty(23), x, one),
        "factor has 2 elements": (x, x, torch.ones(2)),
        "factor is Double, expected Float": (x, x, one.double()),
        "gradient of another dtype than scaled is Double": (x, x.double(), one.double()),
        "scaled is Double, expected Half": (x.double(), x, one),
    }
    for words, arguments in wrong.items():
        with pytest.raises(RuntimeError, match=words):
            scale(*arguments)
