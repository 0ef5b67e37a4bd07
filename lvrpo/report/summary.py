"""What a report reads of a run: its logs, its measurements, its alarms, its gallery in pairs."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from lvrpo.data.example import Skill
from lvrpo.runs.environment import read_environment
from lvrpo.runs.gallery import load_gallery, load_samples
from lvrpo.runs.log import EVALS, METRICS, Row, read_evals, read_measurements, read_metrics
from lvrpo.trainer.journal import GalleryItem
from lvrpo.trainer.measurement import Measurement

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

CONFIG = "config.toml"
BEFORE, AFTER = "warm start", "after"  # the labels the trainer gives its first and last evaluation
# A mean over nothing, as the reward of a task that a step did not sample, is no accident.
MAY_BE_NAN = ("reward/", "share/", "strict/", "partial/", "gold/", "time/")

T = TypeVar("T")


@dataclass(frozen=True)
class Run:
    """Everything a report reads of one run; `notes` says what is missing."""

    path: Path
    metrics: list[Row]
    evals: list[Row]
    config: dict[str, Any]
    config_text: str
    environment: dict[str, Any]
    gallery: dict[str, list[GalleryItem]]
    notes: list[str]
    measurements: list[Measurement] = field(default_factory=list)
    samples: dict[int, list[GalleryItem]] = field(default_factory=dict)  # of training, by step

    @property
    def name(self) -> str:
        """The directory's own name."""
        return self.path.resolve().name

    @property
    def seed(self) -> Any:
        """The seed by the environment or the config, None when neither says."""
        return self.environment.get("seed", _find(self.config, "seed"))

    @property
    def shuffled(self) -> bool:
        """Whether this is the control run with shuffled rewards."""
        return bool(_find(self.config, "shuffle_rewards"))

    @property
    def supervised(self) -> bool:
        """Whether the policy phase went on with the supervised steps of the warm start."""
        return bool(_table(self.config, "run").get("objective") == "supervised")

    @property
    def signal(self) -> str:
        """What was learned from after the warm start, in words."""
        if self.supervised:
            return "labels (supervised continuation)"
        return "shuffled rewards (control)" if self.shuffled else "rewards"

    @property
    def seconds(self) -> float:
        """What all steps took together, 0 when they were not timed."""
        return float(sum(row.get("time/total", 0.0) for row in self.metrics))

    def before_after(self) -> tuple[Row | None, Row | None]:
        """The evaluations to compare: by label, else the first and the last."""
        if not self.evals:
            return None, None
        labelled = {row.get("label"): row for row in self.evals}
        before = labelled.get(BEFORE, self.evals[0])
        after = labelled.get(AFTER, self.evals[-1])
        return before, None if after is before else after

    def measured(self, label: str, skill: Skill, sampling: str) -> list[Measurement]:
        """Measurements of one sampling: first of the most prompts, last of the most samples."""
        found = [
            each
            for each in self.measurements
            if (each.label, each.skill, each.sampling) == (label, skill, sampling)
        ]
        return sorted(found, key=lambda each: (each.group_size, -len(each.uids)))


def task_name(task: str) -> str:
    """The heading of a task: its name, or what a row says that names none."""
    return task[:1].upper() + task[1:] or "All tasks"


def in_phase(rows: Sequence[Row], phase: str) -> list[Row]:
    """The rows of one phase; a row that names none is of GRPO."""
    return [row for row in rows if row.get("phase", "grpo") == phase]


@dataclass(frozen=True)
class Pair:
    """A gallery entry of the same prompt and seed before and after; either may be missing."""

    before: GalleryItem | None
    after: GalleryItem | None

    @property
    def item(self) -> GalleryItem:
        """Whichever is there, for what both share."""
        found = self.after or self.before
        assert found is not None
        return found


@dataclass
class Alarm:
    """A message and the steps it was raised at."""

    message: str
    steps: list[int] = field(default_factory=list)


def load_run(run_dir: str | Path) -> Run:
    """Read a run directory; see `write_report` for what it raises."""
    path = Path(run_dir)
    if not path.is_dir():
        raise ValueError(f"{path} is not a directory: give the run directory `lvrpo train` made")
    if not any((path / name).exists() for name in (METRICS, EVALS, CONFIG)):
        raise ValueError(
            f"{path} is not a run directory (it has neither {METRICS} nor {CONFIG}): give the one "
            "`lvrpo train` made"
        )
    metrics, evals = read_metrics(path), read_evals(path)
    if not metrics and not evals:
        raise ValueError(f"{path} has no rows yet: report again after the run's first step")
    notes: list[str] = []
    config_text = _optional("config", notes, lambda: (path / CONFIG).read_text()) or ""
    run = Run(
        path=path,
        metrics=metrics,
        evals=evals,
        config=_optional("config", notes, lambda: tomllib.loads(config_text)) or {},
        config_text=config_text,
        environment=_optional("environment", notes, lambda: read_environment(path)) or {},
        gallery=_optional("gallery", notes, lambda: load_gallery(path)) or {},
        notes=notes,
        measurements=read_measurements(path),
        samples=_optional("samples", notes, lambda: load_samples(path)) or {},
    )
    if not run.environment:
        notes.append("Versions and commit were not recorded (no environment.json).")
    return run


def collect_alarms(rows: Sequence[Row]) -> list[Alarm]:
    """The alarms the trainer logged, and values that are not numbers, each with its steps."""
    alarms: dict[str, Alarm] = {}
    for row in rows:
        messages = row.get("alarm", row.get("alarms", []))
        messages = [messages] if isinstance(messages, str) else messages
        bad = [
            f"{key} is not a finite number"
            for key, value in row.items()
            if isinstance(value, float) and math.isnan(value) and not key.startswith(MAY_BE_NAN)
        ]
        for message in [*(messages if isinstance(messages, list) else []), *bad]:
            alarms.setdefault(str(message), Alarm(str(message))).steps.append(row["step"])
    return list(alarms.values())


def pair_gallery(run: Run) -> dict[str, list[Pair]]:
    """{task: pairs of the same prompt and seed}, in the order they were saved."""
    labels: list[str | None] = [row.get("label") if row else None for row in run.before_after()]
    if not any(label in run.gallery for label in labels):
        saved = list(run.gallery)
        labels = [BEFORE, AFTER] if {BEFORE, AFTER} & set(saved) else [*saved, None, None][:2]
    sides = [
        {(item.task, item.uid, item.seed): item for item in run.gallery.get(label or "", [])}
        for label in labels
    ]
    pairs: dict[str, list[Pair]] = {}
    for key in dict.fromkeys([*sides[0], *sides[1]]):
        pairs.setdefault(key[0], []).append(Pair(sides[0].get(key), sides[1].get(key)))
    return pairs


def _optional(what: str, notes: list[str], read: Callable[[], T]) -> T | None:
    """What `read` returns; None, and a note, when that part is absent or damaged."""
    try:
        return read()
    except FileNotFoundError as error:
        notes.append(f"The {what} is missing ({error.filename}).")
    except (OSError, ValueError, KeyError, TypeError) as error:
        notes.append(f"The {what} could not be read: {error}")
    return None


def _table(config: dict[str, Any], name: str) -> dict[str, Any]:
    table = config.get(name)
    return table if isinstance(table, dict) else {}


def _find(config: dict[str, Any], name: str) -> Any:
    """The value of `name` at any depth of a config, None if absent."""
    if name in config:
        return config[name]
    tables = [value for value in config.values() if isinstance(value, dict)]
    return next((v for v in (_find(table, name) for table in tables) if v is not None), None)
