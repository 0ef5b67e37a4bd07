"""Every run of a study is made once, after the one it begins with, whatever ends the study."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
from rich.console import Console
from runs.test_resume import assert_same_run, wait_for
from runs.tiny import OVERRIDES, run_tiny

from lvrpo.runs.directory import RunDirectoryError, locked
from lvrpo.studies.directory import StudyRun, runs_of
from lvrpo.studies.progress import StudyView
from lvrpo.studies.runner import is_finished, run_all
from lvrpo.studies.study import Arm, Study

FAKE = (sys.executable, str(Path(__file__).with_name("fake_train.py")))
BASE = Arm("base", "the base")
STUDY = Study(
    "made-up",
    "Made up",
    "Does it run?",
    base=BASE,
    arms=(Arm("one", "one", ("loss.text_kl=0.5",)), Arm("two", "two")),
)


def make(directory: Path, seeds: int = 2, jobs: int = 2) -> tuple[dict[str, str], str]:
    """What failed, and what was said."""
    said = io.StringIO()
    with StudyView(Console(file=said, width=200)) as view:
        failed = run_all(runs_of(directory, STUDY, seeds), jobs, view, FAKE)
    return failed, said.getvalue()


def lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []


def began(directory: Path) -> dict[str, list[str]]:
    """By run: the arguments it was last started with."""
    return dict(map(json.loads, lines(directory / "began")))


def test_every_run_is_made_once_and_a_finished_study_has_nothing_to_do(tmp_path):
    failed, said = make(tmp_path)
    assert not failed
    assert said.count("finished") == 6
    assert set(Counter(lines(tmp_path / "made")).values()) == {1}
    assert all(is_finished(run.directory) for run in runs_of(tmp_path, STUDY, 2))
    before = lines(tmp_path / "began")
    assert len(before) == 6
    make(tmp_path)
    assert lines(tmp_path / "began") == before
    make(tmp_path, seeds=3)
    added = [json.loads(line)[0] for line in lines(tmp_path / "began")[6:]]
    assert sorted(added) == ["base/2", "one/2", "two/2"]


def test_a_run_begins_as_its_arm_says(tmp_path):
    make(tmp_path, seeds=1)
    found = began(tmp_path)
    assert found["base/0"][3:] == ["--config", str(tmp_path / "base.toml"), "--seed", "0"]
    origin = ["--from", str(tmp_path / "base/0")]
    assert found["one/0"][3:] == [*origin, "--set", "loss.text_kl=0.5"]
    assert found["two/0"][3:] == origin


@pytest.mark.parametrize("broken", [("one", 0), ("two", 1), ("base", 0), ("base", 1)])
def test_a_run_that_fails_stops_only_what_begins_with_it(tmp_path, broken):
    arm, seed = broken
    mark = tmp_path / f"fail-{arm}-{seed}"
    mark.touch()
    failed, said = make(tmp_path)
    expected = {f"{arm}/{seed}"} | ({f"one/{seed}", f"two/{seed}"} if arm == "base" else set())
    assert set(failed) == expected
    assert failed[f"{arm}/{seed}"] == "lvrpo: the reason"
    assert f"{arm}/{seed}: failed: lvrpo: the reason" in said
    others = {run.name: run for run in runs_of(tmp_path, STUDY, 2) if run.name not in expected}
    assert all(is_finished(run.directory) for run in others.values())
    mark.unlink()
    assert make(tmp_path)[0] == {}
    assert set(Counter(lines(tmp_path / "made")).values()) == {1}


def test_a_run_that_another_process_holds_is_waited_for(tmp_path):
    """As the one that a study left behind which was killed: it may need a moment to end."""
    held = tmp_path / "base" / "0"
    code = (
        "import pathlib, sys, time\n"
        "from lvrpo.runs.directory import locked\n"
        "with locked(pathlib.Path(sys.argv[1])):\n"
        "    pathlib.Path(sys.argv[2]).touch()\n"
        "    time.sleep(2)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code, held, tmp_path / "holding"])
    wait_for(tmp_path / "holding", process)
    failed, said = make(tmp_path, seeds=1)
    assert process.wait() == 0
    assert not failed
    assert said.count("base/0: waits for another process") == 1


#: Runs the study of this file in a process of its own, which can be ended by a signal.
CHILD = """
import sys
from pathlib import Path
from lvrpo.runs.signals import Signals
from lvrpo.studies.directory import runs_of
from lvrpo.studies.progress import StudyView
from lvrpo.studies.runner import COMMAND, run_all
from lvrpo.studies.study import Arm, Study

study = Study("real", "", "", base=Arm("base", ""), arms=(Arm("arm", "", ("loss.text_kl=0.2",)),))
with StudyView() as view, Signals():
    assert not run_all(runs_of(Path(sys.argv[1]), study, 1), 1, view)
"""


def start(directory: Path) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-c", CHILD, str(directory)], stderr=subprocess.DEVNULL
    )


def is_free(run: Path) -> bool:
    try:
        with locked(run):
            return True
    except RunDirectoryError:
        return False


@pytest.mark.parametrize(
    "signum", [signal.SIGKILL, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)]
)
def test_whatever_ends_a_study_ends_its_runs_and_loses_nothing(tmp_path, signum):
    from lvrpo.runs.config_file import load_config, to_toml

    study, undisturbed = tmp_path / "study", tmp_path / "undisturbed"
    study.mkdir()
    config = load_config(overrides=[*OVERRIDES, "run.threads=1", "run.steps=40"])
    (study / "base.toml").write_text(to_toml(config))
    base = study / "base" / "0"
    process = start(study)
    wait_for(base / "reference", process)
    os.kill(process.pid, signum)
    assert process.wait() == {signal.SIGKILL: -9}.get(signum, 1)
    while not is_free(base):  # a test that hangs here has found a run that nobody ends
        time.sleep(0.05)
    assert not is_finished(base)
    process = start(study)
    assert process.wait() == 0
    assert is_finished(study / "arm" / "0")
    assert run_tiny(undisturbed, "run.threads=1", "run.steps=40")
    assert_same_run(undisturbed, base)


def test_runs_are_named_by_arm_and_seed(tmp_path):
    runs = runs_of(tmp_path, STUDY, 2)
    assert len({run.directory for run in runs}) == len(runs) == 6
    bases = {run.directory: position for position, run in enumerate(runs) if run.origin is None}
    for position, run in enumerate(runs):
        assert isinstance(run, StudyRun)
        assert run.origin is None or bases[run.origin] < position
        assert run.origin is None or run.origin.name == run.directory.name == str(run.seed)
