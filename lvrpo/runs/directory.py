"""What makes a folder a run directory: one process at a time, in a format that lvrpo reads."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Collection, Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from lvrpo import __version__
from lvrpo.runs.files import write_atomically

#: Raised by one whenever a run that was begun before could not go on, or not to the same numbers.
FORMAT = 4
VERSION = "version.json"


class RunDirectoryError(RuntimeError):
    """A run directory that cannot be used; one line naming it."""


@contextlib.contextmanager
def locked(run_dir: Path) -> Iterator[None]:
    """Hold the run directory for this process; the kernel lets go of it however we end.

    Raises:
        RunDirectoryError: another process holds it, or it cannot be created.
    """
    # A soft lock would outlive a kill.
    lock = FileLock(run_dir / ".lock", timeout=0, mode=0o644, fallback_to_soft=False)
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout as error:
        raise RunDirectoryError(f"{run_dir} is in use by another process") from error
    except OSError as error:
        raise RunDirectoryError(f"{run_dir}: {error.strerror}") from error
    try:
        yield
    finally:
        lock.release()


def is_run(run_dir: Path) -> bool:
    """Whether a run has begun there: `config.toml` is the last file of a beginning."""
    return (run_dir / "config.toml").exists()


def refuse_other_contents(directory: Path, what: str, last: str, early: Collection[str]) -> None:
    """See that something new can begin in a directory: there is none, or it is empty.

    Args:
        directory: to begin in.
        what: begins there, a run or a study.
        last: file of a beginning, which this directory lacks.
        early: files that one leaves which was killed before it had begun, beside hidden ones.

    Raises:
        RunDirectoryError: it is a file, or has something else.
    """
    if directory.exists() and not directory.is_dir():
        raise RunDirectoryError(f"{directory} is a file; give a new directory")
    names = [path.name for path in directory.glob("*")]
    others = [name for name in names if name not in early and not name.startswith(".")]
    if others:
        raise RunDirectoryError(
            f"{directory} is not empty and not a {what} (it has {min(others)}, no {last}); give a "
            "new directory"
        )


def write_version(run_dir: Path) -> None:
    """Write version.json: which lvrpo began the run, and the format of its files."""
    content = {"format": FORMAT, "lvrpo": __version__}
    write_atomically(run_dir / VERSION, json.dumps(content).encode() + b"\n")


def require_format(run_dir: Path) -> None:
    """See that this lvrpo can go on with a run.

    Raises:
        RunDirectoryError: another version wrote it, in a format of its own.
    """
    path = run_dir / VERSION
    try:
        written = json.loads(path.read_bytes()) if path.exists() else {"lvrpo": "0.1.0 or older"}
        version, number = written["lvrpo"], written.get("format", 1)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise RunDirectoryError(f"{path} is damaged: give a new directory") from error
    if number != FORMAT:
        raise RunDirectoryError(
            f"{run_dir} was written by lvrpo {version} in format {number}, and this is lvrpo "
            f"{__version__}, which reads format {FORMAT}: go on with that version, or give a new "
            "directory"
        )
