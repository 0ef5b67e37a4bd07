"""The backends that tests run here, from the one list of them.

With LVRPO_EMULATE=1 the CUDA kernels are among them, compiled for the CPU (`emulated_cuda`); with
"address" or "thread" in place of 1, under these sanitizers, as `make sanitize` runs them.
"""

from __future__ import annotations

import os

from lvrpo import backends


def _is_whole(backend: backends.Backend) -> bool:
    return backend.functional("packed_attention", len) is not None


def _any_device() -> int:
    return next(i for i, backend in enumerate(backends.ALL) if not backend.device)


_SANITIZER = os.environ.get("LVRPO_EMULATE", "0")
EMULATED = _SANITIZER != "0"
if EMULATED:
    from emulated_cuda import load

    before = _any_device()
    backends.ALL = (*backends.ALL[:before], load(_SANITIZER), *backends.ALL[before:])

_CHOSEN = [x for x in backends.ALL[: _any_device() + 1] if not x.why_unavailable()]

#: Names of those that an op may choose by itself; Triton's is there when its kernels can run, on a
#: GPU or with TRITON_INTERPRET=1.
RUNNABLE = [backend.name for backend in _CHOSEN]
#: Those of them with kernels.
WITH_KERNELS = [backend.name for backend in _CHOSEN if not _is_whole(backend)]
#: Those that run on the host and are not slow there.
ON_HOST = [x.name for x in _CHOSEN if x.device in ("", "cpu") and x.name != "triton"]
