"""A run is used from its directory alone, and goes on with what it began with or says how not."""

from __future__ import annotations

import json
import os
import random
import shutil
from pathlib import Path

import pytest
from runs.own_data import write_own_data
from runs.test_resume import assert_same_run
from runs.tiny import OVERRIDES, command, settings

from lvrpo.runs.checkpoint import checkpoints
from lvrpo.runs.config_file import load_config
from lvrpo.runs.log import read_changes, read_metrics

SHORT = [*OVERRIDES, "run.eval_items=2", "run.keep_checkpoints=9"]


@pytest.fixture(scope="module")
def own(tmp_path_factory) -> Path:
    """data/ with a user's files, run/ trained on them; read only."""
    folder = tmp_path_factory.mktemp("own")
    (folder / "data").mkdir()
    overrides = settings([*SHORT, *write_own_data(folder / "data")])
    result = command("train", folder / "run", "--no-report", *overrides)
    assert result.exit_code == 0, result.output
    return folder


@pytest.fixture
def copy(own, tmp_path) -> Path:
    """The same, to spoil: its configuration names the files of the copy."""
    folder = Path(shutil.copytree(own, tmp_path / "copy"))
    for name in ("config.toml", "inputs.json"):
        path = folder / "run" / name
        path.write_text(path.read_text().replace(str(own), str(folder)))
    return folder


def answers(run: Path, data: Path) -> list[str]:
    """What a run says: sampled answers, a drawing, and its score on a file."""
    image = data / "test-q0.png"
    said = command("sample", run, "is it dark or light", "--image", image, "-n", 8)
    drawn = command("sample", run, "draw a dark square", "-o", run.parent / "drawing.png")
    scored = command("eval", run, "--data", data / "test.jsonl", "--items", 3)
    for result in (said, drawn, scored):
        assert result.exit_code == 0, result.output
    picture = (run.parent / "drawing.png").read_bytes().hex()
    (run.parent / "drawing.png").unlink()
    # Means of rewards need the code of the rewards; all else is in the run.
    rates = [line for line in scored.stdout.splitlines() if "reward" not in line]
    assert rates
    return [said.stdout, picture, *rates]


def edit(path: Path, kind: str) -> None:
    lines = path.read_text().splitlines()
    if kind == "permute":
        random.Random(0).shuffle(lines)
    elif kind == "append":
        lines += [
            json.dumps({"task": "generate", "prompt": f"light owl owl {i}"}) for i in range(9)
        ]
    elif kind == "edit":
        lines = [line.replace("dark", "murky") for line in lines]
    elif kind == "truncate":
        lines = lines[:2]
    path.unlink()
    if kind != "delete":
        path.write_text("\n".join(lines) + "\n")


EDITS = ("permute", "append", "edit", "truncate", "delete")


@pytest.mark.parametrize("kind", EDITS)
def test_what_becomes_of_the_training_file_changes_nothing_that_a_run_says(own, copy, kind):
    expected = answers(own / "run", own / "data")
    edit(copy / "data" / "train.jsonl", kind)
    (copy / "data" / "reward.py").unlink()
    assert answers(copy / "run", own / "data") == expected


def test_a_run_that_was_moved_and_is_used_from_elsewhere(own, copy, tmp_path, monkeypatch):
    expected = answers(own / "run", own / "data")
    (tmp_path / "elsewhere").mkdir()
    moved = Path(shutil.move(copy / "run", tmp_path / "moved"))
    shutil.rmtree(copy / "data")
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert answers(Path("..") / moved.name, own / "data") == expected


@pytest.mark.parametrize("kind", ["permute", "append", "edit", "truncate"])
def test_going_on_with_other_data_is_refused_by_name_or_recorded(copy, kind):
    run, path = copy / "run", copy / "data" / "train.jsonl"
    vocabulary = json.loads((checkpoints(run / "task")[0] / "state.json").read_text())
    edit(path, kind)
    result = command("train", run, "--steps", 4, "--no-report")
    assert result.exit_code == 2
    assert f"data.source: {path} is not what it was" in result.stderr
    assert "--accept-changes" in result.stderr
    assert load_config(run / "config.toml").run.steps == 3
    assert not read_changes(run)
    result = command("train", run, "--steps", 4, "--no-report", "--accept-changes")
    assert result.exit_code == 0, result.output
    changed = {row["key"]: row for row in read_changes(run)}
    assert changed.keys() == {"run.steps", "data.source"}
    assert changed["data.source"]["step"] == 6
    # Accepted once, it is what the run goes on with; the words are still those of the weights.
    assert command("train", run, "--no-report").exit_code == 0
    assert len(read_changes(run)) == 2
    assert vocabulary == json.loads((checkpoints(run / "task")[0] / "state.json").read_text())


def test_a_picture_that_changed_is_named(copy):
    picture = copy / "data" / "train-q2.png"
    stamp = picture.stat()
    shutil.copy(copy / "data" / "train-q3.png", picture)
    os.utime(picture, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    result = command("train", copy / "run", "--steps", 4)
    assert result.exit_code == 2
    assert "data.source: 1 pictures that" in result.stderr
    assert "train-q2.png for one" in result.stderr


def test_reward_code_that_changed_is_named(copy):
    reward = copy / "data" / "reward.py"
    reward.write_text(reward.read_text() + "\n# faster\n")
    result = command("train", copy / "run", "--steps", 4)
    assert result.exit_code == 2
    assert f"reward reward.py:brightness: the code in {reward} is not what it was" in result.stderr


def test_data_that_moved_goes_on_by_its_new_path(copy):
    moved = Path(shutil.move(copy / "data", copy / "moved"))
    (copy / "data").mkdir()
    shutil.copy(moved / "reward.py", copy / "data")
    arguments = (
        "-s",
        f"data.source={moved}/train.jsonl",
        "-s",
        f"data.eval_source={moved}/test.jsonl",
    )
    result = command("train", copy / "run", "--no-report", *arguments)
    assert result.exit_code == 0, result.output
    assert load_config(copy / "run" / "config.toml").data.source == f"{moved}/train.jsonl"


def test_paths_of_a_file_are_relative_to_it(tmp_path, monkeypatch):
    (tmp_path / "conf").mkdir()
    (tmp_path / "conf" / "mine.toml").write_text(
        "[data]\nsource = 'mine.jsonl'\n[rewards]\ngenerate = { 'mine.py:f' = 1.0 }\n"
    )
    monkeypatch.chdir(tmp_path)
    config = load_config(Path("conf/mine.toml"), ["data.eval_source=test.jsonl"])
    assert config.data.source == f"{tmp_path}/conf/mine.jsonl"
    assert config.data.eval_source == f"{tmp_path}/test.jsonl"
    assert config.rewards.generate == {f"{tmp_path}/conf/mine.py:f": 1.0}


def test_two_rewards_that_would_be_reported_as_one(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "mine.py").write_text("def f(samples): return [0.0] * len(samples)\n")
    rewards = ", ".join(f"'{tmp_path}/{name}/mine.py:f' = 1.0" for name in ("a", "b"))
    setting = f"rewards.generate={{ {rewards} }}"
    result = command("train", tmp_path / "run", *settings([*OVERRIDES, setting]))
    assert result.exit_code == 2
    assert "would both be reported as 'mine.py:f'" in result.stderr


OTHERS = {"seed": "run.seed=1", "architecture": "model.mlp=24", "patches": "model.latent_dim=8"}


@pytest.fixture(scope="module")
def others(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("others")
    for name, setting in OTHERS.items():
        arguments = settings([*OVERRIDES, "run.eval_items=2", setting])
        assert command("train", folder / name, "--no-report", *arguments).exit_code == 0
    return {name: folder / name for name in OTHERS}


@pytest.mark.parametrize("part", ["task", "reference", "checkpoints"])
@pytest.mark.parametrize("other", OTHERS)
@pytest.mark.parametrize("settled", [True, False], ids=["with checkpoints", "without"])
def test_a_foreign_part_is_refused_in_one_line(trained, others, tmp_path, part, other, settled):
    run = Path(shutil.copytree(trained, tmp_path / "run"))
    shutil.rmtree(run / part)
    shutil.copytree(others[other] / part, run / part)
    if not settled and part != "checkpoints":
        for path in checkpoints(run / "checkpoints")[-1:] if part == "reference" else ():
            shutil.rmtree(path)
        if part == "task":
            shutil.rmtree(run / "checkpoints")
    result = command("train", run, "--steps", 4, "--no-report")
    assert result.exit_code == 2, result.output
    last = result.stderr.splitlines()[-1]
    assert last.startswith(f"lvrpo: {run / part}/step-")
    assert "is foreign" in last
    assert "Traceback" not in result.output
    if part != "reference" and settled:
        result = command("eval", run, "--items", 2)
        assert result.exit_code == 2
        assert "is foreign" in result.stderr


def test_a_fork_repeats_the_policy_phase_of_its_origin_bit_for_bit(trained, tmp_path):
    result = command("train", tmp_path / "fork", "--from", trained, "--no-report")
    assert result.exit_code == 0, result.output
    assert_same_run(tmp_path / "fork", trained)
    environment = json.loads((tmp_path / "fork" / "environment.json").read_text())
    assert environment["warm_start_of"] == str(trained)


@pytest.mark.parametrize("flag", [("--shuffle-rewards",), ("-s", "optimizer.lr=1e-3")])
def test_a_fork_may_change_the_policy_phase(trained, tmp_path, flag):
    result = command("train", tmp_path / "fork", "--from", trained, "--no-report", *flag)
    assert result.exit_code == 0, result.output
    ours, theirs = read_metrics(tmp_path / "fork"), read_metrics(trained)
    assert ours[:3] == theirs[:3]
    assert ours[3]["reward/generate/r_ins"] == theirs[3]["reward/generate/r_ins"]
    assert ours[5]["grad_norm"] != theirs[5]["grad_norm"]
    # It is a run like any other: its own parts agree with each other.
    assert command("train", tmp_path / "fork", "--steps", 4, "--no-report").exit_code == 0


@pytest.mark.parametrize("setting", ["warm_start.steps=2", "model.mlp=24", "run.seed=1"])
def test_a_fork_may_not_change_what_its_warm_start_was_made_with(trained, tmp_path, setting):
    result = command("train", tmp_path / "fork", "--from", trained, "--set", setting)
    assert result.exit_code == 2
    assert setting.partition("=")[0] in result.stderr
    assert not (tmp_path / "fork").exists()


def test_a_fork_of_what_has_no_warm_start(tmp_path, trained):
    result = command("train", tmp_path / "fork", "--from", tmp_path / "absent")
    assert result.exit_code == 2
    assert f"{tmp_path / 'absent'} is not a run" in result.stderr
    run = Path(shutil.copytree(trained, tmp_path / "run"))
    shutil.rmtree(run / "reference")
    result = command("train", tmp_path / "fork", "--from", run)
    assert f"{run} has not finished its warm start" in result.stderr
    assert "already" in command("train", run, "--from", trained).stderr
