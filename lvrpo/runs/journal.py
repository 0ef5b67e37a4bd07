"""The journal of a training run that is a directory: its logs, its checkpoints and what is shown.

    checkpoints/       the newest ones, see checkpoint.py
    reference/         the policy that the policy phase began with: the checkpoints of the warm
                       start are deleted

The logs are those of log.py.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from lvrpo.models.protocol import DivergedError
from lvrpo.runs.changes import fingerprint, rate_bridge
from lvrpo.runs.checkpoint import (
    CheckpointError,
    checkpoints,
    load_newest,
    save_checkpoint,
    step_of,
)
from lvrpo.runs.config_file import to_table
from lvrpo.runs.environment import ENVIRONMENT, write_environment
from lvrpo.runs.evals import evaluation_row
from lvrpo.runs.gallery import drop_samples, save_gallery, save_samples
from lvrpo.runs.log import METRICS, PHASES, RunWriter, read_changes, read_evals
from lvrpo.runs.parts import have_parts
from lvrpo.runs.progress import ProgressView
from lvrpo.runs.trackers import open_tracker
from lvrpo.trainer.config import TrainConfig
from lvrpo.trainer.journal import GalleryItem, Snapshot
from lvrpo.trainer.measurement import Measurement
from lvrpo.trainer.ranks import is_raised_by_all


class FollowedRun:
    """The journal of a process that is not the first of a run: it reads, and writes nothing.

    Args:
        directory: of the run, held by the first process.
        config: in force.
        task: fingerprint of the parts in `task/` that the weights are made for.

    Raises:
        CheckpointError: the newest checkpoint is damaged or foreign.
    """

    def __init__(self, directory: Path, config: TrainConfig, task: str) -> None:
        self._directory, self._config = directory, config
        self._made_with = {"fingerprint": fingerprint(config), "task": task}
        self.bridge = rate_bridge(config, read_changes(directory))
        newest = load_newest(directory / "checkpoints")
        self._latest: Snapshot | None = None
        self._saved = 0
        if newest is not None:
            newest.require(self._made_with)
            self._latest, self._saved = newest.snapshot(), newest.step

    def latest(self) -> Snapshot | None:
        """The newest checkpoint as the run began; its memory is the caller's, so only once."""
        latest, self._latest = self._latest, None
        return latest

    def reference(self) -> Snapshot:
        """The weights in `reference/`.

        Raises:
            CheckpointError: they are missing, damaged or foreign.
        """
        folder = self._directory / "reference"
        saved = load_newest(folder)
        if saved is None:
            raise CheckpointError(f"{folder}: the reference policy of this run is missing")
        saved.require(self._made_with)
        return saved.snapshot()

    def is_evaluated(self, label: str, step: int) -> bool:
        """Whether evals.jsonl has it."""
        done = [(row.get("label"), row["step"]) for row in read_evals(self._directory)]
        return (label, step) in done

    def begin(self, *, device: str, dtype: str) -> None:
        """Nothing, as for all that follows: the first process does it."""

    def step(self, row: Mapping[str, Any]) -> None:
        """See `begin`."""

    def save(self, snapshot: Snapshot) -> None:
        """Write what this process has parts of, with the others; else nothing."""
        self._save(snapshot, self._config.run.keep_checkpoints)

    def save_reference(self, snapshot: Snapshot) -> None:
        """As `save`."""
        self._write("reference", snapshot, keep=1)

    def _save(self, snapshot: Snapshot, keep: int) -> None:
        self._write("checkpoints", snapshot, keep)
        self._saved = snapshot.step

    def _write(self, name: str, snapshot: Snapshot, keep: int) -> None:
        if have_parts(snapshot.tensors):
            folder = self._directory / name
            save_checkpoint(folder, snapshot.step, snapshot.tensors, self._made_with, keep=keep)

    def evaluating(self, label: str, done: int, total: int) -> None:
        """See `begin`."""

    def evaluation(
        self,
        label: str,
        step: int,
        found: Sequence[Measurement],
        gallery: Sequence[GalleryItem],
    ) -> None:
        """See `begin`."""

    def samples(self, step: int, items: Sequence[GalleryItem]) -> None:
        """See `begin`."""

    def message(self, text: str) -> None:
        """See `begin`."""

    def ended(self, error: BaseException, step: int, finished: Snapshot | None) -> None:
        """Write the parts of the last finished step, as the first process does."""
        with contextlib.suppress(CheckpointError, OSError, MemoryError):
            if finished is not None and self._is_worth_saving(error, step, finished):
                self._save(finished, self._config.run.keep_checkpoints + 1)

    def _is_worth_saving(self, error: BaseException, step: int, finished: Snapshot) -> bool:
        if self._saved >= step or isinstance(error, CheckpointError):
            return False
        # Parts are written together, or waited for in vain.
        return is_raised_by_all(error) or not have_parts(finished.tensors)


class RunJournal(FollowedRun):
    """Goes on with the run of a directory, or begins it; a context manager.

    Args:
        directory: of the run, held by this process.
        config: in force.
        task: fingerprint of the parts in `task/` that the weights are made for.
        view: of whoever waits.
        facts: about a run that begins, for environment.json.

    Raises:
        CheckpointError: the newest checkpoint is damaged or foreign.
    """

    def __init__(
        self,
        directory: Path,
        config: TrainConfig,
        task: str,
        view: ProgressView,
        facts: Callable[[], Mapping[str, Any]] = dict,
    ) -> None:
        super().__init__(directory, config, task)
        self._view, self._facts = view, facts
        newest = self._latest
        if newest is not None:
            self.message(f"going on after step {newest.step}")
        is_begun = newest is not None or (directory / METRICS).exists()
        phase = "warm_start" if self._saved <= config.warm_start.steps else config.run.objective
        self._tracker = open_tracker(
            config.run.tracker,
            directory,
            to_table(config),
            purge={phase: self._saved + 1} if is_begun else {},
            dropped=PHASES[PHASES.index(phase) + 1 :] if is_begun else (),
        )
        drop_samples(directory, self._saved)
        self._log = RunWriter(
            directory,
            resume_from=self._saved if is_begun else None,
            phase=phase,
            tracker=self._tracker,
        )
        for note in self._log.notes:
            self.message(note)

    def __enter__(self) -> RunJournal:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        self._log.close()

    def begin(self, *, device: str, dtype: str) -> None:
        """Write environment.json, unless the run goes on."""
        if not (self._directory / ENVIRONMENT).exists():
            write_environment(self._directory, device=device, dtype=dtype, **self._facts())

    def step(self, row: Mapping[str, Any]) -> None:
        """Log a step and show it."""
        self._log.write_metrics(row)
        self._view.step(row)

    def save(self, snapshot: Snapshot) -> None:
        """Write a checkpoint, and delete what is older than `run.keep_checkpoints` of them.

        Raises:
            CheckpointError: the disk is full or not writable.
        """
        super().save(snapshot)

    def _save(self, snapshot: Snapshot, keep: int) -> None:
        self._log.flush()  # the rows of the steps reach the disk first
        super()._save(snapshot, keep)

    def _write(self, name: str, snapshot: Snapshot, keep: int) -> None:
        folder = self._directory / name
        save_checkpoint(folder, snapshot.step, snapshot.tensors, self._made_with, keep=keep)

    def evaluating(self, label: str, done: int, total: int) -> None:
        """Show how far an evaluation is."""
        self._view.evaluation(label, done, total)

    def evaluation(
        self,
        label: str,
        step: int,
        found: Sequence[Measurement],
        gallery: Sequence[GalleryItem],
    ) -> None:
        """Log an evaluation and keep its gallery; its row of evals.jsonl, the last, says so."""
        save_gallery(self._directory, label, gallery)
        phase = self._config.run.objective
        self._tracker.samples(phase, step, f"gallery/{label}", gallery)
        self._log.write_measurements(found)
        self._log.write_eval({"step": step, **evaluation_row(found), "label": label})

    def samples(self, step: int, items: Sequence[GalleryItem]) -> None:
        """Keep samples of training in `samples/`, and show them."""
        save_samples(self._directory, step, items)
        self._tracker.samples(self._config.run.objective, step, "samples", items)

    def message(self, text: str) -> None:
        """Show a line."""
        self._view.message(text)

    def ended(self, error: BaseException, step: int, finished: Snapshot | None) -> None:
        """Save the last finished step if it is not, and say so.

        No other checkpoint goes for it: where the weights are what ended the run, those are needed.
        """
        note = self._save_last_step(error, step, finished)
        with contextlib.suppress(OSError):  # the terminal may be what ended the run
            self.message(note)

    def _save_last_step(self, error: BaseException, step: int, finished: Snapshot | None) -> str:
        if self._saved < step and not isinstance(error, CheckpointError) and finished is None:
            return (
                f"step {step} could not be saved: the update of step {step + 1} was cut off in its "
                "middle"
            )
        if finished is not None and self._is_worth_saving(error, step, finished):
            try:
                self._save(finished, self._config.run.keep_checkpoints + 1)
            except (CheckpointError, OSError, MemoryError) as failed:
                return f"step {step} could not be saved: {failed}"
        if self._saved < step:
            return f"step {step} is lost; the newest checkpoint is of step {self._saved}"
        earlier = [str(step_of(path)) for path in self._checkpoints()[:-1]]
        if isinstance(error, DivergedError) and earlier:
            return f"step {step} is saved; --resume-at goes back to step {' or '.join(earlier)}"
        return f"step {step} is saved"

    def _checkpoints(self) -> list[Path]:
        return checkpoints(self._directory / "checkpoints")
