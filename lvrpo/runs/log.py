"""The logs of a run directory, and the only code that reads or writes them.

    metrics.jsonl      one flat JSON object per step; keys are joined by slashes
    evals.jsonl        one flat JSON object per evaluation on held-out data
    measurements.jsonl what these are made of, sample by sample: one per way of sampling
    changes.jsonl      one object per key that was changed, or input accepted, on the way

A run killed at any moment and resumed leaves the same `metrics.jsonl` as one that was not, up to
the keys under "time/": everything measured by a clock belongs there. Keys: docs/report.md.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from lvrpo.runs.files import Row as Row
from lvrpo.runs.files import append_row, flush_to_disk, keep_rows, read_rows
from lvrpo.runs.scores import eval_rewards, eval_scores
from lvrpo.runs.trackers import Tracker
from lvrpo.trainer.measurement import Measurement

#: A run has the first and one of the others, `run.objective`.
PHASES = ("warm_start", "grpo", "supervised")

METRICS = "metrics.jsonl"
EVALS = "evals.jsonl"
MEASUREMENTS = "measurements.jsonl"
CHANGES = "changes.jsonl"


class RunWriter:
    """Appends rows to the logs of one run; a context manager.

    Args:
        run_dir: made if absent.
        resume_from: the last step whose effect is in the weights the run goes on from. Later rows
            are cut off, and so is a last line that a kill left half-written; -1 keeps no row of
            `phase`. None: a new run.
        phase: the phase `resume_from` counts in. Rows of earlier phases stay, of later ones go, so
            steps may be counted through or anew in each phase.
        tracker: shows the same numbers.

    Raises:
        ValueError: a new run in a directory that has a log, or a log that is damaged in the middle.
    """

    def __init__(
        self,
        run_dir: str | Path,
        *,
        resume_from: int | None = None,
        phase: str = "grpo",
        tracker: Tracker | None = None,
    ) -> None:
        self.run_dir = Path(run_dir)
        self.run_dir.mkdir(parents=True, exist_ok=True)
        self.notes: list[str] = []  # what was mended
        self._tracker = tracker
        if resume_from is None:
            if (self.run_dir / METRICS).exists():
                raise ValueError(
                    f"{self.run_dir} already has a log ({METRICS}): resume that run, or give "
                    "another directory"
                )
            return
        last = _position({"step": resume_from, "phase": phase})
        for name in (METRICS, EVALS, MEASUREMENTS):
            dropped = keep_rows(self.run_dir / name, lambda row: _position(row) <= last)
            if dropped:
                self.notes.append(f"dropped {dropped} bytes of a damaged last line of {name}")

    def write_metrics(self, row: Mapping[str, Any]) -> None:
        """Append one step: "step", optionally "phase" (default "grpo"), and any scalars.

        0-d tensors and arrays become numbers; NaN and infinities become null, read back as NaN.
        """
        plain = _plain_row(row)
        append_row(self.run_dir / METRICS, plain)
        self._add_scalars(plain, {k: v for k, v in plain.items() if k != "step"})

    def write_eval(self, row: Mapping[str, Any]) -> None:
        """Append one evaluation: "step", "label", and counts such as "generate/strict".

        A row of the same step and label is replaced: an evaluation made again after a resume counts
        once.
        """
        plain = _plain_row(row)
        path, name = self.run_dir / EVALS, (plain["step"], plain.get("label"))
        keep_rows(path, lambda old: (old["step"], old.get("label")) != name)
        append_row(path, plain)
        rates = {f"eval/{s.name}": s.successes / s.total for s in eval_scores(plain) if s.total}
        means = {f"eval/reward/{t}/{name}": m.value for (t, name), m in eval_rewards(plain).items()}
        self._add_scalars(plain, rates | means)

    def write_measurements(self, found: Iterable[Measurement]) -> None:
        """Append measurements; one of the same step, label and sampling is replaced."""
        rows = [measurement.to_row() for measurement in found]
        names = {_name_of(row) for row in rows}
        path = self.run_dir / MEASUREMENTS
        keep_rows(path, lambda old: _name_of(old) not in names)
        for row in rows:
            append_row(path, row)

    def flush(self) -> None:
        """Wait until every row would survive a power failure, as a checkpoint does."""
        for name in (METRICS, EVALS, MEASUREMENTS):
            flush_to_disk(self.run_dir / name)

    def close(self) -> None:
        """Close the tracker; the JSON lines are on disk already."""
        if self._tracker is not None:
            self._tracker.close()

    def __enter__(self) -> RunWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        self.close()

    def _add_scalars(self, row: Row, values: Mapping[str, Any]) -> None:
        if self._tracker is None:
            return
        numbers = {
            key: value
            for key, value in values.items()
            if isinstance(value, (int, float)) and not isinstance(value, bool)
        }
        self._tracker.scalars(row.get("phase", "grpo"), row["step"], numbers)


def read_metrics(run_dir: str | Path) -> list[Row]:
    """Every complete row of metrics.jsonl in order; [] when there is none.

    Raises:
        ValueError: a line that is not a JSON object with a step, by file and line number.
    """
    return [row for _, row in read_rows(Path(run_dir) / METRICS)]


def read_evals(run_dir: str | Path) -> list[Row]:
    """Every complete row of evals.jsonl in order; as `read_metrics`."""
    return [row for _, row in read_rows(Path(run_dir) / EVALS)]


def read_measurements(run_dir: str | Path) -> list[Measurement]:
    """Every complete row of measurements.jsonl in order; [] when there is none.

    Raises:
        ValueError: a line that is no measurement, by file and line number.
    """
    path = Path(run_dir) / MEASUREMENTS
    found = []
    for number, (_, row) in enumerate(read_rows(path), 1):
        try:
            found.append(Measurement.from_row(row))
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path}, line {number}: no measurement: {error}") from error
    return found


def read_changes(run_dir: str | Path) -> list[Row]:
    """Every change of a run in order: "step", "key", "old", "new", and "lr" where it matters."""
    return [row for _, row in read_rows(Path(run_dir) / CHANGES)]


def write_changes(run_dir: str | Path, changes: Iterable[Row]) -> None:
    """Append to changes.jsonl."""
    path = Path(run_dir) / CHANGES
    keep_rows(path, lambda row: True)
    for change in changes:
        append_row(path, change)
    flush_to_disk(path)


def _position(row: Mapping[str, Any]) -> tuple[int, int]:
    return PHASES.index(row.get("phase", "grpo")), row["step"]


def _name_of(row: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(row.get(key) for key in ("step", "label", "skill", "sampling", "group_size"))


def _plain_row(row: Mapping[str, Any]) -> Row:
    if not isinstance(row.get("step"), int):
        raise ValueError(f"a log row needs an int step, got {row.get('step')!r}")
    if row.get("phase", "grpo") not in PHASES:
        raise ValueError(f"phase of a log row is {row['phase']!r}, expected one of {PHASES}")
    return {key: _plain(key, value) for key, value in row.items()}


def _plain(key: str, value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return [_plain(key, each) for each in value]
    if hasattr(value, "item"):  # a 0-d tensor, or a numpy scalar
        value = value.item()
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, (bool, int, str)):
        return value
    raise ValueError(f"{key} of a log row is a {type(value).__name__}, expected a scalar")
