"""Where a token is and how noisy it is: the frozen tables and the time embedding of BAGEL."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from lvrpo.dtypes import widen


class PositionTable(nn.Module):
    """Frozen sines and cosines of the columns and rows of a square grid, `width` per position.

    The first half of a row is of the column, the second of the row, each with sines first:
    frequency i of the n in a quarter is 10000 ** (-i / n). A position is row * side + column,
    whatever the size of its picture.

    Args:
        side: of the grid.
        width: of a row of the table, a multiple of 4.
    """

    pos_embed: Tensor  # [side ** 2, width]; a buffer: saved, never trained

    def __init__(self, side: int, width: int) -> None:
        super().__init__()
        self.side = side
        place = torch.arange(side, dtype=torch.float64)
        angle = place[:, None] * _frequencies(width // 4)
        along = torch.cat([angle.sin(), angle.cos()], dim=1)
        columns = along.expand(side, side, -1)
        table = torch.cat([columns, columns.transpose(0, 1)], dim=2).flatten(0, 1)
        self.register_buffer("pos_embed", table.float())

    def forward(self, grid: Tensor) -> Tensor:
        """[n, 2] (row, column) -> [n, width]."""
        return self.pos_embed[grid_index(grid, self.side)]


def grid_index(grid: Tensor, side: int) -> Tensor:
    """[n, 2] (row, column) -> [n] positions of a grid that is `side` wide."""
    return grid[:, 0] * side + grid[:, 1]


class TimeEmbedding(nn.Module):
    """An MLP of the cosines and sines of a flow's time.

    Args:
        dim: of cosines and sines together.
        width: of the result.
    """

    def __init__(self, dim: int, width: int) -> None:
        super().__init__()
        self.dim = dim
        self.mlp = nn.Sequential(nn.Linear(dim, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, timesteps: Tensor) -> Tensor:
        """[n] in [0, 1] -> [n, width]."""
        weight = self.mlp[0].weight
        assert isinstance(weight, Tensor)
        frequency = _frequencies(self.dim // 2, weight.device).to(widen(weight).dtype)
        angle = timesteps.to(frequency)[:, None] * frequency
        return self.mlp(torch.cat([angle.cos(), angle.sin()], dim=1).to(weight))  # type: ignore[no-any-return]


def _frequencies(count: int, device: torch.device | None = None) -> Tensor:
    """[count] fp64, from 1 down to just above 1 / 10000."""
    exponent = torch.arange(count, dtype=torch.float64, device=device) / count
    return torch.exp(-math.log(10_000) * exponent)
