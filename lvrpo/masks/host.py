"""Masks are laid out on the host: where they are made, what is taken from there, how they move."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Sequence
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


def on_the_host(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """Lay out on the host, whatever torch's default device is, and not in inference mode.

    A mask that was made during a rollout serves a later backward pass, too.
    """

    @functools.wraps(function)
    def on_host(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        with torch.inference_mode(False), torch.device("cpu"):
            return function(*args, **kwargs)

    return on_host


def move(table: Tensor, device: torch.device | str) -> Tensor:
    """On `device`, without waiting for what it is doing."""
    on_gpu = torch.device(device).type == "cuda"
    return (table.pin_memory() if on_gpu else table).to(device, non_blocking=True)


def host_ints(name: str, values: Sequence[int] | Tensor) -> list[int]:
    """Plain integers; refuses a tensor on another device, which would have to be waited for."""
    if isinstance(values, Tensor):
        check_on_host(name, values, 1)
        return values.tolist()  # type: ignore[no-any-return]
    try:
        values = list(values)
    except TypeError:
        raise ValueError(f"SpanMask: {name} is {values!r}, expected integers") from None
    for i, value in enumerate(values):
        if isinstance(value, bool) or not hasattr(value, "__index__"):
            raise ValueError(f"SpanMask: {name}[{i}] is {value!r}, expected an integer")
    return list(map(operator.index, values))


def host_spans(spans: Sequence[int], count: int) -> list[int]:
    """Indices of spans that a mask of `count` spans has."""
    found = host_ints("spans", spans)
    for span in found:
        if not 0 <= span < count:
            raise ValueError(f"SpanMask: there is no span {span} among {count}")
    return found


def check_on_host(name: str, tensor: Tensor, dims: int) -> None:
    """Refuse a tensor of another device, and anything but integers in `dims` dimensions."""
    if tensor.device.type != "cpu":
        raise ValueError(
            f"SpanMask: {name} is on {tensor.device}; a mask is laid out on the host and then "
            "moved with `to`"
        )
    if tensor.dim() != dims or tensor.is_floating_point() or tensor.dtype == torch.bool:
        shape = f"{tensor.dtype} of shape {tuple(tensor.shape)}"
        raise ValueError(f"SpanMask: {name} is {shape}, expected integers with {dims} dimensions")
