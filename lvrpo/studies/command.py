"""What `lvrpo study NAME DIRECTORY` does."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from lvrpo.info import packages_of, require
from lvrpo.runs.signals import Signals
from lvrpo.studies.directory import open_study
from lvrpo.studies.progress import StudyView
from lvrpo.studies.runner import is_finished, run_all
from lvrpo.studies.study import Study


@dataclass(frozen=True)
class StudyEnd:
    """How a study ended.

    Attributes:
        page: of the runs that are finished; None where none is.
        failed: the last line that a run said, by its name.
    """

    page: Path | None
    failed: dict[str, str]


def run_study(
    directory: Path,
    study: Study,
    overrides: list[str],
    *,
    config: Path | None,
    seeds: int | None,
    jobs: int | None,
) -> StudyEnd:
    """Make what runs are missing, then the page.

    Args:
        directory: of the study, new or one that goes on.
        study: to run.
        overrides: `section.key=value` of all runs.
        config: TOML file of all runs; overrides are over it.
        seeds: how many; None: as before, or five.
        jobs: runs at once; None: one per core that this process may use.

    Raises:
        ConfigError: see `open_study`.
        RunDirectoryError: see `open_study`.
        Stopped: a signal ended the study.
    """
    require(*packages_of("report"), extra="report")  # before hours are spent
    with open_study(directory, study, overrides, seeds, config) as runs:
        with StudyView() as view, Signals():
            failed = run_all(runs, jobs or _cores(), view)
        from lvrpo.studies.page import write_page  # matplotlib takes a second

        finished = [run for run in runs if is_finished(run.directory)]
        page = write_page(directory, study, finished, len(runs)) if finished else None
        return StudyEnd(page, failed)


def _cores() -> int:
    has_affinity = hasattr(os, "sched_getaffinity")
    return len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count() or 1
