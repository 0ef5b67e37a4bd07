"""What `lvrpo study NAME DIRECTORY` does."""

from __future__ import annotations

import os
from pathlib import Path

from lvrpo.runs.signals import Signals
from lvrpo.studies.directory import open_study
from lvrpo.studies.progress import StudyView
from lvrpo.studies.runner import run_all
from lvrpo.studies.study import Study


def run_study(
    directory: Path, study: Study, overrides: list[str], *, seeds: int | None, jobs: int | None
) -> dict[str, str]:
    """Make what runs are missing.

    Args:
        directory: of the study, new or one that goes on.
        study: to run.
        overrides: `section.key=value` of all runs.
        seeds: how many; None: as before, or five.
        jobs: runs at once; None: one per core that this process may use.

    Returns:
        By name of a run that failed: the last line that it said.

    Raises:
        ConfigError: see `open_study`.
        RunDirectoryError: see `open_study`.
        Stopped: a signal ended the study.
    """
    with open_study(directory, study, overrides, seeds) as runs, StudyView() as view, Signals():
        return run_all(runs, jobs or _cores(), view)


def _cores() -> int:
    has_affinity = hasattr(os, "sched_getaffinity")
    return len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count() or 1
