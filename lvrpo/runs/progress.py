"""The progress bar of a run: the phase, the step, the time left, and the rewards."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from datetime import timedelta
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Column

_SHOWN = (
    ("strict/understand", "right answers"),
    ("strict/generate", "right drawings"),
    ("loss/text", "text"),
    ("loss/image", "image"),
    ("kl/image", "kl"),
)
_PHASES = {"warm_start": "warm start", "grpo": "lvrpo", "supervised": "supervised"}
_QUIET = 10.0  # seconds between two lines where there is no terminal


class ProgressView:
    """A bar on a terminal; a line every few seconds where there is none.

    Args:
        warm_start: steps of the first phase: one of the second takes another time.
        total: steps of both.
        console: to write to; None is standard error.
        clock: seconds.
    """

    def __init__(
        self,
        warm_start: int = 0,
        total: int = 0,
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._phases = dict.fromkeys(_PHASES, (warm_start, total)) | {"warm_start": (0, warm_start)}
        self._total = total
        self._console = console or Console(stderr=True, highlight=False)
        # The values come last and are cut where the line ends: they may be many, and all else
        # has a width.
        self.bar = Progress(
            TextColumn("{task.description:<10}"),
            BarColumn(bar_width=24 if self._console.width >= 80 else 10),
            TextColumn("{task.fields[at]}"),
            TimeRemainingColumn(),
            TextColumn(
                "{task.fields[values]}",
                markup=False,
                table_column=Column(no_wrap=True, overflow="ellipsis", ratio=1),
            ),
            console=self._console,
            disable=not self._console.is_terminal,
            expand=True,
            get_time=clock,
            speed_estimate_period=3600.0,  # a step may take minutes
        )
        self._clock = clock
        self._began = clock()
        self._spoke = self._began
        self._shown: tuple[str, TaskID] | None = None
        self._heard: set[str] = set()

    def __enter__(self) -> ProgressView:
        self.bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        self.bar.stop()

    def message(self, text: str) -> None:
        """One line above the bar."""
        self._console.print(text, soft_wrap=True, markup=False)

    def step(self, row: Mapping[str, Any]) -> None:
        """Show a row of metrics.jsonl; an alarm gets a line of its own when it is first heard."""
        for alarm in row.get("alarm", ()):
            if alarm not in self._heard:
                self.message(f"step {row['step']}: {alarm}")
            self._heard.add(alarm)  # the log has all its steps
        first, last = self._phases[row["phase"]]
        self._show(
            _PHASES[row["phase"]],
            row["step"] - first,
            last - first,
            at=f"{row['step']}/{self._total}",
            values=shown_values(row),
            closing=True,
        )

    def evaluation(self, label: str, done: int, total: int) -> None:
        """Show how many samples of held-out prompts there are."""
        self._show("evaluating", done, total, at=f"{done}/{total}", values=label, closing=False)

    def _show(
        self, phase: str, done: int, total: int, *, at: str, values: str, closing: bool
    ) -> None:
        if self._shown is None or self._shown[0] != phase:
            # A task of its own for each phase: the time left is reckoned at its own speed.
            if self._shown is not None:
                self.bar.remove_task(self._shown[1])
            new = self.bar.add_task(
                phase, total=total, completed=max(0, done - 1), at="", values=""
            )
            self._shown = phase, new
        task = self._shown[1]
        self.bar.update(task, completed=done, at=at, values=values)
        now = self._clock()
        if self.bar.disable and (now - self._spoke > _QUIET or (done == total and closing)):
            self._spoke = now
            left = self.bar.tasks[0].time_remaining
            self.message(
                f"{phase} {at}  {_time(now - self._began)} elapsed, "
                f"{'?' if left is None else _time(left)} left  {values}".rstrip()
            )


def shown_values(metrics: Mapping[str, Any]) -> str:
    """What a line has room for: the user's own rewards first, for no score may tell of them."""
    own = {key: key.rpartition(":")[2] for key in metrics if _is_own_reward(key)}
    names = list(own.values())
    labels = {
        key: name if names.count(name) == 1 else f"{name} ({key.split('/')[1]})"
        for key, name in own.items()
    } | {key: label for key, label in _SHOWN if key in metrics}
    return "  ".join(f"{label} {metrics[key]:.3g}" for key, label in labels.items())


def _is_own_reward(key: str) -> bool:
    return key.startswith("reward/") and ":" in key


def _time(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))
