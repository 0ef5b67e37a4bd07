"""Pictures of a run as files: its gallery, and drawings for the user.

gallery/           the same prompts and seeds at several times: <label>.json and its PNGs
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

import numpy as np
from PIL import Image

from lvrpo.runs.files import write_atomically
from lvrpo.trainer.journal import GalleryItem

GALLERY = "gallery"


def save_gallery(run_dir: str | Path, label: str, items: Iterable[GalleryItem]) -> Path:
    """Write gallery/<label>.json, whose pictures are PNGs beside it; returns its path.

    Raises:
        ValueError: an image that is not [1 or 3, H, W].
    """
    folder = Path(run_dir) / GALLERY
    folder.mkdir(parents=True, exist_ok=True)
    stem = re.sub(r"[^A-Za-z0-9]+", "-", label).strip("-").lower() or "gallery"
    rows = []
    for number, item in enumerate(items):
        name = None
        if item.image is not None:
            name = f"{stem}-{number:03d}.png"
            (folder / name).write_bytes(to_png(item.image, item.uid))
        rows.append({**asdict(item), "image": name})
    path = folder / f"{stem}.json"
    write_atomically(path, json.dumps({"label": label, "items": rows}, indent=1).encode())
    return path


def load_gallery(run_dir: str | Path) -> dict[str, list[GalleryItem]]:
    """The saved galleries by label, pictures as [C, H, W] floats; {} when there are none."""
    galleries: dict[str, list[GalleryItem]] = {}
    for path in sorted((Path(run_dir) / GALLERY).glob("*.json")):
        saved = json.loads(path.read_bytes())
        items = []
        for row in saved["items"]:
            image = None
            if row["image"] is not None:
                with Image.open(path.parent / row["image"]) as picture:
                    pixels = np.asarray(picture, dtype=np.float32) / 255
                image = pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)
            items.append(GalleryItem(**{**row, "image": image}))
        galleries[saved["label"]] = items
    return galleries


def to_png(image: np.ndarray, uid: str) -> bytes:
    """The picture of an item as a PNG of its own size."""
    if image.ndim != 3 or image.shape[0] not in (1, 3):
        raise ValueError(
            f"gallery: image of {uid} has shape {image.shape}, expected [1 or 3, H, W]"
        )
    buffer = io.BytesIO()
    _picture(image).save(buffer, "PNG")
    return buffer.getvalue()


def save_enlarged(image: np.ndarray, path: Path) -> None:
    """Write a [C, H, W] picture in the format of the file's ending, small ones as squares."""
    picture = _picture(image)
    scale = max(1, 128 // picture.height)
    size = picture.width * scale, picture.height * scale
    picture.resize(size, Image.Resampling.NEAREST).save(path)


def _picture(image: np.ndarray) -> Image.Image:
    """[1 or 3, H, W] floats as pixels of 8 bits, values cut to [0, 1]."""
    pixels = np.rint(np.nan_to_num(image).clip(0, 1) * 255).astype(np.uint8)
    return Image.fromarray(pixels[0] if len(pixels) == 1 else pixels.transpose(1, 2, 0))
