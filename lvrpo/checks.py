"""Checks that several ops share. Each raises a ValueError naming the argument and what it held."""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
import os
from collections.abc import Callable, Sequence
from typing import Any, TypeVar, cast, overload

import torch
from torch import Tensor

Function = TypeVar("Function", bound=Callable[..., Any])


def check_values(tensor: Tensor) -> bool:
    """Whether to read values of `tensor`: always on a CPU, with LVRPO_CHECK=1 elsewhere.

    Reading a value of a GPU tensor waits for the device, and a traced tensor has none.
    """
    if torch.compiler.is_compiling() or isinstance(tensor, torch._subclasses.FakeTensor):
        return False
    return tensor.is_cpu or os.environ.get("LVRPO_CHECK") == "1"


def as_tensor(op: str, name: str, value: Any, device: torch.device) -> Tensor:
    """A tensor as it is; a number or a nested list as a tensor on `device`, None in it as NaN."""
    if isinstance(value, Tensor):
        return value
    try:
        return torch.tensor(_with_nan(value), device=device)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"{op}: {name} is a {type(value).__name__} that no tensor can be made of ({error}), "
            "expected a tensor or a list of numbers"
        ) from error


def _with_nan(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return [_with_nan(item) for item in value]
    return math.nan if value is None else value


def replaced(**successors: str) -> Callable[[Function], Function]:
    """Decorate a function whose keywords of these names are gone, to say what took their place."""

    def decorate(function: Function) -> Function:
        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            for name, successor in successors.items():
                if name in kwargs:
                    raise TypeError(f"{function.__name__}: {name} is gone; give {successor}")
            return function(*args, **kwargs)

        return cast(Function, call)

    return decorate


#: What took the place of the weights that were also a mask.
MASK_AND_WEIGHTS = (
    "mask= (what counts in denominators, KL and metrics) and policy_weights= (what multiplies the "
    "policy term alone)"
)


def as_index(op: str, name: str, tensor: Tensor) -> Tensor:
    """Indices of any integer dtype, as int64."""
    if tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool:
        raise ValueError(f"{op}: {name} is {tensor.dtype}, expected an integer dtype")
    return tensor.long()


def as_mask(op: str, name: str, mask: Tensor) -> Tensor:
    """A mask of any dtype as bool: what is above 0 counts.

    Raises:
        ValueError: where values may be read, one of them is negative or NaN.
    """
    if mask.dtype == torch.bool:
        return mask
    counts = mask.detach() > 0
    if check_values(mask):
        refuse_first(op, name, mask, ~counts & (mask != 0), "0, or a number > 0")
    return counts


@overload
def as_saved(tensor: Tensor) -> Tensor: ...


@overload
def as_saved(tensor: Tensor | None) -> Tensor | None: ...


def as_saved(tensor: Tensor | None) -> Tensor | None:
    """`tensor`, or a copy where autograd could not save it: one made under `inference_mode`."""
    if tensor is None or torch.compiler.is_compiling() or torch.is_inference_mode_enabled():
        return tensor
    return tensor.clone() if tensor.is_inference() else tensor


def autocasts(device: str) -> bool:
    """Whether autocast is on for devices of this type, some of which have none."""
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)


def without_autocast(tensor: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Autocast switched off on the device of `tensor`."""
    device = tensor.device.type
    return torch.autocast(device, enabled=False) if autocasts(device) else contextlib.nullcontext()


def as_factor(tensor: Tensor) -> Tensor:
    """`tensor` as autocast gives it to a product: in its dtype while it is on; never fp64."""
    device = tensor.device.type
    narrows = tensor.is_floating_point() and tensor.dtype != torch.float64
    return tensor.to(torch.get_autocast_dtype(device)) if narrows and autocasts(device) else tensor


def refuse_first(op: str, name: str, values: Tensor, bad: Tensor, expected: str) -> None:
    """Name the first element, or the first row of it where `bad` has fewer dimensions."""
    if bool(bad.any()):
        at = tuple(bad.nonzero()[0].tolist())
        index = ", ".join(str(i) for i in at)
        raise ValueError(f"{op}: {name}[{index}] is {values[at].tolist()}, expected {expected}")


def is_shape(shape: tuple[int, ...], expected: tuple[int, ...]) -> bool:
    """Whether two shapes are one, compared size by size: a traced size is in no tuple."""
    return len(shape) == len(expected) and all(
        have == want for have, want in zip(shape, expected, strict=True)
    )


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


def check_scale(op: str, temperature: float, softcap: float | None) -> None:
    """Temperature and softcap are finite and positive; the softcap may be None."""
    if not 0 < temperature < math.inf:
        raise ValueError(f"{op}: temperature is {temperature}, expected finite and > 0")
    if softcap is not None and not 0 < softcap < math.inf:
        raise ValueError(f"{op}: softcap is {softcap}, expected > 0, or None for no cap")


def check_same_device(op: str, **tensors: Tensor | None) -> None:
    """All tensors are on one device."""
    if len({tensor.device for tensor in tensors.values() if tensor is not None}) > 1:
        devices = {name: tensor.device for name, tensor in tensors.items() if tensor is not None}
        listed = ", ".join(f"{name} on {device}" for name, device in devices.items())
        raise ValueError(f"{op}: tensors are on different devices: {listed}")


def as_offsets(
    op: str, name: str, offsets: Tensor | Sequence[int], total: int, device: torch.device
) -> Tensor:
    """int64 [n + 1] offsets, from any integers, that start at 0, never decrease, end at `total`."""
    offsets = as_tensor(op, name, offsets, device)
    check_shape(op, name, offsets, ("n + 1",))
    offsets = as_index(op, name, offsets)
    if offsets.numel() == 0:
        raise ValueError(f"{op}: {name} is empty, expected at least the offset 0")
    if offsets.numel() == 1 and total > 0:
        raise ValueError(f"{op}: {name} has 1 offset, expected one more to end at {total}")
    if check_values(offsets) and not _are_offsets(offsets, total):
        _refuse_offsets(op, name, offsets, total)
    return offsets


def _are_offsets(offsets: Tensor, total: int) -> bool:
    if offsets.numel() > 100:
        ends = int(offsets[0]) == 0 and int(offsets[-1]) == total
        return ends and not bool((offsets.diff() < 0).any())
    values = offsets.tolist()  # faster than the calls of torch above
    return values[0] == 0 and values[-1] == total and values == sorted(values)


def _refuse_offsets(op: str, name: str, offsets: Tensor, total: int) -> None:
    values = offsets.tolist()
    if values[0] != 0:
        raise ValueError(f"{op}: {name} starts at {values[0]}, expected 0")
    for at, (one, next_one) in enumerate(itertools.pairwise(values)):
        if next_one < one:
            raise ValueError(f"{op}: {name} decreases from {one} to {next_one} at {at}")
    raise ValueError(f"{op}: {name} ends at {values[-1]}, expected {total}")


def as_data(tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """`tensor` without its graph, in `dtype`; itself where that changes nothing."""
    tensor = tensor.detach() if tensor.requires_grad else tensor
    return tensor if dtype is None or tensor.dtype == dtype else tensor.to(dtype)
