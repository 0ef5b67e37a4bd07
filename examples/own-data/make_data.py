"""Stands for your own data: a few dozen pictures of coloured shapes, with questions and requests.

Writes pictures and two JSONL files into a folder, the current one by default.
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

#: A colour has several right names.
COLOURS = {"red": ["red"], "gray": ["gray", "grey"], "blue": ["blue"], "green": ["green"]}
SHAPES = ("square", "disc")


def picture(colour: str, shape: str, draw: random.Random) -> Image.Image:
    """24 x 24 pixels."""
    image = Image.new("RGB", (24, 24), "white")
    left, top = draw.randint(1, 6), draw.randint(1, 6)
    side = draw.randint(12, 16)
    box = (left, top, left + side, top + side)
    pen = ImageDraw.Draw(image)
    (pen.rectangle if shape == "square" else pen.ellipse)(box, fill=colour)
    return image


def lines(folder: Path, split: str, count: int) -> list[dict[str, Any]]:
    """Questions about pictures, and requests to draw, one of each kind in turn."""
    draw = random.Random(split)
    rows: list[dict[str, Any]] = []
    for number in range(count):
        colour, shape = draw.choice([*COLOURS]), draw.choice(SHAPES)
        name = f"img/{split}-{number}.png"
        picture(colour, shape, draw).save(folder / name)
        question = {"task": "understand", "prompt": "which colour is it", "image": name}
        rows.append({**question, "answer": COLOURS[colour], "kind": "colour"})
        request = {"task": "generate", "prompt": f"draw a {colour} {shape}", "target": name}
        rows.append({**request, "kind": shape, "wanted": colour})  # `wanted` is a column of ours
    return rows


def main(folder: Path) -> None:
    """Write train.jsonl and held_out.jsonl, and the pictures that they name."""
    (folder / "img").mkdir(parents=True, exist_ok=True)
    for split, count in (("train", 48), ("held_out", 24)):
        text = "".join(json.dumps(row) + "\n" for row in lines(folder, split, count))
        (folder / f"{split}.jsonl").write_text(text)


if __name__ == "__main__":
    main(Path(*sys.argv[1:]))
