"""Triton on any machine up to the driver, which does nothing: what its launches cost the host.

A launcher runs as on a GPU, on CPU tensors: it binds arguments, looks its kernel up and compiles it
for a GPU that is not there, and calls a driver that launches nothing. Results are not written, so
nothing may look at them: see `unread`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from lvrpo import backends, checks
from lvrpo.backends.triton import INSTALLED, TritonBackend, triton_interprets

CAPABILITY = 90


class NullTriton(TritonBackend):
    """Triton's kernels, launched nowhere; runs inside `null_driver` and `unread` only."""

    name = "triton (null launch)"

    @property
    def device(self) -> str:
        """The tensors are on the host: nothing reads them."""
        return "cpu"

    def why_unavailable(self) -> str:
        """Triton is missing, or its interpreter takes the place of the driver."""
        if not INSTALLED:
            return "triton is not installed"
        return "TRITON_INTERPRET=1 calls no driver" if triton_interprets() else ""


class _Utilities:
    def load_binary(self, *_: Any) -> tuple[int, int, int, int, int]:
        """Module, function, registers, spills, most threads of a block."""
        return 1, 1, 32, 0, 1024

    def get_device_properties(self, _: int) -> dict[str, int]:
        return {"max_shared_mem": 227 << 10, "multiprocessor_count": 132}


class _NullDriver:
    utils = _Utilities()

    def __init__(self) -> None:
        from triton.backends.compiler import GPUTarget

        self.target = GPUTarget("cuda", CAPABILITY, 32)

    def get_current_target(self) -> Any:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, _: int) -> int:
        return 0

    def launcher_cls(self, *_: Any) -> Any:
        return lambda *arguments: None


@contextlib.contextmanager
def null_driver() -> Iterator[None]:
    """`NullTriton` is among the backends, and Triton's driver is the one that does nothing."""
    from triton.runtime import driver

    before, active = backends.ALL, driver._active
    backends.ALL = (*before, NullTriton())
    driver.set_active(_NullDriver())
    try:
        yield
    finally:
        backends.ALL = before
        driver.set_active(active)


class unread(contextlib.ContextDecorator):
    """No op checks values, as on a GPU, which would have to be waited for."""

    def __enter__(self) -> None:
        self._before = checks.check_values
        checks.check_values = lambda tensor: False

    def __exit__(self, *_: object) -> None:
        checks.check_values = self._before
