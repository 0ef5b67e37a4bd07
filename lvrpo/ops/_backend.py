"""Which backend runs an op: the first that can, or exactly the one that was named.

A backend answers `why_not(tensors)`: a list of reasons that it cannot run these inputs, empty when
it can. A named backend that cannot run raises with every backend's reasons; nothing falls back in
silence.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from lvrpo.ops import _library

#: In order of preference. `triton`, `cuda` and `flash` join as their kernels land.
BACKENDS = ("cpp", "torch")
FLOATING = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def why_not(backend: str, tensors: Iterable[Tensor]) -> list[str]:
    """Reasons that `backend` cannot run an op on these tensors."""
    if backend == "torch":
        return []
    reasons = [_library.MISSING] if _library.MISSING else []
    for tensor in tensors:
        if tensor.device.type != "cpu":
            reasons.append(f"it runs on CPU tensors, got one on {tensor.device}")
            break
    for tensor in tensors:
        if tensor.is_floating_point() and tensor.dtype not in FLOATING:
            reasons.append(f"dtype {tensor.dtype} is not supported")
            break
    return reasons


def resolve(op: str, tensors: Sequence[Tensor | None], backend: str | None) -> str:
    """The backend to run `op` with.

    Args:
        op: name for the error message.
        tensors: the op's tensor arguments; None entries are ignored.
        backend: a name of `BACKENDS`, or None for `$LVRPO_BACKEND` or else the first that can run.

    Raises:
        ValueError: the name is unknown, or the named backend cannot run these inputs.
    """
    present = [tensor for tensor in tensors if tensor is not None]
    backend = backend or os.environ.get("LVRPO_BACKEND") or None
    if backend is None:
        return next(name for name in BACKENDS if not why_not(name, present))
    if backend not in BACKENDS:
        raise ValueError(f"{op}: backend is {backend!r}, expected one of {', '.join(BACKENDS)}")
    if why_not(backend, present):
        table = {name: why_not(name, present) for name in BACKENDS}
        lines = [f"  {name}: {'; '.join(reasons) or 'can run'}" for name, reasons in table.items()]
        raise ValueError(f"{op}: backend {backend!r} cannot run these inputs\n" + "\n".join(lines))
    return backend
