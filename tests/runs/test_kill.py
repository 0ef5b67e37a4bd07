"""`kill -9` at any moment: every resume works and ends where an undisturbed run ends."""

from __future__ import annotations

import multiprocessing
import time

import numpy as np
import pytest
from runs.test_resume import assert_same_run
from runs.tiny import run_tiny

KILLS = 20


@pytest.mark.slow
@pytest.mark.slow
def test_kill_9_at_random_moments(tmp_path):
    # A server that has imported everything forks the runs: most kills then hit a run, not its
    # imports.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["runs.tiny", "lvrpo.runs.setup", "sklearn.svm"])
    undisturbed = tmp_path / "undisturbed"
    seconds = 0.0
    for directory in (tmp_path / "first", undisturbed):  # the first one also starts the server
        began = time.monotonic()
        process = context.Process(target=run_tiny, args=(directory,))
        process.start()
        process.join()
        assert process.exitcode == 0
        seconds = time.monotonic() - began

    rng = np.random.default_rng(0)
    directories = [tmp_path / "run-0"]
    kills = 0
    while kills < KILLS:
        process = context.Process(target=run_tiny, args=(directories[-1],))
        process.start()
        process.join(timeout=float(rng.random()) * seconds)
        if process.exitcode is None:
            process.kill()
            process.join()
        kills += process.exitcode == -9
        if process.exitcode != -9:
            assert process.exitcode == 0
            directories.append(tmp_path / f"run-{len(directories)}")
    process = context.Process(target=run_tiny, args=(directories[-1],))
    process.start()
    process.join()
    assert process.exitcode == 0
    for directory in directories:
        assert_same_run(undisturbed, directory)
