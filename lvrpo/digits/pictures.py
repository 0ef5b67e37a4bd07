"""The real handwritten digits inside scikit-learn, split by the content of each source image."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

import numpy as np
from numpy.typing import NDArray

from lvrpo.data.example import Picture

Split: TypeAlias = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = get_args(Split)
#: What one cell of a canvas holds: a digit, or None for an empty cell.
Cell: TypeAlias = int | None
SIDE = 8  # pixels, of one digit and of one cell
_IMAGE_SHARES = (0.60, 0.15, 0.25)


@dataclass(frozen=True, eq=False)
class DigitPool:
    """The source images of one split, sorted by label.

    Args:
        images: [n, 8, 8] fp32 in [0, 1].
        labels: [n] int64, ascending.
        starts: [11] int64, digit d is images[starts[d] : starts[d + 1]].
    """

    images: NDArray[np.float32]
    labels: NDArray[np.int64]
    starts: NDArray[np.int64]

    def pick(self, digits: NDArray[np.int64], u: NDArray[np.float64]) -> NDArray[np.int64]:
        """Indices of one image per digit, chosen by u in [0, 1)."""
        count = self.starts[digits + 1] - self.starts[digits]
        return self.starts[digits] + (u * count).astype(np.int64)


def split_of(content: bytes, shares: tuple[float, float, float]) -> Split:
    """The split that this content belongs to, by hash: equal content, equal split, for ever."""
    digest = hashlib.blake2b(content, digest_size=8, person=b"lvrpo-split").digest()
    position = int.from_bytes(digest, "big") / 2**64
    if position < shares[0]:
        return "train"
    return "validation" if position < shares[0] + shares[1] else "test"


@functools.cache
def digit_pools() -> Mapping[Split, DigitPool]:
    """The three disjoint sets of source images: about 60 % train, 15 % validation, 25 % test."""
    # scikit-learn takes a second to import, and only these scenes and their judges need it.
    from sklearn.datasets import load_digits

    data = load_digits()
    levels = data.images.astype(np.uint8)  # 0..16
    owner = np.array([split_of(image.tobytes(), _IMAGE_SHARES) for image in levels])
    pools: dict[Split, DigitPool] = {}
    for split in SPLITS:
        mine = np.flatnonzero(owner == split)
        mine = mine[np.argsort(data.target[mine], kind="stable")]
        labels = data.target[mine].astype(np.int64)
        images = (levels[mine] / 16).astype(np.float32)
        pools[split] = DigitPool(images, labels, np.searchsorted(labels, np.arange(11)))
    check_images_disjoint({split: pool.images for split, pool in pools.items()})
    return pools


def check_images_disjoint(splits: Mapping[str, NDArray[np.float32]]) -> None:
    """No picture of one split has a pixel-identical twin in another.

    Args:
        splits: name to [n, H, W] pictures.

    Raises:
        ValueError: naming both splits and both indices.
    """
    seen: dict[bytes, tuple[str, int]] = {}
    for split, images in splits.items():
        for index, image in enumerate(images):
            content = np.ascontiguousarray(image).tobytes()
            other, at = seen.setdefault(content, (split, index))
            if other != split:
                raise ValueError(f"splits overlap: image {index} of {split} is {at} of {other}")


def assemble(cells: NDArray[np.float32], rows: int, cols: int) -> NDArray[np.float32]:
    """[N, rows * cols, 8, 8] cells, row by row, to [N, 1, rows * 8, cols * 8] pictures."""
    grid = cells.reshape(-1, rows, cols, SIDE, SIDE).transpose(0, 1, 3, 2, 4)
    return grid.reshape(-1, 1, rows * SIDE, cols * SIDE)


def dissect(pictures: NDArray[np.float32], rows: int, cols: int) -> NDArray[np.float32]:
    """The inverse of `assemble`."""
    grid = pictures.reshape(-1, rows, SIDE, cols, SIDE).transpose(0, 1, 3, 2, 4)
    return grid.reshape(-1, rows * cols, SIDE, SIDE)


def jitter(cells: NDArray[np.float32], rng: np.random.Generator) -> NDArray[np.float32]:
    """Shift a third of the digits by a pixel per axis, scale their ink, add noise around it."""
    shape, flat = cells.shape, cells.reshape(-1, SIDE, SIDE)
    padded = np.pad(flat, ((0, 0), (1, 1), (1, 1)))
    dy, dx = rng.choice(3, (2, len(flat)), p=[1 / 6, 2 / 3, 1 / 6])
    window = np.arange(SIDE)
    at = np.arange(len(flat))[:, None, None]
    flat = padded[at, (dy[:, None] + window)[:, :, None], (dx[:, None] + window)[:, None, :]]
    inked = flat.any(axis=(1, 2), keepdims=True)
    scale = rng.uniform(0.75, 1.1, (len(flat), 1, 1)).astype(np.float32)
    noise = 0.07 * rng.standard_normal(flat.shape, dtype=np.float32)
    jittered: NDArray[np.float32] = np.clip(flat * scale + noise * inked, 0, 1)
    return jittered.reshape(shape)


def read_source(cell: Picture, split: Split) -> Cell:
    """The label of a cell that is an exact copy of a source image; None for an empty one."""
    if not cell.any():
        return None
    label = _labels_by_content(split).get(np.ascontiguousarray(cell).tobytes())
    if label is None:
        raise ValueError(f"read_source: the cell is no source image of split {split!r}")
    return label


@functools.cache
def _labels_by_content(split: Split) -> dict[bytes, int]:
    pool = digit_pools()[split]
    pairs = zip(pool.images, pool.labels.tolist(), strict=True)
    return {image.tobytes(): label for image, label in pairs}
