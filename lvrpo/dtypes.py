"""In which dtype an op computes, and what its numbers are to torch.compile.

A float that a custom op takes as such is a constant of a graph that torch.compile makes: each new
value compiles another one. A tensor's values are not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lvrpo.kept import kept_tensor


def widen(tensor: Tensor) -> Tensor:
    """fp64 stays fp64; every other floating dtype becomes fp32."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def number(value: float | Tensor, like: Tensor) -> Any:
    """A parameter to compare with or to clamp to; a scalar on the device of `like` while compiling.

    torch.compile makes a graph for each value of a float that a clamp or a `where` takes.
    """
    if not torch.compiler.is_compiling():
        return value
    return torch.zeros((), dtype=torch.float64, device=like.device) + value


@kept_tensor
def _kept_numbers(values: tuple[float, ...]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64, device="cpu")


def numbers(*values: float) -> Tensor:
    """The values as fp64 on the CPU, whatever the default device is; no read of them is a wait.

    Not to be written to: the same values are the same tensor, as making one takes longer than all
    that an op does with a few tokens.
    """
    if not torch.compiler.is_compiling():
        return _kept_numbers(tuple(map(float, values)))
    # Not torch.tensor: only arithmetic with a tensor keeps a traced float a variable of the graph.
    zero = torch.zeros((), dtype=torch.float64, device="cpu")
    return torch.stack([zero + value for value in values])


def numbers_by_name(names: Sequence[str], values: Mapping[str, float]) -> Tensor:
    """`numbers` in the order of `names`."""
    return numbers(*map(values.__getitem__, names))
