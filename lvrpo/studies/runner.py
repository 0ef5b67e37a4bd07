"""Runs the runs of a study, some at a time, each a process of its own; none is ever made twice.

A run goes on by itself from whatever ended it, so nothing is kept here: which runs are finished is
read off their logs.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from lvrpo.runs.config_file import load_config
from lvrpo.runs.directory import RunDirectoryError, is_run, locked
from lvrpo.runs.log import METRICS, read_evals
from lvrpo.studies import attached
from lvrpo.studies.directory import BASE, StudyRun
from lvrpo.studies.progress import StudyView
from lvrpo.trainer.loop import AFTER

#: The installed command, which ends with this process.
COMMAND = (sys.executable, "-m", attached.__name__)
_POLL = 0.2  # seconds
_GRACE = 60.0  # seconds for saving the last step


def run_all(
    runs: Sequence[StudyRun], jobs: int, view: StudyView, command: Sequence[str] = COMMAND
) -> dict[str, str]:
    """Make every run that is not finished, `jobs` at once; one that fails does not stop the others.

    Args:
        runs: each after the one that it begins with.
        jobs: at least 1.
        view: of whoever waits.
        command: that takes the arguments of `lvrpo`.

    Returns:
        By name of a run that failed: the last line that it said.
    """
    finished = {run.directory for run in runs if is_finished(run.directory)}
    waiting = [run for run in runs if run.directory not in finished]
    view.begin(len(runs), len(finished))
    failed: dict[str, str] = {}
    active: dict[StudyRun, subprocess.Popen[bytes]] = {}
    try:
        while waiting or active:
            for run, process in list(active.items()):
                if process.poll() is None:
                    view.step(run.name, *steps_of(run.directory))
                    continue
                del active[run]
                if process.returncode == 0:
                    finished.add(run.directory)
                    view.finished(run.name)
                else:
                    failed[run.name] = _last_line(run.log) or f"exit code {process.returncode}"
                    view.failed(run.name, failed[run.name])
            broken = {run.directory for run in runs if run.name in failed}
            for run in [run for run in waiting if run.origin in broken]:
                waiting.remove(run)
                failed[run.name] = f"not begun, for {run.origin} failed"
                view.failed(run.name, failed[run.name])
            ready = [run for run in waiting if run.origin is None or run.origin in finished]
            for run in ready[: jobs - len(active)]:
                if _is_held(run.directory):
                    view.held(run.name)
                    continue
                waiting.remove(run)
                view.started(run.name)
                active[run] = _start(run, command)
            time.sleep(_POLL)
    finally:
        _end(list(active.values()))
    return failed


def is_finished(directory: Path) -> bool:
    """Whether a run has been evaluated at its end."""
    try:
        done = [(row.get("label"), row["step"]) for row in read_evals(directory)]
        return (AFTER, steps_of(directory)[1]) in done
    except ValueError:  # a damaged log or configuration, of which the run's own command will tell
        return False


def steps_of(directory: Path) -> tuple[int, int | None]:
    """How many steps a run has made, and how many it will make; None before it has begun."""
    if not is_run(directory):
        return 0, None
    config, log = load_config(directory / "config.toml"), directory / METRICS
    done = log.read_bytes().count(b"\n") if log.exists() else 0
    return done, config.warm_start.steps + config.run.steps


def arguments_of(run: StudyRun) -> list[str]:
    """Of the `lvrpo` command that begins a run, or goes on with it."""
    arguments = ["train", str(run.directory), "--no-report"]
    if is_run(run.directory):
        return arguments
    if run.origin is None:
        base = run.directory.parents[1] / BASE
        return [*arguments, "--config", str(base), "--seed", str(run.seed)]
    arguments += ["--from", str(run.origin)]
    return arguments + [word for setting in run.arm.settings for word in ("--set", setting)]


def _start(run: StudyRun, command: Sequence[str]) -> subprocess.Popen[bytes]:
    run.log.parent.mkdir(parents=True, exist_ok=True)
    with run.log.open("ab") as log:
        return subprocess.Popen(
            [*command, *arguments_of(run)],
            stdin=subprocess.PIPE,  # whose end is the end of the run, see attached.py
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # so that Ctrl-C reaches it once, by way of this process
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )


def _end(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    """Let every process save its last step; what does not end then is killed."""
    for process in processes:
        if process.stdin is not None:
            process.stdin.close()
    deadline = time.monotonic() + _GRACE
    for process in processes:
        try:
            process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _is_held(directory: Path) -> bool:
    """Whether a process of a study that was killed has not ended yet."""
    if not directory.exists():
        return False
    try:
        with locked(directory):
            return False
    except RunDirectoryError:
        return True


def _last_line(path: Path) -> str:
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n") if path.exists() else []
    return next((line.strip() for line in reversed(lines) if line.strip()), "")
