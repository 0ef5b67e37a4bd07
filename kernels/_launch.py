"""Launching a kernel: fixed configurations as data, and a record of what would be launched."""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import functools
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import triton
from torch import Tensor


@dataclasses.dataclass(frozen=True)
class LaunchConfig:
    """How a kernel is compiled and launched; depends on the op and the dtype, never on a batch.

    Attributes:
        blocks: compile-time tile sizes by the name of the kernel's parameter.
        num_warps: warps of 32 threads per program.
        num_stages: depth of the software pipeline of loads.
    """

    blocks: Mapping[str, int]
    num_warps: int = 4
    num_stages: int = 3

    @functools.cached_property
    def arguments(self) -> dict[str, int]:
        """All of it, as Triton takes it."""
        options = {"num_warps": self.num_warps, "num_stages": self.num_stages}
        return dict(self.blocks) | options


@dataclasses.dataclass(frozen=True)
class Launch:
    """One kernel launch: what `kernel[grid](**arguments)` was or would have been called with."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: Mapping[str, Any]


@dataclasses.dataclass
class _Record:
    launches: list[Launch]
    architecture: int


_record: contextvars.ContextVar[_Record | None] = contextvars.ContextVar(
    "lvrpo_launches", default=None
)


@contextlib.contextmanager
def record(architecture: int = 90) -> Iterator[list[Launch]]:
    """Collect launches instead of running them, as on a GPU of this compute capability.

    With tensors on the meta device this needs no GPU: it is how the kernels are compiled ahead of
    time, and how a test counts that a sweep over lengths compiles once.
    """
    launches: list[Launch] = []
    token = _record.set(_Record(launches, architecture))
    try:
        yield launches
    finally:
        _record.reset(token)


def architecture_of(tensor: Tensor) -> int:
    """Compute capability of the tensor's GPU, 90 for 9.0; 90 too where there is none."""
    recording = _record.get()
    if recording is not None:
        return recording.architecture
    if tensor.device.type != "cuda":
        return 90
    major, minor = torch.cuda.get_device_capability(tensor.device)
    return 10 * major + minor


def launch(kernel: Any, grid: tuple[int, ...], config: LaunchConfig, **arguments: Any) -> None:
    """Run `kernel` on the device of its tensors; an empty grid has nothing to do.

    Args:
        kernel: a `triton.jit` function.
        grid: programs along x, y, z. Put rows on x: the others end at 65,535.
        config: tile sizes and warps.
        **arguments: every other parameter of the kernel by name, None for an absent tensor.
    """
    arguments |= config.arguments
    recording = _record.get()
    if recording is not None:
        recording.launches.append(Launch(kernel, grid, arguments))
        return
    if 0 in grid:
        return
    device = next(a.device for a in arguments.values() if isinstance(a, Tensor))
    # Triton launches on the current device, which need not be the tensors'.
    guard = torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
    with guard:
        _run(kernel, grid, device, arguments)


#: What Triton compiled, by device and `key_of`.
_compiled: dict[tuple[Any, ...], Any] = {}


def _run(
    kernel: Any, grid: tuple[int, ...], device: torch.device, arguments: Mapping[str, Any]
) -> None:
    """`kernel[grid](**arguments)`, without binding and inspecting arguments and globals again."""
    if not isinstance(kernel, triton.JITFunction):  # the interpreter compiles nothing
        kernel[grid](**arguments)
        return
    key = device, key_of(kernel, arguments)
    found = _compiled.get(key)
    if found is None:
        _compiled[key] = kernel[grid](**arguments)
    else:
        found[(*grid, 1, 1)[:3]](*[arguments[name] for name in kernel.arg_names])


def key_of(kernel: Any, arguments: Mapping[str, Any]) -> tuple[Any, ...]:
    """The kernel and all that Triton compiles it for: launches of equal keys run the same code."""
    constants, others = _parameters(kernel)
    values = [arguments[name] for name in constants]
    kinds = [
        float if type(x) is float else x if x is None else _kind_of(x)
        for x in map(arguments.__getitem__, others)
    ]
    return id(kernel), *values, *kinds


def _kind_of(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.dtype, value.data_ptr() % 16 == 0
    if type(value) is int:
        return value == 1, value % 16 == 0, -(2**31) <= value < 2**31
    return value


@functools.cache
def _parameters(kernel: Any) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Names of what a kernel is compiled with, and of its other parameters."""
    constants = [x.name for x in kernel.params if x.is_constexpr]
    others = [x.name for x in kernel.params if not x.is_constexpr]
    return (*constants, "num_warps", "num_stages"), tuple(others)


def cdiv(n: int, block: int) -> int:
    """Number of blocks that cover n."""
    return -(-n // block)
