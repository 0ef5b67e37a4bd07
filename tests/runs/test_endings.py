"""Whatever ends a run saves its last finished step; going on, it ends where it would have."""

from __future__ import annotations

import io
import itertools
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from runs.test_resume import assert_same_run, wait_for
from runs.tiny import (
    OVERRIDES,
    Stop,
    StopAfter,
    command,
    heed_signals,
    run_tiny,
    settings,
    tiny_config,
)

from lvrpo.runs.checkpoint import checkpoints, load_newest
from lvrpo.runs.config_file import load_config
from lvrpo.runs.log import read_changes, read_evals, read_metrics
from lvrpo.runs.signals import SharedSignals, Signals, Stopped
from lvrpo.trainer import loop

RARE = ("run.checkpoint_every=1000", "run.eval_items=2")


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A run that nothing disturbed; its checkpoints are of the ends of its phases."""
    directory = tmp_path_factory.mktemp("whole") / "run"
    assert run_tiny(directory, *RARE)
    return directory


def fail_in(monkeypatch, module, name: str, call: int, error: BaseException) -> None:
    """Let the function raise at that call, once."""
    function, calls = getattr(module, name), [0]

    def failing(*arguments, **keywords):
        calls[0] += 1
        if calls[0] == call:
            raise error
        return function(*arguments, **keywords)

    monkeypatch.setattr(module, name, failing)


ERRORS = [
    RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory\nmore lines"),
    MemoryError(),
    ValueError("of a reward"),
    SystemExit(3),
    KeyboardInterrupt(),
]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("where", ["gather_experience", "policy_gradient", "evaluate"])
def test_an_error_anywhere_in_a_step(whole, tmp_path, monkeypatch, where, error):
    fail_in(monkeypatch, loop, where, 2, error)
    with pytest.raises(type(error)):
        run_tiny(tmp_path, *RARE)
    monkeypatch.undo()
    finished = 6 if where == "evaluate" else 4
    assert load_newest(tmp_path / "checkpoints").step == finished
    assert read_metrics(tmp_path)[-1]["step"] == finished
    assert run_tiny(tmp_path, *RARE)
    assert_same_run(tmp_path, whole)


@pytest.mark.parametrize("phase", ["warm start", "policy"])
def test_an_error_in_a_supervised_step(whole, tmp_path, monkeypatch, phase):
    if phase == "warm start":
        fail_in(monkeypatch, loop, "supervised_gradient", 3, MemoryError())
    else:
        fail_in(monkeypatch, loop, "check_ratio", 1, loop.SelfTestError("self test"))
    with pytest.raises((MemoryError, loop.SelfTestError)):
        run_tiny(tmp_path, *RARE)
    monkeypatch.undo()
    assert load_newest(tmp_path / "checkpoints").step == (2 if phase == "warm start" else 3)
    assert run_tiny(tmp_path, *RARE)
    assert_same_run(tmp_path, whole)


@pytest.mark.parametrize(("passes", "minibatches"), [(3, 1), (1, 2), (2, 2)])
def test_an_error_between_two_updates_of_one_rollout(tmp_path, monkeypatch, passes, minibatches):
    """The weights are those of no finished step then: a copy is saved."""
    several = (
        *RARE,
        f"optimizer.updates_per_rollout={passes}",
        f"optimizer.minibatches={minibatches}",
    )
    assert run_tiny(tmp_path / "whole", *several)
    updates = passes * minibatches
    fail_in(monkeypatch, loop, "policy_gradient", 2 * updates, MemoryError())
    with pytest.raises(MemoryError):
        run_tiny(tmp_path / "run", *several)
    monkeypatch.undo()
    assert load_newest(tmp_path / "run" / "checkpoints").step == 4
    assert run_tiny(tmp_path / "run", *several)
    assert_same_run(tmp_path / "run", tmp_path / "whole")


def test_a_diverged_run_goes_back_and_on_with_a_lower_rate(tmp_path):
    broken = settings([*OVERRIDES, "optimizer.lr=1e18", "run.eval_items=2", "run.steps=6"])
    result = command("train", tmp_path / "run", "--no-report", *broken)
    assert result.exit_code == 2
    *_, saved, last = result.stderr.splitlines()
    assert "optimizer.lr" in last
    assert "--resume-at goes back to step" in saved
    assert saved.endswith(" 3") or " 3 or " in saved
    flags = ("--resume-at", 3, "-s", "optimizer.lr=1e-4", "--no-report")
    assert command("train", tmp_path / "run", *flags).exit_code == 0
    assert [row["step"] for row in read_metrics(tmp_path / "run")] == list(range(1, 10))
    assert [row["key"] for row in read_changes(tmp_path / "run")] == ["checkpoint", "optimizer.lr"]


def test_weights_that_are_half_updated_are_not_saved(whole, tmp_path, monkeypatch):
    fail_in(monkeypatch, torch.optim.Optimizer, "zero_grad", 5, MemoryError())
    out = io.StringIO()
    with pytest.raises(MemoryError):
        run_tiny(tmp_path, *RARE, out=out)
    monkeypatch.undo()
    said = out.getvalue().splitlines()
    assert said[-1].startswith("step 4 could not be saved: the update of step 5 was cut off")
    assert load_newest(tmp_path / "checkpoints").step == 3
    assert run_tiny(tmp_path, *RARE)
    assert_same_run(tmp_path, whole)


def test_what_is_not_the_user_s_is_one_line_too(tmp_path, monkeypatch):
    for error, line in zip(
        ERRORS,
        ["lvrpo: RuntimeError: [enforce fail] Def", "lvrpo: MemoryError", "lvrpo: of a reward"],
        strict=False,
    ):
        fail_in(monkeypatch, loop, "gather_experience", 1, error)
        result = command("train", tmp_path / str(line[7:10]), *settings([*OVERRIDES, *RARE]))
        assert result.exit_code == (2 if isinstance(error, ValueError) else 1)
        *_, saved, last = result.stderr.splitlines()
        assert saved == "step 3 is saved"
        assert last.startswith(line)
        assert "Traceback" not in result.output
        monkeypatch.undo()
    fail_in(monkeypatch, loop, "gather_experience", 1, ERRORS[2])
    result = command("train", tmp_path / "debug", "--debug", *settings([*OVERRIDES, *RARE]))
    assert result.exception is ERRORS[2]


REWARD = """
import time
from pathlib import Path

HERE = Path(__file__).parent

def gated(samples):
    log = HERE / "run" / "metrics.jsonl"
    done = log.read_text().count("\\n") if log.exists() else 0
    if done == 4 and (HERE / "hold").exists():
        (HERE / "hanging").touch()
        time.sleep(120)
    return samples.images.mean(dim=(1, 2, 3)).tolist()
"""


def start(folder: Path, *overrides: str) -> subprocess.Popen:
    (folder / "gate.py").write_text(REWARD)
    reward = f"rewards.generate={{ '{folder}/gate.py:gated' = 1.0 }}"
    flags = settings([*OVERRIDES, *RARE, reward, *overrides])
    return subprocess.Popen(
        [sys.executable, "-m", "lvrpo", "train", folder / "run", "--no-report", *flags],
        preexec_fn=heed_signals,
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize(
    "signals",
    [
        "SIGTERM",
        *(
            pytest.param(names, marks=pytest.mark.slow)
            for names in ("SIGHUP", "SIGINT SIGINT", "SIGINT SIGTERM")
        ),
    ],
)
def test_a_signal_while_a_reward_hangs(tmp_path, signals):
    (tmp_path / "hold").touch()
    process = start(tmp_path)
    wait_for(tmp_path / "hanging", process)
    signums = [signal.Signals[name] for name in signals.split()]
    for signum in signums:
        process.send_signal(signum)
        time.sleep(0.5)  # two of a kind at once are one
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + signums[-1], errors
    assert "step 4 is saved" in errors
    assert errors.splitlines()[-1] == (
        f"stopped by {signums[-1].name}; go on with: lvrpo train {tmp_path / 'run'}"
    )
    assert "Traceback" not in errors
    assert load_newest(tmp_path / "run" / "checkpoints").step == 4
    (tmp_path / "hold").unlink()
    assert command("train", tmp_path / "run", "--no-report").exit_code == 0
    assert [row["step"] for row in read_metrics(tmp_path / "run")] == [1, 2, 3, 4, 5, 6]


def test_ctrl_c_in_an_evaluation_does_not_wait_for_its_end(tmp_path):
    process = start(tmp_path, "run.eval_items=10000000")
    wait_for(tmp_path / "run" / "reference" / "step-00000003", process)
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "step 3 is saved" in errors


def test_signals_that_were_ignored_stay_so():
    previous = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Signals():
            os.kill(os.getpid(), signal.SIGHUP)
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, previous)


def test_what_is_held_is_finished_first():
    done = []
    before = signal.getsignal(signal.SIGTERM)

    def step() -> None:
        with Signals() as signals, signals.step():
            with signals.held():
                os.kill(os.getpid(), signal.SIGTERM)
                done.append("held")
            done.append("more")

    with pytest.raises(Stopped) as stop:
        step()
    assert (done, stop.value.signum) == (["held"], signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) is before


def test_of_several_processes_a_signal_ends_once_what_no_other_waits_for():
    """All else goes on: the processes have to hear of it together."""
    done = []

    def kill() -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    def work() -> None:
        try:
            kill()
            done.append("more of it")
        finally:
            kill()
            done.append("tidied")

    with SharedSignals() as signals:
        with pytest.raises(Stopped), signals.interruptible():
            work()
        assert done == ["tidied"]
        with pytest.raises(Stopped), signals.interruptible():
            done.append("begun again")
        assert done == ["tidied"]
        with signals.step(), signals.held():
            kill()
            assert signals.heard() is None
        kill()
        assert signals.heard().signum == signal.SIGTERM


def test_in_another_thread_signals_are_left_alone(whole, tmp_path):
    thread = threading.Thread(target=run_tiny, args=(tmp_path / "run", *RARE))
    thread.start()
    thread.join()
    assert_same_run(tmp_path / "run", whole)


def copy_of(run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(run, tmp_path / "run"))


def rows(path: Path) -> list[bytes]:
    return path.read_bytes().splitlines(keepends=True)


SPOILED_LOGS = {
    "NULs after it": lambda lines: [*lines, b"\0" * 300],
    "a line of NULs after it": lambda lines: [*lines, b"\0" * 300 + b"\n"],
    "half a line after it": lambda lines: [*lines, b'{"step": 7, "loss'],
    "half a line that ends": lambda lines: [*lines, b'{"step": 7, "loss\n'],
    "NULs for the last": lambda lines: [*lines[:-1], b"\0" * len(lines[-1])],
    "half of the last": lambda lines: [*lines[:-1], lines[-1][:20]],
    "the last is lost": lambda lines: lines[:-1],
    "the last two are lost": lambda lines: lines[:-2],
    "one in the middle is lost": lambda lines: [*lines[:4], *lines[5:]],
}


@pytest.mark.parametrize("spoil", SPOILED_LOGS.values(), ids=SPOILED_LOGS)
@pytest.mark.parametrize("log", ["metrics.jsonl", "evals.jsonl"])
def test_a_log_that_a_power_failure_spoiled_is_healed(trained, tmp_path, spoil, log):
    """Lost rows are made again, from an earlier checkpoint."""
    run = copy_of(trained, tmp_path)
    (run / log).write_bytes(b"".join(spoil(rows(run / log))))
    result = command("train", run, "--no-report")
    assert result.exit_code == 0, result.output
    assert_same_run(run, trained)
    assert command("eval", run, "--items", 2).exit_code == 0


@pytest.mark.parametrize("lost", [[0], [1, 2], [0, 1, 2, 3, 4, 5]])
def test_rows_that_cannot_be_made_again_are_named(trained, tmp_path, lost):
    run = copy_of(trained, tmp_path)
    kept = [row for i, row in enumerate(rows(run / "metrics.jsonl")) if i not in lost]
    (run / "metrics.jsonl").write_bytes(b"".join(kept))
    result = command("train", run, "--steps", 4, "--no-report")
    assert result.exit_code == 2
    assert f"metrics.jsonl lacks the row of step {lost[0] + 1}" in result.stderr
    result = command("train", run, "--steps", 4, "--no-report", "--accept-changes")
    assert result.exit_code == 0, result.output
    assert "metrics.jsonl" in [row["key"] for row in read_changes(run)]
    # Accepted once, the hole is known.
    assert command("train", run, "--no-report").exit_code == 0


@pytest.mark.parametrize("what", ["tensors.safetensors", "state.json"])
def test_a_damaged_newest_checkpoint_and_the_way_back(trained, tmp_path, what):
    run = copy_of(trained, tmp_path)
    newest = checkpoints(run / "checkpoints")[-1]
    os.truncate(newest / what, 20)
    for arguments in (("train", run), ("eval", run)):
        result = command(*arguments)
        assert result.exit_code == 2
        last = result.stderr.splitlines()[-1]
        assert f"{newest} is corrupt" in last
        assert f"`lvrpo train {run} --resume-at 4`" in last
    result = command("train", run, "--resume-at", 5)
    assert result.exit_code == 2
    assert "no checkpoint of step 5; there are 4, 6" in result.stderr
    assert newest.exists()
    result = command("train", run, "--resume-at", 4, "--no-report")
    assert result.exit_code == 0, result.output
    assert_same_run(run, trained)
    (change,) = read_changes(run)
    assert (change["key"], change["old"], change["new"]) == ("checkpoint", 6, 4)


@pytest.mark.parametrize("step", ["", '"step": null,', '"step": "6",', '"step": -1,'])
def test_a_state_without_a_step(trained, tmp_path, step):
    run = copy_of(trained, tmp_path)
    path = checkpoints(run / "checkpoints")[-1] / "state.json"
    path.write_text(path.read_text().replace('"step": 6,', step).replace(' "step": 6', step[:-1]))
    for arguments in (("train", run), ("eval", run)):
        result = command(*arguments)
        assert result.exit_code == 2, result.output
        assert "is corrupt" in result.stderr.splitlines()[-1]


def rates(run: Path) -> list[float]:
    return [row["lr"] for row in read_metrics(run) if row["phase"] == "grpo"]


def test_a_finished_run_takes_more_steps(trained, tmp_path):
    run = copy_of(trained, tmp_path)
    result = command("train", run, "--steps", 12, "--no-report", "-s", "run.eval_items=4")
    assert result.exit_code == 0, result.output
    assert [row["step"] for row in read_metrics(run)] == list(range(1, 16))
    assert read_metrics(run)[:6] == read_metrics(trained)
    assert [(row["label"], row["step"]) for row in read_evals(run)] == [
        ("warm start", 3),
        ("after", 6),
        ("after", 15),
    ]
    assert [(row["step"], row["key"], row["old"], row["new"]) for row in read_changes(run)] == [
        (6, "run.steps", 3, 12),
        (6, "run.eval_items", 8, 4),
    ]
    # From one update to the next the rate moves no more than in a warm-up.
    found = rates(run)
    assert max(abs(a - b) for a, b in itertools.pairwise(found)) <= 2e-4 / 5 + 1e-12
    assert found[-1] == pytest.approx(2e-4 * (1 - 11 / 12))
    assert command("train", run, "--no-report").exit_code == 0  # with no flag, or with one
    assert command("train", run, "--steps", 12, "--no-report").exit_code == 0
    assert len(read_changes(run)) == 2


def test_an_extended_run_may_be_stopped_anywhere(trained, tmp_path):
    straight = copy_of(trained, tmp_path / "a")
    assert command("train", straight, "--steps", 6, "--no-report").exit_code == 0
    stopped = copy_of(trained, tmp_path / "b")

    with pytest.raises(Stop):
        run_tiny(stopped, "run.steps=6", signals=StopAfter(1))
    assert command("train", stopped, "--no-report").exit_code == 0
    assert_same_run(straight, stopped)
    assert rates(straight) == rates(stopped)


def test_a_lower_rate_holds_at_once(trained, tmp_path):
    run = copy_of(trained, tmp_path)
    result = command("train", run, "--resume-at", 4, "-s", "optimizer.lr=1e-6", "--no-report")
    assert result.exit_code == 0, result.output
    assert max(rates(run)[1:]) < 1e-6
    assert read_changes(run)[-1]["key"] == "optimizer.lr"


@pytest.mark.parametrize(
    "setting",
    ["run.checkpoint_every=1", "run.keep_checkpoints=1", "run.threads=1"],
)
def test_what_changes_no_number_may_change(trained, tmp_path, setting):
    run = copy_of(trained, tmp_path)
    result = command("train", run, "--set", setting, "--no-report")
    assert result.exit_code == 0, result.output
    assert_same_run(run, trained)
    assert [row["key"] for row in read_changes(run)] == [setting.partition("=")[0]]


@pytest.mark.parametrize(
    ("setting", "reason"),
    [
        ("rollout.group_size=4", "--from"),
        ("loss.text_kl=0.2", "--from"),
        ("run.shuffle_rewards=true", "--from"),
        ("run.objective=supervised", "--from"),
        ("warm_start.steps=9", "its warm start was made with it"),
        ("run.seed=9", "its warm start was made with it"),
        ("data.source=scenes.jsonl", "its warm start was made with it"),
        ("run.steps=2", "has 3 policy steps behind it"),
    ],
)
def test_what_may_not_change_is_named_with_the_reason(trained, tmp_path, setting, reason):
    run = copy_of(trained, tmp_path)
    result = command("train", run, "--set", setting, "--set", "run.threads=1")
    assert result.exit_code == 2
    assert f"{setting.partition('=')[0]} is " in result.stderr
    assert reason in result.stderr
    assert not read_changes(run)


def test_a_dry_run_checks_and_creates_nothing(trained, tmp_path):
    run = copy_of(trained, tmp_path)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    result = command("train", run, "--steps", 9, "--dry-run")
    assert result.exit_code == 0, result.output
    assert "after step 6 of 12" in result.stdout
    assert "run.steps: 9 in place of 3" in result.stdout
    assert before == {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    result = command("train", tmp_path / "new", "--dry-run", tiny=True)
    assert result.exit_code == 0, result.output
    assert f"{tmp_path / 'new'}: new" in result.stdout
    assert "generate: 2 prompts x 3 samples; 1 r_ins" in result.stdout
    assert "#   noise floor of the image log-ratio: fp32" in result.stdout
    narrow = command("train", tmp_path / "new", "--dry-run", "-s", "loss.image_clip=1e-9")
    assert "clip range 1e-09 - WARNING: below 3x the fp32 floor" in narrow.stdout
    rounded = command("train", tmp_path / "new", "--dry-run", "-s", "run.precision=bf16")
    assert "clip range 0.001 - WARNING: below 3x the bf16 floor" in rounded.stdout
    (tmp_path / "resolved.toml").write_text(result.stdout)
    assert load_config(tmp_path / "resolved.toml") == tiny_config()
    assert not (tmp_path / "new").exists()
    assert command("train", tmp_path / "new", "--dry-run", "-s", "loss.preset=x").exit_code == 2


def test_flags_that_need_no_run():
    from lvrpo import __version__

    assert command("--version").stdout == f"lvrpo {__version__}\n"
    result = command("train", "--print-config")
    assert result.exit_code == 0
    assert "[warm_start]" in result.stdout
    result = command("train")
    assert result.exit_code == 2
    assert result.stderr == "lvrpo: train needs a run directory: lvrpo train RUN\n"
