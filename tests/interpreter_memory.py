"""Triton's interpreter reads and writes where a kernel says; here it says where it may."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np
from torch import Tensor


def _extent(tensor: Tensor) -> tuple[int, int]:
    """The bytes of a tensor, from its first element to its last."""
    last = sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True))
    size = 0 if tensor.numel() == 0 else (last + 1) * tensor.element_size()
    return tensor.data_ptr(), tensor.data_ptr() + size


def _refuse_strays(extents: list[tuple[int, int]], pointers: Any, mask: Any, what: str) -> None:
    first = np.asarray(pointers.data)[np.asarray(mask.data, dtype=bool)].astype(np.int64)
    end = first + max(1, pointers.get_element_ty().primitive_bitwidth // 8)
    allowed = np.zeros(first.shape, dtype=bool)
    for low, high in extents:
        allowed |= (first >= low) & (end <= high)
    if not allowed.all():
        count = int((~allowed).sum())
        raise MemoryError(f"{what} {count} of {allowed.size} elements outside the tensors given")


@contextlib.contextmanager
def checked_memory() -> Iterator[None]:
    """Inside, a kernel that the interpreter runs may touch the elements of its arguments alone.

    A view counts as what lies between its first and its last element, not as the buffer it is of.
    """
    from triton.runtime import interpreter as triton

    builder, executor = triton.InterpreterBuilder, triton.GridExecutor
    names = "create_masked_load", "create_masked_store", "create_atomic_rmw"
    originals = {name: getattr(builder, name) for name in names}
    run = executor.__call__
    extents: list[tuple[int, int]] = []

    def of_tensors(self: Any, *args: Any, **kwargs: Any) -> Any:
        given = [*args, *kwargs.values()]
        extents[:] = {_extent(x) for x in given if isinstance(x, Tensor)}
        return run(self, *args, **kwargs)

    def load(self: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
        _refuse_strays(extents, pointers, mask, "reads")
        return originals["create_masked_load"](self, pointers, mask, *rest)

    def store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        _refuse_strays(extents, pointers, mask, "writes")
        return originals["create_masked_store"](self, pointers, value, mask, *rest)

    def add(self: Any, kind: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        _refuse_strays(extents, pointers, mask, "adds to")
        return originals["create_atomic_rmw"](self, kind, pointers, value, mask, *rest)

    executor.__call__ = of_tensors
    for name, checked in zip(names, (load, store, add), strict=True):
        setattr(builder, name, checked)
    try:
        yield
    finally:
        executor.__call__ = run
        for name, original in originals.items():
            setattr(builder, name, original)
