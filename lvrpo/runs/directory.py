"""One process per run directory, and a clear line when there is another."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path


class RunDirectoryError(RuntimeError):
    """A run directory that cannot be used; one line naming it."""


@contextlib.contextmanager
def locked(run_dir: Path) -> Iterator[None]:
    """Hold the run directory for this process; the kernel lets go of it however we end.

    Raises:
        RunDirectoryError: another process holds it, or it cannot be created.
    """
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(run_dir / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise RunDirectoryError(f"{run_dir}: {error.strerror}") from error
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise RunDirectoryError(f"{run_dir} is in use by another process") from error
        yield
    finally:
        os.close(descriptor)
