"""Fixtures every suite shares."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from lvrpo import info
from lvrpo.ops import _backend


def backends() -> list[str]:
    """Triton's is there when its kernels can run: on a GPU, or with TRITON_INTERPRET=1."""
    return ["cpp", "torch"] + ["triton"] * (not _backend.why_unavailable("triton"))


@pytest.fixture(params=backends())
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Name of a backend; on a GPU, the tensors that a test of Triton makes are on it."""
    name, stem = str(request.param), request.path.stem.removeprefix("test_")
    ops = [op for op in info.op_names() if stem.startswith(op)]
    reasons = [_backend.why_unavailable(name)] if name != "torch" else []
    if ops:
        reasons += _backend.why_not(name, max(ops, key=len), [])
    if any(reasons):
        pytest.skip(f"backend {name}: {'; '.join(filter(None, reasons))}")
    if name == "triton" and not _backend.triton_interprets():
        with torch.device("cuda"):
            yield name
    else:
        yield name


@pytest.fixture(autouse=True, scope="session")
def _interpreter_of_bf16():
    """Triton's interpreter truncates to bf16 and multiplies its bit patterns; hardware does not."""
    if _backend.why_unavailable("triton") or not _backend.triton_interprets():
        yield
        return
    from triton.runtime import interpreter as triton

    bf16, fp32 = triton.tl.bfloat16, triton.tl.float32
    convert, dot = triton._convert_float, triton.InterpreterBuilder.create_dot

    def rounding(data, source, target, mode):
        if (source, target) == (fp32, bf16):
            return torch.from_numpy(data.copy()).bfloat16().view(torch.uint16).numpy()
        return convert(data, source, target, mode)

    def widened(x):
        if x.dtype != bf16:
            return x
        data = convert(x.data, bf16, fp32, None).view("float32").reshape(x.data.shape)
        return triton.TensorHandle(data, fp32)

    def of_values(self, a, b, *rest):
        return dot(self, widened(a), widened(b), *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton, "_convert_float", rounding)
        patch.setattr(triton.InterpreterBuilder, "create_dot", of_values)
        yield


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def poison_empty():
    """Fill uninitialised memory with NaN, so that an output nobody wrote cannot pass by luck."""
    previous = torch.are_deterministic_algorithms_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(previous)
    torch.utils.deterministic.fill_uninitialized_memory = fill
