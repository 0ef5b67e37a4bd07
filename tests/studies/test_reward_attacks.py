from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from runs.tiny import OVERRIDES, command, settings

from lvrpo.data.example import Example
from lvrpo.runs.inference import load_policy
from lvrpo.runs.setup import Setup
from lvrpo.studies import reward_attacks as study

REWARDS = {"r_ins", "r_sem", "r_kn"}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A tiny run with all rewards of drawings; read only."""
    directory = tmp_path_factory.mktemp("trained") / "run"
    overrides = [each for each in OVERRIDES if not each.startswith("rewards.")]
    result = command("train", directory, *settings(overrides), "--no-report")
    assert result.exit_code == 0, result.output
    return directory


@pytest.fixture(autouse=True)
def few_queries(monkeypatch):
    monkeypatch.setattr(study, "_QUERIES", 2)
    monkeypatch.setattr(study, "_STEPS", 2)
    monkeypatch.setattr(study, "_SEARCHED", 3)


def attacks(run, *arguments):
    result = command("study", "reward-attacks", run, *arguments)
    assert result.exit_code == 0, result.output
    return result


def test_each_reward_meets_each_attack_and_the_table_says_what_the_file_says(trained, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    result = attacks(run, "--items", 5, "--seed", 3)
    written = json.loads((run / "studies" / "reward-attacks.json").read_text())
    assert (written["items"], written["seed"]) == (5, 3)
    rows = {row["name"]: row for row in written["attacks"]}
    assert len(rows) == len(written["attacks"])
    kinds = ("search for r_ins", "search for r_sem", "search for r_kn", "ascent of r_sem")
    assert all(f"{kind} from blank" in rows for kind in kinds)
    assert {"grey 0.5", "noise", "a digit too many"} <= set(rows)
    right = rows["right drawing"]
    for reward in right["rewards"].values():
        assert (reward["mean"], reward["wins"]) == (reward["right"], 0)
    for name, row in rows.items():
        assert set(row["rewards"]) == REWARDS
        assert row["count"] == (3 if name.startswith("search") else row["count"]) <= 5
        (line,) = (line for line in result.stdout.splitlines() if line.startswith(f"{name}  "))
        assert f"{row['rewards']['r_sem']['mean']:.3f}" in line
        assert f"{row['rewards']['r_sem']['wins']:.1%}" in line
    assert result.stdout.splitlines()[-1] == f"study: {run / 'studies' / 'reward-attacks.json'}"


def test_the_documented_table_has_the_rows_of_the_command(trained, tmp_path):
    attacks(trained, "--items", 12, "--output", tmp_path / "found.json")
    found = json.loads((tmp_path / "found.json").read_text())
    page = (Path(__file__).parents[2] / "docs" / "rewards.md").read_text(encoding="utf-8")
    table = page[page.index("| drawing | prompts |") :].partition("\n\n")[0].splitlines()
    documented = {line.split(" | ")[0].removeprefix("| ") for line in table[2:]}
    assert documented == {attack["name"] for attack in found["attacks"]}


def test_the_same_seed_attacks_alike_and_leaves_the_run_alone(trained, tmp_path):
    before = sorted(path for path in trained.rglob("*"))
    found = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        attacks(trained, "--items", 4, "--seed", seed, "--output", tmp_path / name)
        found.append((tmp_path / name).read_text())
    assert found[0] == found[1] != found[2]
    assert sorted(path for path in trained.rglob("*")) == before


def test_a_win_is_a_score_above_that_of_the_right_drawing_of_the_same_prompt():
    compared = study._compared(
        torch.tensor([0.1, 0.5, 0.9, torch.nan]), torch.tensor([0.2, 0.5, 0.3, 0.1])
    )
    assert compared == study.RewardUnderAttack(
        pytest.approx(0.5), pytest.approx(1 / 3), pytest.approx(1 / 3), 3
    )
    nothing = study._compared(torch.tensor([torch.nan]), torch.tensor([0.5]))
    assert nothing == study.RewardUnderAttack(None, None, None, 0)


def test_wrong_input_is_one_line(trained, tmp_path):
    early = tmp_path / "early"
    shutil.copytree(trained, early)
    shutil.rmtree(early / "reference")
    for arguments, said in (
        ((tmp_path / "none",), "is not a run"),
        ((early,), "has not finished its warm start"),
        ((trained, "--output", tmp_path / "no" / "a.json"), "no folder"),
    ):
        result = command("study", "reward-attacks", *arguments)
        assert result.exit_code == 2
        (line,) = result.stderr.splitlines()
        assert said in line
    assert command("study", "reward-attacks", trained, "--items", 0).exit_code == 2


def test_a_run_that_draws_nothing_and_prompts_without_a_target_are_refused(trained, monkeypatch):
    setup, parts, _ = load_policy(trained)
    source = type(setup.task(parts).source)
    monkeypatch.setattr(source, "examples", lambda *_: [Example("generate", "g", "draw 3")])
    with pytest.raises(ValueError, match="has a target to compare with"):
        study.reward_attacks(trained, items=4, seed=0)
    monkeypatch.setattr(Setup, "make_rewards", lambda *_: {"understand": {}})
    with pytest.raises(RuntimeError, match="no rewards of drawings"):
        study.reward_attacks(trained, items=4, seed=0)
