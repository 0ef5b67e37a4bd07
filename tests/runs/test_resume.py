"""A run that is stopped, at whatever moment and by whatever means, ends where it would have."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from runs.tiny import OVERRIDES, Stop, StopAfter, heed_signals, run_tiny, settings

from lvrpo.runs.checkpoint import load_newest
from lvrpo.runs.log import read_evals, read_metrics


def final_tensors(directory: Path) -> dict[str, torch.Tensor]:
    return load_newest(directory / "checkpoints").tensors


def assert_same_run(a: Path, b: Path) -> None:
    tensors = final_tensors(a)
    others = final_tensors(b)
    assert tensors.keys() == others.keys()
    for name, tensor in tensors.items():
        assert torch.equal(tensor, others[name]), name

    def timeless(row: dict) -> dict:
        return {key: value for key, value in row.items() if not key.startswith("time/")}

    assert [timeless(row) for row in read_metrics(a)] == [timeless(row) for row in read_metrics(b)]
    assert read_evals(a) == read_evals(b)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("uninterrupted")
    assert run_tiny(directory)
    return directory


def test_the_same_seed_gives_the_same_run(uninterrupted, tmp_path):
    assert run_tiny(tmp_path)
    assert_same_run(uninterrupted, tmp_path)


def test_another_seed_gives_another_run(uninterrupted, tmp_path):
    run_tiny(tmp_path, "run.seed=1")
    ours, theirs = final_tensors(tmp_path), final_tensors(uninterrupted)
    assert not torch.equal(ours["model.head.weight"], theirs["model.head.weight"])


@pytest.mark.parametrize("step", [1, 2, 3, 4, 5])
def test_resume_continues_bit_for_bit(uninterrupted, tmp_path, step):
    with pytest.raises(Stop):
        run_tiny(tmp_path, signals=StopAfter(step))
    assert run_tiny(tmp_path)
    assert_same_run(uninterrupted, tmp_path)


def test_every_stage_left_its_records(uninterrupted):
    phases = [row["phase"] for row in read_metrics(uninterrupted)]
    assert phases == ["warm_start"] * 3 + ["grpo"] * 3
    assert [row["label"] for row in read_evals(uninterrupted)] == ["warm start", "after"]
    row = read_metrics(uninterrupted)[-1]
    for key in (
        "loss/text",
        "loss/image",
        "kl/text",
        "kl/image",
        "reward/understand/r_ins",
        "share/generate/r_ins",
        "constant_groups/generate",
        "ratio/image/max",
        "grad_norm",
        "time/rollout",
    ):
        assert key in row, key


def test_shuffled_rewards_are_another_run_of_the_same_samples(uninterrupted, tmp_path):
    run_tiny(tmp_path, "run.shuffle_rewards=true")
    ours, theirs = read_metrics(tmp_path), read_metrics(uninterrupted)
    # The first policy step samples and scores the same; only the update differs.
    assert ours[3]["reward/generate/r_ins"] == theirs[3]["reward/generate/r_ins"]
    assert not torch.equal(
        final_tensors(tmp_path)["model.latent_in.weight"],
        final_tensors(uninterrupted)["model.latent_in.weight"],
    )


def start(directory: Path) -> subprocess.Popen:
    command = [sys.executable, "-m", "lvrpo", "train", str(directory), "--no-report"]
    command += settings(OVERRIDES)
    pipes = {"stderr": subprocess.PIPE, "stdout": subprocess.PIPE}
    return subprocess.Popen(command, preexec_fn=heed_signals, **pipes)


def wait_for(path: Path, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 120
    while not path.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)


def test_ctrl_c_finishes_the_step_saves_and_says_how_to_go_on(tmp_path):
    directory = tmp_path / "run"
    process = start(directory)
    wait_for(directory / "metrics.jsonl", process)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 130, errors.decode()
    assert f"go on with: lvrpo train {directory}" in errors.decode()
    saved = load_newest(directory / "checkpoints").step
    assert saved == read_metrics(directory)[-1]["step"]
    assert json.loads((directory / "metrics.jsonl").read_text().splitlines()[-1])["step"] == saved
