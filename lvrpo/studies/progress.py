"""How far a study is: its runs, and the steps of those that are being made."""

from __future__ import annotations

from types import TracebackType

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
)


class StudyView:
    """Bars on a terminal; a line per run that begins or ends where there is none.

    Args:
        console: to write to; None is standard error.
    """

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console(stderr=True, highlight=False)
        self.bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        self._all = self.bar.add_task("runs", total=None)
        self._tasks: dict[str, TaskID] = {}
        self._held: set[str] = set()

    def __enter__(self) -> StudyView:
        self.bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        self.bar.stop()

    def begin(self, total: int, finished: int) -> None:
        """There are so many runs, of which some are finished."""
        self.bar.update(self._all, total=total, completed=finished)
        if finished:
            self.message(f"{finished} of {total} runs are finished")

    def started(self, name: str) -> None:
        """A run begins, or goes on."""
        self._tasks[name] = self.bar.add_task(name, total=None)
        if self.bar.disable:
            self.message(f"{name}: begins")

    def held(self, name: str) -> None:
        """A run has to wait; said once."""
        if name not in self._held:
            self.message(f"{name}: waits for another process to let go of it")
        self._held.add(name)

    def step(self, name: str, done: int, total: int | None) -> None:
        """A run has made so many steps."""
        self.bar.update(self._tasks[name], completed=done, total=total)

    def finished(self, name: str) -> None:
        """A run is finished."""
        self._remove(name)
        self.bar.advance(self._all)
        task = self.bar.tasks[0]
        self.message(f"{name}: finished ({task.completed:.0f} of {task.total:.0f})")

    def failed(self, name: str, line: str) -> None:
        """A run failed; it said so."""
        self._remove(name)
        self.message(f"{name}: failed: {line}")

    def message(self, text: str) -> None:
        """One line above the bars."""
        self._console.print(text, soft_wrap=True, markup=False)

    def _remove(self, name: str) -> None:
        task = self._tasks.pop(name, None)
        if task is not None:
            self.bar.remove_task(task)
