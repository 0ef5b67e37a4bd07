"""Where a run's numbers and samples are shown while it goes on, besides its own files.

`run.tracker` names one of `TRACKERS`. Only that one's package is imported.
"""

from __future__ import annotations

import json
import secrets
import shutil
from collections.abc import Callable, Collection, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, Protocol, cast, get_args

import numpy as np

from lvrpo.info import require
from lvrpo.runs.files import write_atomically
from lvrpo.runs.gallery import pixels_of
from lvrpo.trainer.config import TrackerName
from lvrpo.trainer.journal import GalleryItem

TENSORBOARD = "tensorboard"
#: Holds the name by which a service knows the run.
TRACKER = "tracker.json"
PROJECT = "lvrpo"


class Tracker(Protocol):
    """What shows a run."""

    def scalars(self, phase: str, step: int, values: Mapping[str, float]) -> None:
        """Numbers of a step, by name."""

    def samples(self, phase: str, step: int, title: str, items: Sequence[GalleryItem]) -> None:
        """Texts and pictures of a step."""

    def close(self) -> None:
        """Nothing more will come."""


class TensorBoard:
    """Event files in `tensorboard/`, one run per phase.

    Args:
        run_dir: of the run.
        purge: by phase the first step of which nothing earlier counts, after a resume.
        dropped: phases that a resume begins again.
    """

    def __init__(
        self, run_dir: Path, purge: Mapping[str, int] | None = None, dropped: Collection[str] = ()
    ) -> None:
        self._folder, self._purge = run_dir / TENSORBOARD, purge or {}
        self._writers: dict[str, Any] = {}
        for phase in dropped:
            shutil.rmtree(self._folder / phase, ignore_errors=True)

    def scalars(self, phase: str, step: int, values: Mapping[str, float]) -> None:
        """See `Tracker`."""
        for key, value in values.items():
            self._writer(phase).add_scalar(key, value, step)

    def samples(self, phase: str, step: int, title: str, items: Sequence[GalleryItem]) -> None:
        """A table of each task, and the pictures of each of its prompts."""
        writer = self._writer(phase)
        for task, its in _by_task(items).items():
            writer.add_text(f"{title}/{task}", markdown(its), step)
            for number, alike in enumerate(_by_prompt(its)):
                tag = f"{title}/{task}/{number}"
                for place, pixels in enumerate(_pictures(alike)):
                    writer.add_image(f"{tag}/{place}", pixels, step, dataformats="HWC")

    def close(self) -> None:
        """See `Tracker`."""
        for writer in self._writers.values():
            writer.close()
        self._writers.clear()

    def _writer(self, phase: str) -> Any:
        if phase not in self._writers:
            from torch.utils.tensorboard import SummaryWriter  # slow import, needed only here

            self._writers[phase] = SummaryWriter(
                str(self._folder / phase), purge_step=self._purge.get(phase)
            )
        return self._writers[phase]


class Service:
    """Weights & Biases, or trackio, whose interface is that of it.

    Args:
        module: `wandb` or `trackio`.
        run: what its `init` returned.
    """

    def __init__(self, module: Any, run: Any) -> None:
        self._module, self._run = module, run

    def scalars(self, phase: str, step: int, values: Mapping[str, float]) -> None:
        """See `Tracker`; steps are counted through both phases, so their numbers go on."""
        self._run.log(dict(values), step=step)

    def samples(self, phase: str, step: int, title: str, items: Sequence[GalleryItem]) -> None:
        """A table of each task, and its pictures."""
        for task, its in _by_task(items).items():
            columns, rows = table(its)
            found: dict[str, Any] = {
                f"{title}/{task}": self._module.Table(columns=columns, data=rows)
            }
            pictures = [
                self._module.Image(pixels, caption=alike[0].prompt)
                for alike in _by_prompt(its)
                for pixels in _pictures(alike)
            ]
            # One by one: a list of pictures is none to trackio.
            found |= {f"{title}/{task}/{n}": picture for n, picture in enumerate(pictures)}
            self._run.log(found, step=step)

    def close(self) -> None:
        """See `Tracker`."""
        self._run.finish()


def _wandb(run_dir: Path, key: str, config: Mapping[str, Any]) -> Tracker:
    import wandb

    run = wandb.init(
        project=PROJECT,
        name=run_dir.resolve().name,
        id=key,
        resume="allow",
        dir=str(run_dir),
        config=dict(config),
    )
    return Service(wandb, run)


def _trackio(run_dir: Path, key: str, config: Mapping[str, Any]) -> Tracker:
    import trackio

    name = f"{run_dir.resolve().name}-{key}"  # by which a run is resumed
    run = trackio.init(project=PROJECT, name=name, resume="allow", config=dict(config))
    return Service(trackio, run)


SERVICES: dict[str, Callable[[Path, str, Mapping[str, Any]], Tracker]] = {
    "wandb": _wandb,
    "trackio": _trackio,
}
TRACKERS: tuple[TrackerName, ...] = get_args(TrackerName)


def check_tracker(name: TrackerName) -> None:
    """See that the package of a tracker is there.

    Raises:
        ModuleNotFoundError: it is not; says what to install.
    """
    require(name, extra="train" if name == TENSORBOARD else name)


def open_tracker(
    name: TrackerName,
    run_dir: Path,
    config: Mapping[str, Any],
    *,
    purge: Mapping[str, int] | None = None,
    dropped: Collection[str] = (),
) -> Tracker:
    """The tracker of a run that begins or goes on.

    Args:
        name: of `TRACKERS`.
        run_dir: of the run.
        config: of it, to be shown beside its numbers.
        purge: see `TensorBoard`. A service keeps what it has been told: a run that goes on from an
            earlier step repeats some steps, which it may refuse.
        dropped: see `TensorBoard`.

    Raises:
        ModuleNotFoundError: see `check_tracker`.
    """
    check_tracker(name)
    if name == TENSORBOARD:
        return TensorBoard(run_dir, purge, dropped)
    return SERVICES[name](run_dir, _key_of(run_dir), config)


def markdown(items: Sequence[GalleryItem]) -> str:
    """A table of samples."""
    columns, rows = table(items)
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(map(_cell, line)) + " |" for line in lines)


def table(items: Sequence[GalleryItem]) -> tuple[list[str], list[list[Any]]]:
    """Columns and rows of samples of one task, in words and numbers."""
    labels = list(dict.fromkeys(label for item in items for label in item.scores))
    columns = ["prompt", "answer", "expected", "right", *labels]
    rows = [
        [item.prompt, item.answer, item.expected, item.right, *map(item.scores.get, labels)]
        for item in items
    ]
    # What no sample has is left out.
    kept = [n for n in range(len(columns)) if n == 0 or any(row[n] is not None for row in rows)]
    return [columns[n] for n in kept], [[row[n] for n in kept] for row in rows]


def _cell(value: Any) -> str:
    if value is None:
        return ""
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return " ".join(text.replace("|", "\\|").split())


def _by_task(items: Sequence[GalleryItem]) -> dict[str, list[GalleryItem]]:
    found: dict[str, list[GalleryItem]] = {}
    for item in items:
        found.setdefault(item.task, []).append(item)
    return found


def _by_prompt(items: Sequence[GalleryItem]) -> list[list[GalleryItem]]:
    return [list(alike) for _, alike in groupby(items, lambda item: item.uid)]


def _pictures(alike: Sequence[GalleryItem]) -> list[np.ndarray]:
    """[H, W, 3] uint8: of a question its picture, else the one to be edited and the drawings."""
    first = alike[0]
    shown = [first.image] if first.task == "understand" else [item.image for item in alike]
    found = [pixels_of(image) for image in (first.source, *shown) if image is not None]
    return [np.asarray(picture.convert("RGB")) for picture in found]


def _key_of(run_dir: Path) -> str:
    """By which a service tells the run from others; drawn once, and kept."""
    path = run_dir / TRACKER
    if not path.exists():
        write_atomically(path, json.dumps({"key": secrets.token_hex(4)}).encode())
    return cast(str, json.loads(path.read_bytes())["key"])
