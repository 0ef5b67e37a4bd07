"""Pictures of a run as files: its galleries, and drawings for the user.

gallery/           the same prompts and seeds at several times: <label>.json and its PNGs
samples/           some samples of training steps with their scores: step-<step>.json and its PNGs
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from lvrpo.runs.files import write_atomically
from lvrpo.trainer.journal import GalleryItem

GALLERY, SAMPLES = "gallery", "samples"
#: Pixels along a side that are kept of a picture.
SIDE = 512
#: Training steps of which samples are kept, and bytes of them.
MOST_STEPS, MOST_BYTES = 64, 64 << 20


def save_gallery(run_dir: str | Path, label: str, items: Iterable[GalleryItem]) -> Path:
    """Write gallery/<label>.json, whose pictures are PNGs beside it; returns its path.

    Raises:
        ValueError: an image that is not [1 or 3, H, W].
    """
    stem = re.sub(r"[^A-Za-z0-9]+", "-", label).strip("-").lower() or "gallery"
    return _save(Path(run_dir) / GALLERY / f"{stem}.json", {"label": label}, items)


def save_samples(run_dir: str | Path, step: int, items: Iterable[GalleryItem]) -> Path:
    """Write samples/step-<step>.json; where there are too many, every second one goes.

    Raises:
        ValueError: an image that is not [1 or 3, H, W].
    """
    folder = Path(run_dir) / SAMPLES
    path = _save(folder / f"step-{step:09d}.json", {"step": step}, items)
    saved = sorted(folder.glob("*.json"))
    size = sum(file.stat().st_size for file in folder.iterdir())
    if len(saved) > MOST_STEPS or size > MOST_BYTES:
        for old in saved[1:-1:2]:
            _delete(old)
    return path


def drop_samples(run_dir: str | Path, after: int) -> None:
    """Delete what `save_samples` kept of later steps."""
    for step, path in _samples(run_dir).items():
        if step > after:
            _delete(path)


def _samples(run_dir: str | Path) -> dict[int, Path]:
    saved = sorted((Path(run_dir) / SAMPLES).glob("step-*.json"))
    return {int(path.stem.removeprefix("step-")): path for path in saved}


def _save(path: Path, told: Mapping[str, Any], items: Iterable[GalleryItem]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    names: dict[bytes, str] = {}  # a picture that several items share is one file

    def saved(image: np.ndarray | None, uid: str) -> str | None:
        if image is None:
            return None
        png = to_png(image, uid)
        if png not in names:
            names[png] = f"{path.stem}-{len(names):03d}.png"
            (path.parent / names[png]).write_bytes(png)
        return names[png]

    rows = [
        {
            **vars(item),
            "image": saved(item.image, item.uid),
            "source": saved(item.source, item.uid),
            "scores": dict(item.scores),
        }
        for item in items
    ]
    write_atomically(path, json.dumps({**told, "items": rows}, indent=1).encode())
    return path


def _delete(path: Path) -> None:
    path.unlink(missing_ok=True)
    for picture in path.parent.glob(f"{path.stem}-*.png"):
        picture.unlink()


def load_gallery(run_dir: str | Path) -> dict[str, list[GalleryItem]]:
    """The saved galleries by label, pictures as [C, H, W] floats; {} when there are none."""
    paths = sorted((Path(run_dir) / GALLERY).glob("*.json"))
    return {json.loads(path.read_bytes())["label"]: _load(path) for path in paths}


def load_samples(run_dir: str | Path) -> dict[int, list[GalleryItem]]:
    """What `save_samples` kept, by step."""
    return {step: _load(path) for step, path in _samples(run_dir).items()}


def _load(path: Path) -> list[GalleryItem]:
    def read(name: str | None) -> np.ndarray | None:
        if name is None:
            return None
        with Image.open(path.parent / name) as picture:
            pixels = np.asarray(picture, dtype=np.float32) / 255
        return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)

    rows = json.loads(path.read_bytes())["items"]
    return [
        GalleryItem(**{**row, "image": read(row["image"]), "source": read(row.get("source"))})
        for row in rows
    ]


def to_png(image: np.ndarray, uid: str) -> bytes:
    """The picture of an item as a PNG, of its own size up to `SIDE`."""
    if image.ndim != 3 or image.shape[0] not in (1, 3):
        raise ValueError(
            f"gallery: image of {uid} has shape {image.shape}, expected [1 or 3, H, W]"
        )
    buffer = io.BytesIO()
    pixels_of(image).save(buffer, "PNG")
    return buffer.getvalue()


def save_enlarged(image: np.ndarray, path: Path) -> None:
    """Write a [C, H, W] picture in the format of the file's ending, small ones as squares."""
    picture = _picture(image)
    scale = max(1, 128 // picture.height)
    size = picture.width * scale, picture.height * scale
    picture.resize(size, Image.Resampling.NEAREST).save(path)


def pixels_of(image: np.ndarray) -> Image.Image:
    """[1 or 3, H, W] floats as a picture of 8 bits, of its own size up to `SIDE`."""
    picture = _picture(image)
    picture.thumbnail((SIDE, SIDE))
    return picture


def _picture(image: np.ndarray) -> Image.Image:
    """[1 or 3, H, W] floats as pixels of 8 bits, values cut to [0, 1]."""
    pixels = np.rint(np.nan_to_num(image).clip(0, 1) * 255).astype(np.uint8)
    return Image.fromarray(pixels[0] if len(pixels) == 1 else pixels.transpose(1, 2, 0))
