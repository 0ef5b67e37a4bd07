"""In which dtype a reference computes, and what its parameters are to torch.compile."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def widen(tensor: Tensor) -> Tensor:
    """fp64 stays fp64; every other floating dtype becomes fp32."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def number(value: float, like: Tensor) -> Any:
    """A parameter to compare with or to clamp to; a scalar on the device of `like` while compiling.

    torch.compile makes a graph for each value of a float that a clamp or a `where` takes.
    """
    if not torch.compiler.is_compiling():
        return value
    return torch.zeros((), dtype=torch.float64, device=like.device) + value
