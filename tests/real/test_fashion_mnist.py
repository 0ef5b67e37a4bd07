"""The photos of Fashion-MNIST: what is read is what the files hold, and only these files."""

from __future__ import annotations

import gzip
import hashlib
import struct
from pathlib import Path

import numpy as np
import pytest

from lvrpo.real import fashion_mnist


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package as Debian has it, with few photos of noise."""
    rng = np.random.default_rng(0)
    files = tmp_path / fashion_mnist.UNPACKED
    files.mkdir(parents=True)
    digests = {}
    for name, count in (("train", 25), ("t10k", 7)):
        images = rng.integers(0, 256, (count, 28, 28), np.uint8)
        labels = rng.integers(0, 10, count, np.uint8)
        for file, array in ((f"{name}-images-idx3", images), (f"{name}-labels-idx1", labels)):
            header = struct.pack(f">i{array.ndim}i", 0x0800 + array.ndim, *array.shape)
            content = gzip.compress(header + array.tobytes())
            (files / f"{file}-ubyte.gz").write_bytes(content)
            digests[f"{file}-ubyte.gz"] = hashlib.sha256(content).hexdigest()
    monkeypatch.setattr(fashion_mnist, "SHA256", digests)
    monkeypatch.setattr(fashion_mnist, "VALIDATION", 10)
    return tmp_path


def test_every_photo_is_in_one_split_in_the_order_of_the_files(folder):
    rng = np.random.default_rng(0)
    found = fashion_mnist.load(folder)
    assert {name: len(photos.labels) for name, photos in found.items()} == {
        "train": 15,
        "validation": 10,
        "test": 7,
    }
    for names, count in ((("train", "validation"), 25), (("test",), 7)):
        images = np.concatenate([found[name].images for name in names])
        labels = np.concatenate([found[name].labels for name in names])
        np.testing.assert_array_equal(images, rng.integers(0, 256, (count, 28, 28), np.uint8))
        np.testing.assert_array_equal(labels, rng.integers(0, 10, count, np.uint8))


def test_other_files_are_refused(folder):
    path = folder / fashion_mnist.UNPACKED / "t10k-labels-idx1-ubyte.gz"
    path.write_bytes(path.read_bytes() + b" ")
    with pytest.raises(ValueError, match=r"t10k-labels.* has the SHA-256"):
        fashion_mnist.load(folder)


@pytest.mark.parametrize("change", [lambda b: b[:-1], lambda b: b"\0\0\x09" + b[3:]])
def test_what_is_no_file_of_bytes_is_refused(folder, change):
    path = folder / fashion_mnist.UNPACKED / "t10k-labels-idx1-ubyte.gz"
    path.write_bytes(gzip.compress(change(gzip.decompress(path.read_bytes()))))
    with pytest.raises(ValueError, match="is no file of IDX with bytes in 1 dimensions"):
        fashion_mnist.read_idx(path, 1)


def test_a_missing_package_is_one_line(tmp_path):
    if not fashion_mnist.why_not(tmp_path):
        pytest.skip("the package of Debian is installed")
    with pytest.raises(FileNotFoundError, match="apt-get download dataset-fashion-mnist") as error:
        fashion_mnist.load(tmp_path)
    assert "\n" not in str(error.value)
