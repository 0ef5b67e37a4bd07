"""The progress bar of a run: the phase, the step, and the rewards."""

from __future__ import annotations

import sys
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from lvrpo.trainer.loop import Progress as Step

_SHOWN = (
    ("loss/text", "text"),
    ("loss/image", "image"),
    ("strict/understand", "right answers"),
    ("strict/generate", "right drawings"),
    ("kl/image", "kl"),
)
_PHASES = {"warm_start": "warm start", "grpo": "lvrpo"}


class ProgressView:
    """A bar on a terminal; a line every few seconds where there is none."""

    def __init__(self) -> None:
        self._console = Console(stderr=True, highlight=False)
        self._bar = Progress(
            TextColumn("{task.description:<10}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[values]}"),
            console=self._console,
            disable=not sys.stderr.isatty(),
        )
        self._task: int | None = None
        self._spoke = 0.0

    def __enter__(self) -> ProgressView:
        self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        self._bar.stop()

    def message(self, text: str) -> None:
        """One line above the bar."""
        self._console.print(text, soft_wrap=True)

    def progress(self, step: Step) -> None:
        """Show a finished step; alarms get a line of their own."""
        for alarm in step.metrics.get("alarm", ()):
            self.message(f"step {step.step}: {alarm}")
        values = "  ".join(
            f"{label} {step.metrics[key]:.3g}" for key, label in _SHOWN if key in step.metrics
        )
        phase = _PHASES[step.phase]
        if self._bar.disable:
            now = time.monotonic()
            if now - self._spoke > 10 or step.step == step.total:
                self._spoke = now
                self.message(f"{phase} {step.step}/{step.total}  {values}")
            return
        if self._task is None:
            self._task = self._bar.add_task(phase, total=step.total, values="")
        self._bar.update(self._task, completed=step.step, description=phase, values=values)  # type: ignore[arg-type]
