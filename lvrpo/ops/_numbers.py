"""Numbers of an op that a schedule or a step may change, as a tensor on the host.

A float that a custom op takes as such is a constant of a graph that torch.compile makes: each new
value compiles another one. A tensor's values are not.
"""

from __future__ import annotations

import torch
from torch import Tensor


def numbers(*values: float) -> Tensor:
    """The values as fp64 on the CPU, whatever the default device is; no read of them is a wait."""
    if not torch.compiler.is_compiling():
        return torch.tensor(values, dtype=torch.float64, device="cpu")
    # Not torch.tensor: only arithmetic with a tensor keeps a traced float a variable of the graph.
    zero = torch.zeros((), dtype=torch.float64, device="cpu")
    return torch.stack([zero + value for value in values])
