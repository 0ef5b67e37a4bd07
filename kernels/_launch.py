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
        kernel: a `triton.jit` function, whose pointers, and nothing else, are called "..._ptr".
        grid: programs along x, y, z. Put rows on x: the others end at 65,535.
        config: tile sizes and warps.
        **arguments: every other parameter of the kernel by name, None for an absent tensor.
    """
    arguments |= config.arguments
    recording = _record.get()
    if recording is not None:
        recording.launches.append(Launch(kernel, grid, arguments))
    elif 0 in grid:
        return
    elif isinstance(kernel, triton.JITFunction):
        compiled_of(kernel).run(grid, arguments)
    else:  # the interpreter compiles nothing
        kernel[grid](**arguments)


class Compiled:
    """What Triton compiled of a kernel, found without binding and inspecting arguments again.

    Triton compiles for constants, for dtypes, and for what it sees in other values: of a pointer
    whether it is a multiple of 16, of an integer that too, whether it is 1, and its width.
    """

    def __init__(self, kernel: Any) -> None:
        """Nothing yet, of a `triton.jit` function."""
        self._kernel = kernel
        self._found: dict[tuple[Any, ...], Any] = {}
        constants = [x.name for x in kernel.params if x.is_constexpr]
        others = [x for x in kernel.params if not x.is_constexpr]
        pointers = [x for x in others if x.name.endswith("_ptr")]
        self._constants = *constants, "num_warps", "num_stages"
        self._pointers = [x.name for x in pointers]
        self._aligned = [x.name for x in pointers if not x.do_not_specialize_on_alignment]
        # A float has its type in the signature, and its value is not looked at.
        values = [x for x in others if x not in pointers and x.annotation_type[:2] != "fp"]
        self._integers = [x.name for x in values]

    def run(self, grid: tuple[int, ...], arguments: Mapping[str, Any]) -> None:
        """`kernel[grid](**arguments)`, on the device of the first argument."""
        device = arguments[self._pointers[0]].device
        key = device, self.key_of(arguments)
        with _current(device):
            found = self._found.get(key)
            if found is None:
                self._found[key] = self._kernel[grid](**arguments)
            else:
                found[(*grid, 1, 1)[:3]](*map(arguments.__getitem__, self._kernel.arg_names))

    def key_of(self, arguments: Mapping[str, Any]) -> tuple[Any, ...]:
        """All that Triton compiles for: launches of equal keys run the same code."""
        value_of = arguments.__getitem__
        return (
            *map(value_of, self._constants),
            *[x if x is None else x.dtype for x in map(value_of, self._pointers)],
            *[x is None or x.data_ptr() % 16 == 0 for x in map(value_of, self._aligned)],
            *[(x == 1, x % 16 == 0, -(2**31) <= x < 2**31) for x in map(value_of, self._integers)],
        )


#: By the id of a kernel, which its `Compiled` keeps alive: the hash of a kernel takes a lock.
_compiled: dict[int, Compiled] = {}


def compiled_of(kernel: Any) -> Compiled:
    """What is compiled of it."""
    found = _compiled.get(id(kernel))
    if found is None:
        found = _compiled[id(kernel)] = Compiled(kernel)
    return found


_NOTHING = contextlib.nullcontext()


def _current(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Triton launches on the current device, which need not be the tensors'."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return _NOTHING
    return torch.cuda.device(device)


def cdiv(n: int, block: int) -> int:
    """Number of blocks that cover n."""
    return -(-n // block)
