"""Checks that several ops share. Each raises a ValueError naming the argument and what it held."""

from __future__ import annotations

import os

import torch
from torch import Tensor


def check_values(tensor: Tensor) -> bool:
    """Whether to read values of `tensor`: always on a CPU, with LVRPO_CHECK=1 elsewhere.

    Reading a value of a GPU tensor waits for the device, and a traced tensor has none.
    """
    if torch.compiler.is_compiling() or isinstance(tensor, torch._subclasses.FakeTensor):
        return False
    return tensor.device.type == "cpu" or os.environ.get("LVRPO_CHECK") == "1"


def check_shape(op: str, name: str, tensor: Tensor, expected: tuple[int | str, ...]) -> None:
    """`expected` holds sizes, or letters for sizes that may be anything."""
    matches = tensor.dim() == len(expected) and all(
        isinstance(want, str) or have == want
        for have, want in zip(tensor.shape, expected, strict=True)
    )
    if not matches:
        shape = ", ".join(str(size) for size in expected)
        raise ValueError(f"{op}: {name} has shape {tuple(tensor.shape)}, expected [{shape}]")


def check_floating(op: str, name: str, tensor: Tensor) -> None:
    """The tensor holds real numbers."""
    if not tensor.is_floating_point():
        raise ValueError(f"{op}: {name} is {tensor.dtype}, expected a floating dtype")


def check_integer(op: str, name: str, tensor: Tensor) -> None:
    """The tensor holds int64 indices."""
    if tensor.dtype != torch.int64:
        raise ValueError(f"{op}: {name} is {tensor.dtype}, expected torch.int64")


def check_same_device(op: str, **tensors: Tensor | None) -> None:
    """All tensors are on one device."""
    devices = {name: tensor.device for name, tensor in tensors.items() if tensor is not None}
    if len(set(devices.values())) > 1:
        listed = ", ".join(f"{name} on {device}" for name, device in devices.items())
        raise ValueError(f"{op}: tensors are on different devices: {listed}")


def check_offsets(op: str, name: str, offsets: Tensor, total: int) -> None:
    """int64 [n + 1] offsets that start at 0, never decrease and end at `total`."""
    check_shape(op, name, offsets, ("n + 1",))
    check_integer(op, name, offsets)
    if offsets.numel() == 0:
        raise ValueError(f"{op}: {name} is empty, expected at least the offset 0")
    if not check_values(offsets):
        return
    steps = offsets.diff()
    if int(offsets[0]) != 0:
        raise ValueError(f"{op}: {name} starts at {int(offsets[0])}, expected 0")
    if bool((steps < 0).any()):
        at = int((steps < 0).nonzero()[0])
        raise ValueError(
            f"{op}: {name} decreases from {int(offsets[at])} to {int(offsets[at + 1])} at {at}"
        )
    if int(offsets[-1]) != total:
        raise ValueError(f"{op}: {name} ends at {int(offsets[-1])}, expected {total}")
