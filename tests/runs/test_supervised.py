"""The baseline that learns from labels alone: its steps, their number, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import median

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from runs.test_resume import assert_same_run
from runs.tiny import OVERRIDES, Stop, StopAfter, command, run_tiny, settings, tiny_config

from lvrpo.runs.checkpoint import load_newest
from lvrpo.runs.compute import equal_compute_steps
from lvrpo.runs.config_file import load_config
from lvrpo.runs.directory import RunDirectoryError
from lvrpo.runs.log import METRICS, read_evals, read_metrics
from lvrpo.runs.setup import Setup
from lvrpo.trainer.schedule import learning_rate
from lvrpo.trainer.task import warm_start_examples
from lvrpo.trainer.warm_start import supervised_gradient

SUPERVISED = ("run.objective=supervised", "run.checkpoint_every=1")


@pytest.fixture(scope="module")
def baseline(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("supervised") / "run"
    assert run_tiny(directory, *SUPERVISED)
    return directory


def test_its_steps_are_those_of_the_warm_start_with_the_policy_phase_s_optimizer(baseline):
    config = tiny_config(*SUPERVISED)
    setup = Setup(config)
    task = setup.task(setup.saved_parts(baseline))
    policy = task.new_policy()
    policy.module.load_state_dict(load_newest(baseline / "reference").tensors)
    optimizer = torch.optim.AdamW(policy.module.parameters(), betas=(0.9, 0.95), weight_decay=0)
    for done in range(config.run.steps):
        step = config.warm_start.steps + done + 1
        questions, drawings = warm_start_examples(task.source, config.warm_start, 0, step)
        told = supervised_gradient(policy, questions, drawings, seed=0, step=step)
        torch.nn.utils.clip_grad_norm_(policy.module.parameters(), config.optimizer.grad_clip)
        (group,) = optimizer.param_groups
        group["lr"] = learning_rate(config, done)
        optimizer.step()
        optimizer.zero_grad()
        row = read_metrics(baseline)[step - 1]
        assert (row["phase"], row["lr"]) == ("supervised", group["lr"])
        assert row["loss/text"] == told["loss/text"]
    ours = load_newest(baseline / "checkpoints").tensors
    for name, weight in policy.module.state_dict().items():
        assert torch.equal(weight, ours[f"model.{name}"]), name


def test_it_is_evaluated_like_any_run_and_rolls_nothing_out(baseline, trained):
    rows = read_metrics(baseline)
    assert [row["phase"] for row in rows] == ["warm_start"] * 3 + ["supervised"] * 3
    assert not any(key.startswith(("reward/", "kl/", "ratio/")) for row in rows for key in row)
    before, after = read_evals(baseline)
    assert (before["label"], after["label"]) == ("warm start", "after")
    assert before == read_evals(trained)[0]
    assert before.keys() == after.keys()


@pytest.mark.parametrize("step", [1, 3, 5])
def test_it_resumes_bit_for_bit(baseline, tmp_path, step):
    with pytest.raises(Stop):
        run_tiny(tmp_path, *SUPERVISED, signals=StopAfter(step))
    assert run_tiny(tmp_path, *SUPERVISED)
    assert_same_run(baseline, tmp_path)


def test_a_fork_takes_as_many_steps_as_the_policy_phase_cost(trained, tmp_path):
    run = tmp_path / "baseline"
    flags = ("--from", trained, "--supervised", "-s", "run.eval_items=2")
    rows = read_metrics(trained)
    policy = sum(row["time/total"] for row in rows[3:])
    steps = round(policy / median(row["time/total"] for row in rows[:3]))
    dry = command("train", run, *flags, "--dry-run")
    assert f"run.steps is {steps}: {policy:.0f} s, the 3 policy steps of {trained}" in dry.stdout
    result = command("train", run, *flags)
    assert result.exit_code == 0, result.output
    assert f"run.steps is {steps}: " in result.stderr
    assert result.stdout == f"report: {run / 'report.html'}\n"
    assert load_config(run / "config.toml").run.steps == steps
    phases = [row["phase"] for row in read_metrics(run)]
    assert phases == ["warm_start"] * 3 + ["supervised"] * steps
    # Going on asks for no other number of steps.
    assert command("train", run, "--no-report").exit_code == 0
    assert len(read_metrics(run)) == 3 + steps


def test_steps_that_are_named_are_taken(trained, tmp_path):
    flags = ("--supervised", "--steps", 2, "--no-report", "-s", "run.eval_items=2")
    assert command("train", tmp_path / "run", "--from", trained, *flags).exit_code == 0
    assert len(read_metrics(tmp_path / "run")) == 5
    dry = command("train", tmp_path / "alone", "--supervised", "--dry-run", tiny=True)
    assert "3 warm-start steps, 3 supervised steps" in dry.stdout


def refused(*arguments: object) -> str:
    result = command("train", *arguments)
    assert (result.exit_code, result.stdout) == (2, "")
    assert len(result.stderr.splitlines()) == 1
    return result.stderr


def test_a_run_whose_compute_is_not_known_is_named(tmp_path):
    origin, new = tmp_path / "origin", tmp_path / "new"
    flags = ("--from", origin, "--supervised")
    with pytest.raises(Stop):
        run_tiny(origin, signals=StopAfter(5))
    assert f"{origin} is after step 5 of 6" in refused(new, *flags)
    assert command("train", new, *flags, "--steps", 1, "--dry-run").exit_code == 0
    run_tiny(tmp_path / "none", "run.steps=0")
    flags = ("--from", tmp_path / "none", "--supervised")
    assert "has no policy steps" in refused(new, *flags)
    assert not new.exists()


NOTHING = [f"warm_start.{key}=0" for key in ("steps", "understand_batch", "generate_batch")]


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (["run.shuffle_rewards=true"], "run.shuffle_rewards is true, expected false where run.ob"),
        (NOTHING, "warm_start.understand_batch and warm_start.generate_batch are 0, expected"),
    ],
)
def test_what_contradicts_it_is_refused(tmp_path, keys, message):
    run = tmp_path / "run"
    assert message in refused(run, "--supervised", *settings([*OVERRIDES, *keys]))
    assert not run.exists()


times = st.floats(0.01, 100)


@given(st.lists(times, max_size=6), st.lists(times, max_size=6))
def test_the_compute_is_that_of_the_log(tmp_path_factory, supervised, policy):
    directory = tmp_path_factory.mktemp("log")
    phases = ["warm_start"] * len(supervised) + ["grpo"] * len(policy)
    rows = [
        {"step": step, "phase": phase, "time/total": seconds}
        for step, (phase, seconds) in enumerate(
            zip(phases, [*supervised, *policy], strict=True), start=1
        )
    ]
    (directory / METRICS).write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = tiny_config(f"warm_start.steps={len(supervised)}", f"run.steps={len(policy)}")
    if not policy:
        with pytest.raises(RunDirectoryError, match="has no policy steps"):
            equal_compute_steps(directory, config)
        return
    if not supervised:
        assert equal_compute_steps(directory, config)[0] == len(policy)
        return
    steps, _ = equal_compute_steps(directory, config)
    cost = steps * median(supervised)
    assert steps >= 1
    # No other number of steps is nearer.
    assert abs(cost - sum(policy)) <= median(supervised) / 2 + 1e-9 or steps == 1
    with pytest.raises(RunDirectoryError, match=f"is after step {len(rows)} of {len(rows) + 1}"):
        equal_compute_steps(
            directory,
            tiny_config(f"warm_start.steps={len(supervised)}", f"run.steps={len(policy) + 1}"),
        )
