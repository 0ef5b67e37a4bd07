"""The one place that says in which dtype a reference computes."""

from __future__ import annotations

import torch
from torch import Tensor


def widen(tensor: Tensor) -> Tensor:
    """fp64 stays fp64; every other floating dtype becomes fp32."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()
