"""What the logs of a run say: its scores before and after, its alarms, its gallery in pairs."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from lvrpo.intervals import Change, Mean, compare_means, compare_rates
from lvrpo.runs.environment import read_environment
from lvrpo.runs.gallery import load_gallery
from lvrpo.runs.log import EVALS, METRICS, Row, read_evals, read_metrics
from lvrpo.runs.scores import Score, eval_rewards, eval_scores
from lvrpo.trainer.journal import GalleryItem

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

CONFIG = "config.toml"
BEFORE, AFTER = "warm start", "after"  # the labels the trainer gives its first and last evaluation
MEASURES = {
    "correct": "right answers",
    "strict": "whole request right",
    "gold": "right for the gold judge",
    "partial": "share of the request that is right",
}
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


def task_name(task: str) -> str:
    """The heading of a task: its name, or what a row says that names none."""
    return task[:1].upper() + task[1:] or "All tasks"


def in_phase(rows: Sequence[Row], phase: str) -> list[Row]:
    """The rows of one phase; a row that names none is of GRPO."""
    return [row for row in rows if row.get("phase", "grpo") == phase]


def verdict_of(change: Change) -> tuple[str, str]:
    """(style, words): what the intervals allow one to say."""
    if math.isnan(change.interval.low):
        return "unclear", "too few prompts to say"
    if not change.excludes_zero:
        return "unclear", "no clear change: the interval includes zero"
    style, word = ("better", "Better") if change.difference > 0 else ("worse", "Worse")
    if change.apart:
        return style, f"{word}: the intervals before and after are apart"
    return style, f"{word}, though the intervals before and after overlap"


@dataclass(frozen=True)
class Comparison:
    """One score before and after."""

    before: Score
    after: Score
    change: Change

    @property
    def title(self) -> str:
        """Its row label."""
        measure = MEASURES.get(self.after.measure, self.after.measure)
        return f"{self.after.kind}: {measure}" if self.after.kind else measure

    @property
    def verdict(self) -> tuple[str, str]:
        """(style, words), see `verdict_of`."""
        return verdict_of(self.change)


@dataclass(frozen=True)
class RewardComparison:
    """The held-out mean of one reward before and after."""

    task: str
    name: str
    before: Mean
    after: Mean

    @property
    def title(self) -> str:
        """Its row label: a reward of the user's own may be named by a path."""
        return self.name.rpartition("/")[2]

    @property
    def change(self) -> Change:
        """after - before."""
        return compare_means(self.before, self.after)

    @property
    def verdict(self) -> tuple[str, str]:
        """(style, words), see `verdict_of`."""
        return verdict_of(self.change)


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
    )
    if not run.environment:
        notes.append("Versions and commit were not recorded (no environment.json).")
    return run


def compare_scores(before: Row | None, after: Row | None) -> list[Comparison]:
    """Every rate both evaluations have, by task, each task's headline first, then by kind."""
    if before is None or after is None:
        return []
    old = {score.name: score for score in eval_scores(before) if score.total}
    found = [
        Comparison(
            old[new.name],
            new,
            compare_rates(
                (old[new.name].successes, old[new.name].total), (new.successes, new.total)
            ),
        )
        for new in eval_scores(after)
        if new.name in old and new.total
    ]
    tasks = [each.after.task for each in found]
    return sorted(
        found,
        key=lambda each: (
            tasks.index(each.after.task),
            bool(each.after.kind),
            each.after.kind,
            _rank(each.after.measure, list(MEASURES)),
        ),
    )


def compare_rewards(before: Row | None, after: Row | None) -> list[RewardComparison]:
    """Every reward both evaluations have a mean of, by task."""
    if before is None or after is None:
        return []
    old, new = eval_rewards(before), eval_rewards(after)
    found = [RewardComparison(*key, old[key], new[key]) for key in new if key in old]
    tasks = [each.task for each in found]
    return sorted(found, key=lambda each: tasks.index(each.task))


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


def _rank(name: str, order: list[str]) -> int:
    return order.index(name) if name in order else len(order)


def _optional(what: str, notes: list[str], read: Callable[[], T]) -> T | None:
    """What `read` returns; None, and a note, when that part is absent or damaged."""
    try:
        return read()
    except FileNotFoundError as error:
        notes.append(f"The {what} is missing ({error.filename}).")
    except (OSError, ValueError, KeyError, TypeError) as error:
        notes.append(f"The {what} could not be read: {error}")
    return None


def _find(config: dict[str, Any], name: str) -> Any:
    """The value of `name` at any depth of a config, None if absent."""
    if name in config:
        return config[name]
    tables = [value for value in config.values() if isinstance(value, dict)]
    return next((v for v in (_find(table, name) for table in tables) if v is not None), None)
