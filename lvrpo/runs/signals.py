"""Signals that end a run: none is lost, and none hits the middle of an update or of a record."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from types import FrameType, TracebackType
from typing import Any

#: Ctrl-C; what schedulers and containers send before they kill; a terminal that was closed.
ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Stopped(KeyboardInterrupt):
    """A signal ended the run.

    Args:
        signum: of the signal.
    """

    def __init__(self, signum: int) -> None:
        super().__init__(f"stopped by {signal.Signals(signum).name}")
        self.signum = signum

    def __reduce__(self) -> tuple[type[Stopped], tuple[int]]:
        return Stopped, (self.signum,)


class Signals:
    """Raises `Stopped` in the main thread; a context manager, outside of which all is as before.

    The first Ctrl-C waits for the end of a step, if one is being made; a second one does not, and
    neither does any other signal. Signals that were ignored (`nohup`) stay so.
    """

    def __init__(self) -> None:
        self._received: int | None = None
        self._in_step = False
        self._held = 0
        self._waiting = False  # for the end of what is held
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Signals:
        with contextlib.suppress(ValueError):  # not the main thread: signals are not ours
            for signum in ENDING:
                if signal.getsignal(signum) is not signal.SIG_IGN:
                    self._previous[signum] = signal.signal(signum, self._handle)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        for signum, handler in self._previous.items():
            signal.signal(signum, handler)

    @contextlib.contextmanager
    def step(self) -> Iterator[None]:
        """A step, at whose end the first Ctrl-C is obeyed."""
        self._in_step = True
        try:
            yield
        finally:
            self._in_step = False
        if self._received is not None:
            raise Stopped(self._received)

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """What must not be torn apart; short, because every signal waits for its end."""
        self._held += 1
        try:
            yield
        finally:
            self._held -= 1
        if self._waiting and self._received is not None:
            raise Stopped(self._received)

    def ignore(self) -> None:
        """From here on the run is ending anyway."""
        self._held += 1

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        patient = signum == signal.SIGINT and self._in_step and self._received is None
        self._received = signum
        if patient:
            # Not by way of `sys.stderr`, whose lock the interrupted code may hold.
            with contextlib.suppress(OSError):
                os.write(2, b"\nstopping after this step; once more to stop now\n")
        elif self._held:
            self._waiting = True
        else:
            raise Stopped(signum)


class SharedSignals(Signals):
    """Of one of several processes: `Ranks.together` asks what to raise, so that all raise it.

    A process that ended at once would leave the others waiting for it.
    """

    def __init__(self) -> None:
        super().__init__()
        self._interruptible = False

    def heard(self) -> Stopped | None:
        """What all processes have to end for; None while an update and its record are made."""
        return None if self._held or self._received is None else Stopped(self._received)

    @contextlib.contextmanager
    def step(self) -> Iterator[None]:
        """A step, which a signal does not outlive."""
        yield

    @contextlib.contextmanager
    def interruptible(self) -> Iterator[None]:
        """What a signal raises in, once; whoever catches it tells the other processes."""
        self._interruptible = True
        try:
            stop = self.heard()
            if stop is not None:
                raise stop
            yield
        finally:
            self._interruptible = False

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        self._received = signum
        if self._interruptible:
            self._interruptible = False  # a second one must not cut off what the first began
            raise Stopped(signum)
