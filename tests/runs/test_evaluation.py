"""`lvrpo eval`: a run's own evaluation again, a sweep, and what contradicts itself."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from pathlib import Path

import pytest
from PIL import Image
from runs.test_bad_input import refused
from runs.tiny import command

from lvrpo.runs.evaluation import results_of
from lvrpo.runs.log import read_measurements


def evaluated(*arguments: object) -> list[dict[str, object]]:
    result = command("eval", *arguments, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_without_a_way_of_sampling_it_is_the_runs_own_evaluation(trained):
    expected = [
        dataclasses.asdict(result)
        for measurement in read_measurements(trained)
        if measurement.label == "after" and measurement.group_size == 1
        for result in results_of(measurement)
        # Rewards are measured there only where is sampled as trained.
        if not (result.measure.startswith("reward") and result.sampling != "as trained")
    ]
    found = evaluated(trained, "--items", 8)
    kept = [
        row
        for row in found
        if not (row["measure"].startswith("reward") and row["sampling"] != "as trained")
    ]

    def key(row):
        return tuple(row[name] for name in ("sampling", "skill", "measure", "kind"))

    assert sorted(map(key, kept)) == sorted(map(key, expected))
    for ours, theirs in zip(sorted(kept, key=key), sorted(expected, key=key), strict=True):
        for name in ("value", "low", "high", "prompts", "samples"):
            value = math.nan if ours[name] is None else ours[name]
            assert value == pytest.approx(theirs[name], abs=1e-5, nan_ok=True), key(ours)
    assert {row["sampling"] for row in found} == {"greedy", "ode noise 0", "as trained"}


def test_a_line_is_a_number_with_its_interval(trained):
    arguments = [trained, "--items", 6, "--pass-at", 2]
    lines = command("eval", *arguments).stdout.splitlines()
    rows = evaluated(*arguments)
    assert len(lines) == len(rows)
    for line, row in zip(lines, rows, strict=True):
        assert line.startswith(row["sampling"])
        assert f" {row['skill']} " in line
        assert f" {row['measure']} " in line
        shown = "{:.4g}" if row["measure"].startswith("reward") else "{:.1%}"
        low, high = (math.nan if row[end] is None else row[end] for end in ("low", "high"))
        assert f"{shown.format(row['value'])}  [{shown.format(low)}, {shown.format(high)}]" in line
        assert f"of {row['prompts']}" in line
        assert low <= row["value"] <= high or math.isnan(low)


def test_a_sweep_measures_what_it_names_and_nothing_else(trained):
    sweep = ["--temperature", 0, "--temperature", 0.5, "--noise", 0, "--noise", 0.5, "--noise", 1]
    rows = evaluated(trained, "--items", 5, "--pass-at", 3, *sweep)
    modes = {"greedy", "ode noise 0"}
    names = ["greedy", "temperature 0.5", "ode noise 0", "ode noise 0.5", "ode"]
    assert list(dict.fromkeys(row["sampling"] for row in rows)) == names
    for name in names:
        its = {row["measure"]: row for row in rows if row["sampling"] == name and not row["kind"]}
        right = its["right"]
        assert right["samples"] == right["prompts"] * (1 if name in modes else 3)
        assert ("pass@3" in its) == ("best@3" in its) == (name not in modes)
        if name not in modes:
            assert its["pass@3"]["value"] >= max(right["value"], its["best@3"]["value"]) - 1e-9
    assert {row["skill"] for row in evaluated(trained, "--items", 4, "--ode")} == {"generate"}
    assert {row["sampling"] for row in evaluated(trained, "--items", 4, "--greedy")} == {"greedy"}


def test_a_way_of_its_own_is_named_by_its_keys(trained):
    """And is what the same temperature gives where nothing is cut."""
    own = ["--set", "eval.temperature=0.5", "--set", "eval.guidance=2"]
    rows = evaluated(trained, "--items", 6, *own)
    configured = [row for row in rows if row["sampling"] == "as configured"]
    assert {row["skill"] for row in configured} == {"understand", "generate"}

    def right(rows):
        return {
            row["kind"]: (row["value"], row["prompts"])
            for row in rows
            if row["skill"] == "understand" and row["measure"] == "right"
        }

    assert right(configured) == right(evaluated(trained, "--items", 6, "--temperature", 0.5))
    for wrong, message in {
        "rollout.top_p=0.5": "--set rollout. is of a run, expected keys of [eval] alone",
        "eval.top_k=3": "eval.top_k is 3, expected 0 where eval.temperature is 0",
        "eval.topk=3": "unknown key eval.topk",
    }.items():
        result = command("eval", trained, "--set", wrong)
        assert result.exit_code == 2
        assert message in result.output


def test_splits_have_prompts_of_their_own_and_seeds_the_same(trained):
    def means(*arguments):
        rows = evaluated(trained, "--items", 64, "--ode", *arguments)
        return {row["measure"]: row["value"] for row in rows}

    assert means() == means("--split", "test")
    assert means() != means("--split", "validation")
    assert means() != means("--seed", 1)


CONTRADICTIONS = {
    "greedy, and a temperature": (["--greedy", "--temperature", 1], "--greedy is --temperature 0"),
    "a negative temperature": (["--temperature", -1], "--temperature is -1, expected 0"),
    "no temperature": (["--temperature", "nan"], "--temperature is nan, expected 0"),
    "an overflowing temperature": (["--temperature", 1e-300], "--temperature is 1e-300, expected"),
    "negative noise": (["--noise", -0.5], "--noise is -0.5, expected"),
    "endless noise": (["--noise", "inf"], "--noise is inf, expected"),
    "one sample to choose from": (["--pass-at", 1], "--pass-at is 1, expected 2"),
    "equal answers to choose from": (["--greedy", "--pass-at", 4], "are all equal, expected"),
    "equal drawings to choose from": (["--noise", 0, "--pass-at", 4], "are all equal, expected"),
    "a split to train on": (["--split", "train"], "--split is 'train', expected 'validation'"),
    "a split of a file": (["--data", "x.jsonl", "--split", "validation"], "has one split"),
}


@pytest.mark.parametrize(
    ("arguments", "message"), CONTRADICTIONS.values(), ids=CONTRADICTIONS.keys()
)
def test_what_contradicts_itself_is_refused_before_the_run_is_looked_at(
    tmp_path, arguments, message
):
    assert message in refused("eval", tmp_path / "absent", *arguments)


@pytest.mark.parametrize(
    ("task", "option", "message"),
    [
        ("understand", ["--noise", 0.5], "no prompt for --noise and --ode, expected a request"),
        ("understand", ["--ode"], "no prompt for --noise and --ode, expected a request"),
        ("generate", ["--greedy"], "no prompt for --temperature and --greedy, expected a question"),
    ],
)
def test_a_way_of_sampling_that_there_is_no_prompt_for_is_refused(
    trained, tmp_path, task, option, message
):
    Image.new("L", (16, 16)).save(tmp_path / "a.png")
    rows = {
        "understand": {"prompt": "what digit is at top-left", "image": "a.png", "answer": "3"},
        "generate": {"prompt": "draw 3 at top-left"},
    }
    path = tmp_path / "mine.jsonl"
    path.write_text(json.dumps({"task": task, **rows[task]}))
    assert f"{path} has {message}" in refused("eval", trained, "--data", path, *option)


def test_eval_says_that_a_file_is_of_other_things(trained, tmp_path):
    Image.new("L", (16, 16)).save(tmp_path / "boat.png")
    row = {"task": "understand", "prompt": "name this boat", "image": "boat.png", "answer": "sloop"}
    (tmp_path / "boats.jsonl").write_text(json.dumps(row))
    result = command("eval", trained, "--data", tmp_path / "boats.jsonl")
    assert result.exit_code == 0, result.output
    assert result.stderr.startswith("lvrpo: note: 100% of the words of ")
    assert "('name', 'this', 'boat', 'sloop')" in result.stderr
    assert "0.0%" in result.stdout
    row |= {"prompt": "what digit is at top-left", "answer": "3"}
    (tmp_path / "digits.jsonl").write_text(json.dumps(row))
    assert command("eval", trained, "--data", tmp_path / "digits.jsonl").stderr == ""


def test_an_evaluation_in_the_warm_start_has_no_rewards_and_says_so(trained, tmp_path):
    run = Path(shutil.copytree(trained, tmp_path / "run"))
    shutil.rmtree(run / "reference")
    result = command("eval", run, "--items", 8)
    assert result.exit_code == 0, result.output
    assert "rewards are not measured yet" in result.stderr
    assert "reward/" not in result.stdout
