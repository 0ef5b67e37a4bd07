"""A user's own data: one JSON object per line, pictures as files beside it."""

from __future__ import annotations

import difflib
import json
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, overload

import numpy as np
from numpy.typing import NDArray

from lvrpo.data.example import SKILLS, Example, Identity, Picture, Rule, Video
from lvrpo.data.marks import check_marks

if TYPE_CHECKING:
    from PIL.Image import Image

#: (what a line says, [C, H, W] of the drawings) to the rule that it means.
RuleParser: TypeAlias = Callable[[Mapping[str, Any], tuple[int, int, int]], Rule]

#: What the fields of a line hold, in words and as a check; answers have a parser of their own.
_FIELDS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "task": ("a string", lambda value: isinstance(value, str)),
    "prompt": ("a string", lambda value: isinstance(value, str)),
    "image": ("a string", lambda value: isinstance(value, str)),
    "images": ("a list of files", lambda value: _is_names(value)),
    "videos": (
        "a list of videos, each a list of the files of its frames",
        lambda value: isinstance(value, list) and bool(value) and all(map(_is_names, value)),
    ),
    "fps": (
        "the frames a second of its videos, a number above 0",
        lambda value: type(value) in (int, float) and 0 < value < math.inf,
    ),
    "answer": ("", lambda value: True),
    "rule": ("an object", lambda value: isinstance(value, dict)),
    "target": ("a string", lambda value: isinstance(value, str)),
    "id": ("a string", lambda value: isinstance(value, str)),
    "kind": ("a string", lambda value: isinstance(value, str)),
}
_NEEDED = {"understand": ("answer",), "generate": ()}
_REFUSED = {
    "understand": ("rule", "target"),
    "generate": ("videos", "fps", "answer"),
}
#: Frames a second of a video that says nothing else: what readers of videos sample them at.
FPS = 2.0
_MODES = {1: "L", 3: "RGB"}
#: Pixels that one file keeps in memory; pictures beyond it are decoded whenever they are taken.
KEPT_BYTES = 512 << 20
#: What Pillow multiplies a gray PNG pixel of few bits by, and its transparent level not.
_GRAY_STEPS = {"L;2": 85, "L;4": 17}


class DataError(ValueError):
    """Something is wrong with a data file; one line that names the file, line and field."""


class JsonlExamples(Sequence[Example]):
    """The examples of one file.

    Fields of a line: "task" ("understand" or "generate") and "prompt" always; "answer" to
    understand, a string, an integer, or a list of several that are right; "image" or "images"
    optional, "videos" and their "fps" to understand; "rule" and "target" optional to generate; "id"
    and "kind" optional. Any other is the user's own and becomes an entry of `Example.extra`. Paths
    are relative to the file. docs/data.md has examples.

    Every line and every picture is checked here, before anything is trained: a picture file is
    decoded once, however many lines name it, and kept as C * H * W bytes.

    Args:
        path: of the file, UTF-8.
        picture_shape: [C, H, W] of the model; pictures are converted and resized to it. H = W = 0:
            they keep their own size.
        parse_rule: makes the rule of a line from its "rule", for drawings of `picture_shape`; a
            ValueError of its is told with the line. Without it a file may have no rules.
        kept_bytes: most bytes of pixels to keep; pictures beyond it are decoded again when taken.

    Attributes:
        rows: the fields of every line, checked, without pixels. "uid" is the id, "extra" has the
            fields of the user's own.
        identities: of every example, what may not be in another split, see `Example.identity`.

    Raises:
        DataError: anything that is wrong with the file.
    """

    def __init__(
        self,
        path: str | Path,
        picture_shape: tuple[int, int, int],
        *,
        parse_rule: RuleParser | None = None,
        kept_bytes: int = KEPT_BYTES,
    ) -> None:
        if picture_shape[0] not in _MODES:
            raise ValueError(f"JsonlExamples: {picture_shape[0]} channels, expected 1 or 3")
        self.path = Path(path)
        self.picture_shape = picture_shape
        self.rows: list[Mapping[str, Any]] = []
        self.identities: list[Identity | None] = []
        self._parse_rule = parse_rule
        self._kept: dict[str, NDArray[np.uint8]] = {}
        self._room = kept_bytes
        seen: dict[str, int] = {}
        for number, text in enumerate(self._lines(), start=1):
            if not text.strip():
                continue
            row = self._parse(text, number)
            first = seen.setdefault(row["uid"], number)
            if first != number:
                raise self._error(number, "id", f"{row['uid']!r} is already used on line {first}")
            self.rows.append(row)
            self.identities.append(self._example(row).identity)
        if not self.rows:
            raise DataError(f"{self.path}: holds no examples")

    def __len__(self) -> int:
        return len(self.rows)

    @overload
    def __getitem__(self, index: int) -> Example: ...

    @overload
    def __getitem__(self, index: slice) -> list[Example]: ...

    def __getitem__(self, index: int | slice) -> Example | list[Example]:
        if isinstance(index, slice):
            return [self._example(row) for row in self.rows[index]]
        return self._example(self.rows[index])

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
            values = json.loads(text, object_pairs_hook=_named_once, parse_constant=_no_number)
            if "\\u" in text:  # half of a pair of them is in no text that can be written again
                json.dumps(values, ensure_ascii=False).encode()
        except (ValueError, RecursionError) as error:
            raise DataError(f"{self.path}:{line}: not JSON: {_one_line(error)}") from error
        if not isinstance(values, dict):
            raise DataError(f"{self.path}:{line}: expected a JSON object in braces")
        extra = {name: values.pop(name) for name in list(values) if name not in _FIELDS}
        for name in extra:
            # A column of the user's own is welcome; a slip of the pen would be one in silence.
            for meant in difflib.get_close_matches(name.lower(), _FIELDS, n=1, cutoff=0.8):
                raise self._error(line, name, f"is unknown, {meant!r} was probably meant")
        # null is the same as leaving a field out.
        values = {name: value for name, value in values.items() if value is not None}
        if "task" not in values and "include" in extra:  # GenEval's prompts as they are published
            values = {"task": "generate", "kind": str(extra.get("tag", ""))} | values
        for name in ("task", "prompt"):
            if name not in values:
                raise self._error(line, name, "is missing")
        for name, value in values.items():
            expected, is_one = _FIELDS[name]
            if not is_one(value):
                raise self._error(line, name, f"is {value!r}, expected {expected}")
        if not values["prompt"].strip():
            raise self._error(
                line, "prompt", f"is {values['prompt']!r}, expected at least one word"
            )
        if "answer" in values:
            values |= self._answers(values["answer"], line)
        task = values["task"]
        if task not in SKILLS:
            raise self._error(line, "task", f"is {task!r}, expected one of {', '.join(SKILLS)}")
        for name in _NEEDED[task]:
            if name not in values:
                raise self._error(line, name, f"is missing, task {task!r} needs it")
        for name in _REFUSED[task]:
            if name in values:
                raise self._error(line, name, f"does not belong to task {task!r}")
        values |= self._shown(values, line)
        if "rule" in values:
            values["rule"] = self._rule(values["rule"], line)
        values["uid"] = values.pop("id", f"{self.path.stem}:{line}")
        others = ("images", "fps")  # are in what `_shown` made of them
        kept = {name: value for name, value in values.items() if name not in others}
        return kept | {"line": line, "extra": extra}

    def _shown(self, values: Mapping[str, Any], line: int) -> dict[str, Any]:
        """Files of the pictures and videos of a prompt, as the fields of an example."""
        if "image" in values and "images" in values:
            raise self._error(line, "images", "stands beside 'image', expected one of them")
        if "fps" in values and "videos" not in values:
            raise self._error(line, "fps", "is of videos, of which the line has none")
        images = values.get("images") or [values[name] for name in ("image",) if name in values]
        videos = values.get("videos", [])
        if images or videos:
            try:
                check_marks(values["prompt"], images=len(images), videos=len(videos))
            except ValueError as error:
                raise self._error(line, "prompt", f"has {error}") from error
        found: dict[str, Any] = {}
        if images:
            found |= {"image": images[0], "further_images": tuple(images[1:])}
        if videos:
            found["videos"] = tuple((files, values.get("fps", FPS)) for files in videos)
        return found

    def _answers(self, given: Any, line: int) -> dict[str, Any]:
        """The one right answer, or the first of several and the others."""
        several = given if isinstance(given, list) else [given]
        answers = []
        for value in several:
            # 3 is as good as "3"; true and 1e3 are written in more than one way.
            if isinstance(value, int) and not isinstance(value, bool):
                value = str(value)
            if not isinstance(value, str):
                raise self._error(
                    line,
                    "answer",
                    f"is {given!r}, expected a string, an integer, or a list of them",
                )
            if not value.strip():
                raise self._error(line, "answer", f"is {given!r}, expected at least one word")
            answers.append(value)
        if not answers:
            raise self._error(line, "answer", "is [], expected at least one answer")
        return {"answer": answers[0], "other_answers": tuple(answers[1:])}

    def _rule(self, data: dict[str, Any], line: int) -> Rule:
        if self._parse_rule is None:
            raise self._error(line, "rule", "cannot be read: JsonlExamples got no parse_rule")
        try:
            return self._parse_rule(data, self.picture_shape)
        except ValueError as error:
            raise self._error(line, "rule", str(error)) from error

    def _example(self, row: Mapping[str, Any]) -> Example:
        values = {name: value for name, value in row.items() if name != "line"}
        line = row["line"]

        def picture(file: str, field: str) -> Picture:
            return as_floats(self._pixels(file, line, field))

        for name in ("image", "target"):
            if name in values:
                values[name] = picture(values[name], name)
        if values.get("further_images"):
            files = values["further_images"]
            values["further_images"] = tuple(picture(file, "images") for file in files)
        if "videos" in values:
            values["videos"] = tuple(
                self._video([picture(file, "videos") for file in files], fps, line)
                for files, fps in values["videos"]
            )
        return Example(**values)

    def _video(self, frames: Sequence[Picture], fps: float, line: int) -> Video:
        sizes = list(dict.fromkeys(frame.shape[1:] for frame in frames))
        if len(sizes) > 1:
            told = " and ".join(f"{height} x {width}" for height, width in sizes[:2])
            raise self._error(line, "videos", f"has frames of {told} pixels, expected one size")
        return Video(np.stack(frames), fps)

    def _pixels(self, name: str, line: int, field: str) -> NDArray[np.uint8]:
        if name in self._kept:
            return self._kept[name]
        path = self.path.parent / name
        try:
            there = path.is_file()
        except OSError as error:  # a name that is too long, a folder that may not be entered
            raise self._error(line, field, f"cannot read {path}: {error.strerror}") from error
        if not there:
            raise self._error(line, field, f"there is no file {path}")
        try:
            pixels = load_pixels(path, self.picture_shape)
        except Exception as error:  # Pillow raises a different class for every broken format
            raise self._error(line, field, f"cannot read {path}: {_one_line(error)}") from error
        # Draws go round and round: whatever would be thrown out to make room is needed as soon.
        if pixels.nbytes <= self._room:
            self._room -= pixels.nbytes
            self._kept[name] = pixels
        return pixels

    def _error(self, line: int, field: str, message: str) -> DataError:
        return DataError(f"{self.path}:{line}: field {field!r} {message}")


def picture_files(values: Mapping[str, Any]) -> set[str]:
    """The files that a line of a checked file names."""
    names = {values[field] for field in ("image", "target") if values.get(field)}
    names |= set(values.get("images") or ())
    return names | {file for files in values.get("videos") or () for file in files}


def _named_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The fields of a JSON object, of which `json` would keep the last of those with one name."""
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(name for name, count in Counter(n for n, _ in pairs).items() if count > 1)
        raise ValueError(f"{twice!r} stands there more than once, expected one of each name")
    return found


def _no_number(word: str) -> Any:
    """What `json` takes for a number and no other reader of JSON does."""
    raise ValueError(f"{word}, expected a number, or null where there is none")


def _is_names(value: Any) -> bool:
    """Whether it is a list of file names."""
    return isinstance(value, list) and bool(value) and all(isinstance(v, str) for v in value)


def load_picture(path: str | Path, shape: tuple[int, int, int]) -> Picture:
    """A picture file as [C, H, W] fp32 in [0, 1]; see `load_pixels`."""
    return as_floats(load_pixels(path, shape))


def load_pixels(path: str | Path, shape: tuple[int, int, int]) -> NDArray[np.uint8]:
    """A picture file as [C, H, W] uint8, upright, transparent parts on white.

    Args:
        path: any format Pillow reads, 8 bits per channel.
        shape: [C, H, W] with C = 1 (gray) or 3 (RGB); the picture is resized to H x W, unless
            they are 0.

    Raises:
        ValueError: the channels have more than 8 bits, or there are several frames; and whatever
            Pillow raises for a file that it cannot read.
    """
    from PIL import Image, ImageOps

    channels, height, width = shape
    with Image.open(path) as file:
        if file.mode[0] in "IF":
            raise ValueError(f"pixels of mode {file.mode}, expected 8 bits per channel")
        # The first of a camera's MPO is the photo, that of a PSD the whole of its layers.
        frames = 1 if file.format in ("MPO", "PSD") else getattr(file, "n_frames", 1)
        if frames > 1:
            raise ValueError(f"{frames} frames, expected one: save those to be read as files")
        _mend_transparent_colour(file)
        picture = ImageOps.exif_transpose(file)
        if picture.has_transparency_data:
            # What lies under a transparent pixel is whatever the drawing program left there.
            white = Image.new("RGBA", picture.size, "white")
            picture = Image.alpha_composite(white, picture.convert("RGBA"))
        picture = picture.convert(_MODES[channels])
    if (height, width) != (0, 0) and picture.size != (width, height):
        picture = picture.resize((width, height), Image.Resampling.LANCZOS)
    pixels = np.asarray(picture, dtype=np.uint8).reshape(*picture.size[::-1], channels)
    return np.ascontiguousarray(pixels.transpose(2, 0, 1))


def as_floats(pixels: NDArray[np.uint8]) -> Picture:
    """8 bits a channel as fp32 in [0, 1]."""
    return pixels.astype(np.float32) / np.float32(255)


def _mend_transparent_colour(file: Image) -> None:
    """Bring the one transparent colour of a PNG to the 8 bits that Pillow brings its pixels to."""
    transparent = file.info.get("transparency")
    if file.format != "PNG" or transparent is None:
        return
    stored = getattr(file, "tile")[0].args  # noqa: B009
    if stored == "RGB;16B":
        raise ValueError("16 bits per channel and a transparent colour, expected 8 bits")
    file.info["transparency"] = transparent * _GRAY_STEPS.get(stored, 1)


def _one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"
