"""Fashion-MNIST: 70,000 photos of clothes, 28 x 28 in gray, ten classes (arXiv:1708.07747); MIT.

Its files come in a package of Debian, which needs no installation: unpacked is enough.
"""

from __future__ import annotations

import gzip
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from lvrpo.real.packages import check_sha256

PACKAGE = "dataset-fashion-mnist"
INSTALL = f"apt-get download {PACKAGE} && dpkg-deb -x {PACKAGE}_*.deb"
#: Where the package has its files.
UNPACKED = Path("usr/share/datasets/fashion-mnist")
SHA256 = {
    "train-images-idx3-ubyte.gz": (
        "b0564c3eedabfbf835052cff8503ea422014ce006caf5b757f851416ee8300c7"
    ),
    "train-labels-idx1-ubyte.gz": (
        "0ae29f65d86684f32d1b9c85147786c547b9c6aebcaf235f0400a0cce308b056"
    ),
    "t10k-images-idx3-ubyte.gz": (
        "cc1d090a38ace84dfa1aa66e3ada7c336ef481a96936906477e6dd344da56eaa"
    ),
    "t10k-labels-idx1-ubyte.gz": (
        "8d3605d196f4be44669e46906da9733c8131fef761fdbfec72c424d5222f1a05"
    ),
}
CLASSES = (
    *("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat"),
    *("Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
)
#: The published split has no validation photos: the last of the training file are.
VALIDATION = 10_000
#: Bytes before the numbers in a file of IDX, by its dimensions.
IDX_HEADER = {1: 8, 3: 16}


@dataclass(frozen=True, eq=False)
class Photos:
    """N photos.

    Attributes:
        images: [N, 28, 28] uint8, clothes are light on black.
        labels: [N] int64, places in `CLASSES`.
    """

    images: NDArray[np.uint8]
    labels: NDArray[np.int64]

    def __getitem__(self, which: slice) -> Photos:
        """Some of them."""
        return Photos(self.images[which], self.labels[which])


def why_not(folder: Path) -> str:
    """What to install before the photos can be read, or "".

    Args:
        folder: where the package was unpacked; it may be installed instead.
    """
    if _files(folder) is not None:
        return ""
    return f"{folder} has no {UNPACKED / 'train-images-idx3-ubyte.gz'}; {INSTALL} {folder}"


def load(folder: Path) -> Mapping[str, Photos]:
    """All photos: "train" (50,000), "validation" (10,000) and "test" (10,000).

    Args:
        folder: where the package was unpacked; it may be installed instead.

    Raises:
        FileNotFoundError: it is in neither place; says what to install.
        ValueError: its files are not those that results were published with.
    """
    files = _files(folder)
    if files is None:
        raise FileNotFoundError(why_not(folder))
    for name, expected in SHA256.items():
        check_sha256(files / name, expected)
    train, test = (
        Photos(
            read_idx(files / f"{name}-images-idx3-ubyte.gz", 3),
            read_idx(files / f"{name}-labels-idx1-ubyte.gz", 1).astype(np.int64),
        )
        for name in ("train", "t10k")
    )
    first = len(train.labels) - VALIDATION
    return {"train": train[:first], "validation": train[first:], "test": test}


def read_idx(path: Path, dimensions: int) -> NDArray[np.uint8]:
    """The bytes of a compressed file of IDX, in their shape.

    Args:
        path: of the file.
        dimensions: 1 or 3 that it has.

    Raises:
        ValueError: it has others, or not as many numbers as it says.
    """
    header = IDX_HEADER[dimensions]
    content = gzip.decompress(path.read_bytes())
    kind, *shape = (int(size) for size in np.frombuffer(content[:header], ">i4"))
    if kind != 0x0800 + dimensions or len(content) - header != np.prod(shape):
        raise ValueError(f"{path} is no file of IDX with bytes in {dimensions} dimensions")
    return np.frombuffer(content, np.uint8, offset=header).reshape(shape)


def _files(folder: Path) -> Path | None:
    places = (root / UNPACKED for root in (folder, Path("/")))
    return next((place for place in places if (place / next(iter(SHA256))).is_file()), None)
