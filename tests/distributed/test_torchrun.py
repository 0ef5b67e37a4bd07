"""`torchrun -m lvrpo train`: one directory, one voice, and one end, whichever process meets it."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from runs.tiny import OVERRIDES, command, heed_signals, settings

from lvrpo.runs.checkpoint import load_newest
from lvrpo.runs.log import read_evals, read_metrics

ROOT = Path(__file__).parents[2]

REWARD = """
import os
import time
from pathlib import Path

HERE = Path(__file__).parent

def gated(samples):
    log = HERE / "run" / "metrics.jsonl"
    done = log.read_text().count("\\n") if log.exists() else 0
    if done == 4 and (HERE / "hold").exists():
        (HERE / f"{os.environ['RANK']} is {os.getpid()}").touch()
        while (HERE / "hold").exists():
            time.sleep(0.1)
        if (HERE / f"fail on {os.environ['RANK']}").exists():
            raise KeyError("no such picture")
    return samples.images.mean(dim=(1, 2, 3)).tolist()
"""


def start(folder: Path, size: int, *overrides: str) -> subprocess.Popen:
    """A run, whose reward of drawings waits in step 5 while there is a file called hold."""
    (folder / "gate.py").write_text(REWARD)
    reward = f"rewards.generate={{ '{folder}/gate.py:gated' = 1.0 }}"
    flags = settings([*OVERRIDES, "run.eval_items=2", reward, *overrides])
    run = ["-m", "lvrpo", "train", folder / "run", "--no-report", *flags]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(size)]
    torchrun += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [*torchrun, *run],
        preexec_fn=heed_signals,
        cwd=ROOT,
        env=environment,
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def processes(folder: Path, size: int, process: subprocess.Popen) -> list[int]:
    """Their numbers, by rank, when all wait in the reward."""
    deadline = time.monotonic() + 240
    while process.poll() is None and time.monotonic() < deadline:
        names = sorted(path.name for path in folder.glob("* is *"))
        if len(names) == size:
            return [int(name.split()[-1]) for name in names]
        time.sleep(0.05)
    raise AssertionError(process.communicate())


def said(errors: str) -> list[str]:
    """Lines of ours: torchrun adds a report of its own."""
    ours = "lvrpo: ", "step 4 is ", "stopped by "
    return [line for line in errors.splitlines() if line.startswith(ours)]


def held_at_step_5(folder: Path, size: int, *overrides: str) -> tuple[subprocess.Popen, list[int]]:
    (folder / "hold").touch()
    process = start(folder, size, *overrides)
    return process, processes(folder, size, process)


def go_on(folder: Path) -> None:
    """By one process, to the end."""
    (folder / "hold").unlink(missing_ok=True)
    assert load_newest(folder / "run" / "checkpoints").step == 4
    assert command("train", folder / "run", "--no-report").exit_code == 0
    assert [row["step"] for row in read_metrics(folder / "run")] == [1, 2, 3, 4, 5, 6]


def test_a_signal_to_one_ends_all(tmp_path):
    process, pids = held_at_step_5(tmp_path, 2)
    os.kill(pids[1], signal.SIGTERM)
    (tmp_path / "hold").unlink()
    _, errors = process.communicate(timeout=120)
    assert said(errors) == [
        "step 4 is saved",
        f"stopped by SIGTERM; go on with: lvrpo train {tmp_path / 'run'}",
    ], errors
    go_on(tmp_path)


@pytest.mark.parametrize("weights", ["whole", "sharded"])
def test_a_signal_to_torchrun_does_not_wait_for_samples_or_rewards(tmp_path, weights):
    """It kills after 30 seconds, and these would wait for longer; step 4 has no checkpoint yet."""
    sharded = ["run.shard=true", "run.precision=bf16"] if weights == "sharded" else []
    process, _ = held_at_step_5(tmp_path, 2, "run.checkpoint_every=1000", *sharded)
    asked = time.monotonic()
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=120)
    assert time.monotonic() - asked < 25
    assert said(errors) == [
        "step 4 is saved",
        f"stopped by SIGTERM; go on with: lvrpo train {tmp_path / 'run'}",
    ], errors
    go_on(tmp_path)


def test_a_reward_that_fails_on_one_ends_all_with_its_words(tmp_path):
    (tmp_path / "fail on 1").touch()
    process, _ = held_at_step_5(tmp_path, 2)
    (tmp_path / "hold").unlink()
    _, errors = process.communicate(timeout=120)
    saved, reward = said(errors)
    assert saved == "step 4 is saved"
    assert reward.startswith("lvrpo: reward 'gated' raised KeyError: 'no such picture'")
    assert "exitcode: 2" in errors
    (tmp_path / "fail on 1").unlink()
    go_on(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_process_that_is_killed_is_missed(tmp_path, rank):
    process, pids = held_at_step_5(tmp_path, 2)
    os.kill(pids[rank], signal.SIGKILL)
    (tmp_path / "hold").unlink()
    _, errors = process.communicate(timeout=120)
    assert process.returncode
    if rank == 1:
        saved, missed = said(errors)
        assert saved == "step 4 is saved"
        assert "a rank of the group did not answer" in missed
        go_on(tmp_path)


@pytest.mark.slow
def test_more_processes_than_groups(tmp_path):
    process = start(tmp_path, 5)
    _, errors = process.communicate(timeout=240)
    (line,) = said(errors)
    assert "an update has 4 groups for 5 processes, expected one each at least" in line
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_directory_is_that_of_one_process(tmp_path):
    """In fp32, where Adam makes a step of its own of a gradient that is rounding."""
    names = "alone", "shared"
    for name, size in zip(names, (1, 4), strict=True):
        (tmp_path / name).mkdir()
        process = start(tmp_path / name, size)
        out, errors = process.communicate(timeout=300)
        assert (process.returncode, out) == (0, ""), errors
    alone, shared = (tmp_path / name / "run" for name in names)
    assert read_evals(alone) == read_evals(shared)
    for ours, theirs in itertools.zip_longest(read_metrics(alone), read_metrics(shared)):
        assert ours.keys() == theirs.keys()
        assert (ours["step"], ours["phase"]) == (theirs["step"], theirs["phase"])
        assert ours.get("strict/generate") == theirs.get("strict/generate")
    tensors, others = (load_newest(run / "checkpoints").tensors for run in (alone, shared))
    for name, tensor in tensors.items():
        assert torch.all((others[name] - tensor).abs() < 1e-4), name
    files, others = (sorted(path.name for path in run.iterdir()) for run in (alone, shared))
    assert files == others
    assert json.loads((shared / "version.json").read_text())
