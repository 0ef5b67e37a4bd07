"""Which backend runs an op: the first that can, or exactly the one that was named.

A backend is one object, of one file, in the list `ALL`; nothing else knows its name. It answers
with a list of reasons that it cannot run a call, empty when it can. A named backend that cannot run
raises with every backend's reasons; nothing falls back in silence.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from lvrpo.backends.backend import FLOATING, Backend
from lvrpo.backends.cpp import CppBackend
from lvrpo.backends.cuda import CudaBackend
from lvrpo.backends.flash import FlashBackend
from lvrpo.backends.torch import TorchBackend
from lvrpo.backends.triton import TritonBackend, triton_interprets

__all__ = ["ALL", "FLOATING", "Backend", "named", "resolve", "triton_interprets"]

#: In order of preference: an op without a named backend takes the first that can run it. On a GPU
#: `cuda` goes before `triton`, whose launches cost tens of microseconds of Python each and whose
#: kernels of rows do half as many instructions again for an element, which is predicted from
#: compiled code (docs/kernels.md), not measured. `flash` comes after what runs anywhere, so that it
#: has to be asked for: nothing measured says that it is faster.
ALL: tuple[Backend, ...] = (
    CppBackend(),
    CudaBackend(),
    TritonBackend(),
    TorchBackend(),
    FlashBackend(),
)


def named(name: str) -> Backend:
    """The backend of this name.

    Raises:
        ValueError: there is none.
    """
    for backend in ALL:
        if backend.name == name:
            return backend
    known = ", ".join(backend.name for backend in ALL)
    raise ValueError(f"backend is {name!r}, expected one of {known}")


def resolve(
    op: str,
    tensors: Sequence[Tensor | None],
    name: str | None,
    *,
    choices: Mapping[str, str] | None = None,
    arguments: Mapping[str, Any] | None = None,
) -> Backend:
    """The backend to run `op` with.

    Args:
        op: its name.
        tensors: the op's tensor arguments; None entries are ignored.
        name: of a backend, or None for `$LVRPO_BACKEND` or else the first that can run.
        choices: by kind ("surrogate"), the names that the arithmetic depends on.
        arguments: by name, what else decides whether a backend has a kernel.

    Raises:
        ValueError: the name is unknown, or the named backend cannot run these inputs.
    """
    present = [tensor for tensor in tensors if tensor is not None]
    name = name or os.environ.get("LVRPO_BACKEND") or None
    if name is None:
        return next(x for x in ALL if not x.why_not(op, present, choices, arguments))
    try:
        backend = named(name)
    except ValueError as error:
        raise ValueError(f"{op}: {error}") from None
    if backend.why_not(op, present, choices, arguments):
        table = {x.name: x.why_not(op, present, choices, arguments) for x in ALL}
        lines = [
            f"  {known}: {'; '.join(reasons) or 'can run'}" for known, reasons in table.items()
        ]
        raise ValueError(f"{op}: backend {name!r} cannot run these inputs\n" + "\n".join(lines))
    return backend
