"""A user's own data: one JSON object per line, pictures as files beside it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, overload

import numpy as np

from lvrpo.data.example import TASKS, Example, LayoutRule, Picture, Rule, rule_from_json

_FIELDS = ("task", "prompt", "image", "answer", "rule", "target", "id", "kind")
_NEEDED = {"understand": ("image", "answer"), "generate": ()}
_REFUSED = {"understand": ("rule", "target"), "generate": ("image", "answer")}
_MODES = {1: "L", 3: "RGB"}


class DataError(ValueError):
    """Something is wrong with a data file; one line that names the file, line and field."""


class JsonlExamples(Sequence[Example]):
    """The examples of one file; pictures are read again whenever an example is taken.

    Fields of a line: "task" ("understand" or "generate") and "prompt" always; "image" and "answer"
    to understand; "rule" and "target" optional to generate; "id" and "kind" optional. Paths are
    relative to the file. docs/data.md has examples.

    Every line and every picture is checked here, before anything is trained.

    Args:
        path: of the file, UTF-8.
        picture_shape: [C, H, W] of the model; pictures are converted and resized to it.

    Raises:
        DataError: anything that is wrong with the file.
    """

    def __init__(self, path: str | Path, picture_shape: tuple[int, int, int]) -> None:
        if picture_shape[0] not in _MODES:
            raise ValueError(f"JsonlExamples: {picture_shape[0]} channels, expected 1 or 3")
        self.path = Path(path)
        self.picture_shape = picture_shape
        self._rows: list[dict[str, Any]] = []
        seen: dict[str, int] = {}
        for number, text in enumerate(self._lines(), start=1):
            if not text.strip():
                continue
            row = self._parse(text, number)
            first = seen.setdefault(row["uid"], number)
            if first != number:
                raise self._error(number, "id", f"{row['uid']!r} is already used on line {first}")
            self._rows.append(row)
            self._example(row)
        if not self._rows:
            raise DataError(f"{self.path}: holds no examples")

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, index: int) -> Example: ...

    @overload
    def __getitem__(self, index: slice) -> list[Example]: ...

    def __getitem__(self, index: int | slice) -> Example | list[Example]:
        if isinstance(index, slice):
            return [self._example(row) for row in self._rows[index]]
        return self._example(self._rows[index])

    def _lines(self) -> list[str]:
        try:
            raw = self.path.read_bytes()
        except OSError as error:
            raise DataError(f"{self.path}: {error.strerror or error}") from error
        lines = []
        for number, line in enumerate(raw.split(b"\n"), start=1):
            try:
                lines.append(line.decode("utf-8-sig" if number == 1 else "utf-8"))
            except UnicodeDecodeError as error:
                raise DataError(f"{self.path}:{number}: not UTF-8 at byte {error.start}") from error
        return lines

    def _parse(self, text: str, line: int) -> dict[str, Any]:
        try:
            values = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{self.path}:{line}: not JSON: {_one_line(error)}") from error
        if not isinstance(values, dict):
            raise DataError(f"{self.path}:{line}: expected a JSON object in braces")
        for name in values:
            if name not in _FIELDS:
                known = ", ".join(_FIELDS)
                raise self._error(line, name, f"is unknown, expected one of {known}")
        # null is the same as leaving a field out.
        values = {name: value for name, value in values.items() if value is not None}
        for name in ("task", "prompt"):
            if name not in values:
                raise self._error(line, name, "is missing")
        for name, value in values.items():
            wanted = dict if name == "rule" else str
            if not isinstance(value, wanted):
                expected = "an object" if wanted is dict else "a string"
                raise self._error(line, name, f"is {value!r}, expected {expected}")
        task = values["task"]
        if task not in TASKS:
            raise self._error(line, "task", f"is {task!r}, expected one of {', '.join(TASKS)}")
        for name in _NEEDED[task]:
            if name not in values:
                raise self._error(line, name, f"is missing, task {task!r} needs it")
        for name in _REFUSED[task]:
            if name in values:
                raise self._error(line, name, f"does not belong to task {task!r}")
        if "rule" in values:
            values["rule"] = self._rule(values["rule"], line)
        values["uid"] = values.pop("id", f"{self.path.stem}:{line}")
        values["line"] = line
        return values

    def _rule(self, data: dict[str, Any], line: int) -> Rule:
        try:
            rule = rule_from_json(data)
        except ValueError as error:
            raise self._error(line, "rule", str(error)) from error
        height, width = self.picture_shape[1:]
        if isinstance(rule, LayoutRule) and (rule.rows * 8, rule.cols * 8) != (height, width):
            needed = f"is for {rule.rows} x {rule.cols} cells of 8 pixels"
            raise self._error(line, "rule", f"{needed}, the model draws {height} x {width}")
        return rule

    def _example(self, row: dict[str, Any]) -> Example:
        values = {name: value for name, value in row.items() if name != "line"}
        for name in ("image", "target"):
            if name in values:
                values[name] = self._picture(values[name], row["line"], name)
        return Example(**values)

    def _picture(self, name: str, line: int, field: str) -> Picture:
        path = self.path.parent / name
        if not path.is_file():
            raise self._error(line, field, f"there is no file {path}")
        try:
            return load_picture(path, self.picture_shape)
        except Exception as error:  # Pillow raises a different class for every broken format
            raise self._error(line, field, f"cannot read {path}: {_one_line(error)}") from error

    def _error(self, line: int, field: str, message: str) -> DataError:
        return DataError(f"{self.path}:{line}: field {field!r} {message}")


def load_picture(path: str | Path, shape: tuple[int, int, int]) -> Picture:
    """A picture file as [C, H, W] fp32 in [0, 1].

    Args:
        path: any format Pillow reads, 8 bits per channel.
        shape: [C, H, W] with C = 1 (gray) or 3 (RGB); the picture is resized to H x W.
    """
    from PIL import Image, ImageOps

    channels, height, width = shape
    with Image.open(path) as file:
        if file.mode[0] in "IF":
            raise ValueError(f"pixels of mode {file.mode}, expected 8 bits per channel")
        picture = ImageOps.exif_transpose(file).convert(_MODES[channels])
    if picture.size != (width, height):
        picture = picture.resize((width, height), Image.Resampling.LANCZOS)
    pixels = np.asarray(picture, dtype=np.float32).reshape(height, width, channels) / 255
    return np.ascontiguousarray(pixels.transpose(2, 0, 1), dtype=np.float32)


def _one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"
