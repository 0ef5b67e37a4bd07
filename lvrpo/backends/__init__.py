"""Which backend runs an op: the first that can, or exactly the one that was named.

A backend answers `why_not(tensors)`: a list of reasons that it cannot run these inputs, empty when
it can. A named backend that cannot run raises with every backend's reasons; nothing falls back in
silence.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor

from lvrpo.backends import library
from lvrpo.backends.flash import varlen
from lvrpo.testing import interpreter_has_bf16

#: In order of preference. `cuda` joins as its kernels land. `flash` comes after what runs anywhere,
#: so that it has to be asked for: nothing measured says that it is faster.
BACKENDS = ("cpp", "triton", "torch", "flash")
#: By backend, why it cannot run the inputs of a call; a function is asked only where it matters.
Limits = Mapping[str, str | Callable[[], str]]
TRITON_INSTALLED = importlib.util.find_spec("triton") is not None
NO_BF16 = (
    "Triton's interpreter multiplies the bit patterns of bf16 "
    "(inside lvrpo.testing.interpreter_with_bf16() it does not)"
)
FLOATING = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def why_unavailable(backend: str) -> str:
    """Why no op can run on `backend` here; empty when it can."""
    if backend == "cpp":
        return library.MISSING
    if backend == "triton":
        if not TRITON_INSTALLED:
            return "triton is not installed (pip install lvrpo[triton])"
        if not torch.cuda.is_available() and not triton_interprets():
            return (
                "torch sees no GPU (TRITON_INTERPRET=1 tests the kernels on the CPU, not in bf16)"
            )
    if backend == "flash":
        return varlen.why_unavailable()
    return ""


def why_not(
    backend: str, op: str, tensors: Iterable[Tensor], limits: Limits | None = None
) -> list[str]:
    """Reasons that `backend` cannot run `op` on these tensors; `limits` are the op's own."""
    if backend == "torch":
        return []
    if not library.implements(backend, op):
        return [f"{op} has no {backend} kernel"]
    if why_unavailable(backend):
        return [why_unavailable(backend)]
    limit = limits.get(backend, "") if limits else ""
    reasons = [reason] if (reason := limit if isinstance(limit, str) else limit()) else []
    interprets = backend == "triton" and triton_interprets()
    device = "cpu" if backend == "cpp" or interprets else "cuda"
    for tensor in tensors:
        if tensor.device.type != device:
            reasons.append(f"it runs on {device.upper()} tensors, got one on {tensor.device}")
            break
    for tensor in tensors:
        if tensor.is_floating_point() and tensor.dtype not in FLOATING:
            reasons.append(f"dtype {tensor.dtype} is not supported")
            break
        if interprets and tensor.dtype == torch.bfloat16 and not interpreter_has_bf16():
            reasons.append(NO_BF16)
            break
    return reasons


def resolve(
    op: str,
    tensors: Sequence[Tensor | None],
    backend: str | None,
    limits: Limits | None = None,
) -> str:
    """The backend to run `op` with.

    Args:
        op: name for the error message.
        tensors: the op's tensor arguments; None entries are ignored.
        backend: a name of `BACKENDS`, or None for `$LVRPO_BACKEND` or else the first that can run.
        limits: by backend, why these inputs are beyond what the op has a kernel for.

    Raises:
        ValueError: the name is unknown, or the named backend cannot run these inputs.
    """
    present = [tensor for tensor in tensors if tensor is not None]
    backend = backend or os.environ.get("LVRPO_BACKEND") or None
    if backend is None:
        return next(name for name in BACKENDS if not why_not(name, op, present, limits))
    if backend not in BACKENDS:
        raise ValueError(f"{op}: backend is {backend!r}, expected one of {', '.join(BACKENDS)}")
    if why_not(backend, op, present, limits):
        table = {name: why_not(name, op, present, limits) for name in BACKENDS}
        lines = [f"  {name}: {'; '.join(reasons) or 'can run'}" for name, reasons in table.items()]
        raise ValueError(f"{op}: backend {backend!r} cannot run these inputs\n" + "\n".join(lines))
    return backend


def triton_interprets() -> bool:
    """Whether Triton runs kernels in its interpreter, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET") == "1"
