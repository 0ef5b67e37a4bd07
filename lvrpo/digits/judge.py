"""Two independent readers of drawn digits: the judge that rewards, and a gold reader that does not.

The judge is a support vector machine fitted on the training digits. The gold reader looks for the
nearest neighbour among shifted validation digits: other pictures and another family of classifier,
so a drawing that only exploits the judge shows as a gap between the two.
"""

from __future__ import annotations

import functools
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from lvrpo.digits.pictures import SIDE, Cell, Split, digit_pools

#: Sum of a cell's 64 pixels in [0, 1] from which it counts as drawn on. The faintest source digit
#: has 11.5; an empty cell that went through the autoencoder keeps less than 0.1.
INK_THRESHOLD = 5.0
_GAMMA, _COST = 0.15, 10.0  # 98.9 % in ten-fold cross-validation on the training digits


class DigitReader(Protocol):
    """Classifies pictures of single digits."""

    @property
    def name(self) -> str:
        """For reports."""

    def classify(self, cells: Tensor) -> Tensor:
        """[M, 8, 8] fp32 pictures in [0, 1] to [M] int64 labels."""


class DigitJudge:
    """RBF support vector machine, one against one."""

    name = "judge"

    def __init__(self) -> None:
        from sklearn.svm import SVC

        pool = digit_pools()["train"]
        self._machine = SVC(C=_COST, gamma=_GAMMA)
        self._machine.fit(pool.images.reshape(-1, SIDE**2), pool.labels)

    def classify(self, cells: Tensor) -> Tensor:
        """[M, 8, 8] fp32 pictures in [0, 1] to [M] int64 labels."""
        if not len(cells):  # which scikit-learn refuses
            return torch.empty(0, dtype=torch.int64)
        return torch.from_numpy(self._machine.predict(cells.flatten(1).numpy()))


class GoldReader:
    """The nearest neighbour among the validation digits and their one-pixel shifts."""

    name = "gold"

    def __init__(self) -> None:
        pool = digit_pools()["validation"]
        padded = np.pad(pool.images, ((0, 0), (1, 1), (1, 1)))
        shifts = [(1, 1), (0, 1), (2, 1), (1, 0), (1, 2)]
        shifted = [padded[:, y : y + SIDE, x : x + SIDE] for y, x in shifts]
        self._known = torch.from_numpy(np.concatenate(shifted)).flatten(1)
        self._labels = torch.from_numpy(np.tile(pool.labels, len(shifts)))

    def classify(self, cells: Tensor) -> Tensor:
        """[M, 8, 8] fp32 pictures in [0, 1] to [M] int64 labels."""
        return self._labels[_square_distances(cells, self._known).argmin(dim=1)]


@functools.cache
def digit_judge() -> DigitJudge:
    """The judge, fitted once per process (30 ms after scikit-learn is imported)."""
    return DigitJudge()


@functools.cache
def gold_reader() -> GoldReader:
    """The gold reader, fitted once per process."""
    return GoldReader()


def reader_accuracy(reader: DigitReader, split: Split = "test") -> float:
    """Share of a split's source digits that are read right: to be reported with every result."""
    pool = digit_pools()[split]
    labels = reader.classify(torch.from_numpy(pool.images))
    return float((labels == torch.from_numpy(pool.labels)).float().mean())


def read_pictures(
    reader: DigitReader, pictures: Tensor, *, ink_threshold: float = INK_THRESHOLD
) -> list[tuple[Cell, ...]]:
    """What every cell of every picture shows, row by row; None for an empty cell.

    Args:
        reader: of single digits.
        pictures: [N, C, H, W] in [0, 1], H and W multiples of 8; channels are averaged.
        ink_threshold: see `INK_THRESHOLD`.

    Raises:
        ValueError: the size is not a whole number of cells, or a pixel is NaN or infinite.
    """
    if pictures.dim() != 4 or pictures.shape[2] % SIDE or pictures.shape[3] % SIDE:
        raise ValueError(
            f"read_pictures: pictures has shape {tuple(pictures.shape)}, expected [N, C, H, W] "
            f"with H and W multiples of {SIDE}"
        )
    gray = pictures.detach().to("cpu", torch.float32).mean(dim=1)
    broken = ~gray.isfinite().all(dim=2).all(dim=1)
    if bool(broken.any()):
        raise ValueError(
            f"read_pictures: picture {int(broken.nonzero()[0])} holds NaN or infinite pixels"
        )
    rows, cols = gray.shape[1] // SIDE, gray.shape[2] // SIDE
    cells = gray.reshape(-1, rows, SIDE, cols, SIDE).transpose(2, 3)
    full = (cells.sum(dim=(3, 4)) > ink_threshold).flatten(1)
    labels = iter(reader.classify(cells.reshape(-1, SIDE, SIDE)[full.flatten()]).tolist())
    return [tuple(next(labels) if inked else None for inked in row) for row in full.tolist()]


def _square_distances(cells: Tensor, known: Tensor) -> Tensor:  # [M, 8, 8], [K, 64] -> [M, K]
    x = cells.flatten(1)
    products = torch.addmm(known.square().sum(dim=1), x, known.T, alpha=-2.0)
    return products.add_(x.square().sum(dim=1, keepdim=True))
