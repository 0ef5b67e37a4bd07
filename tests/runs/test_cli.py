"""Every command, run as a user runs it."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import pytest
from PIL import Image
from runs.tiny import OVERRIDES, command

from lvrpo.runs.config_file import load_config


@pytest.mark.parametrize("name", ["train", "eval", "sample", "report"])
def test_help_has_an_example(name):
    result = command(name, "--help")
    assert result.exit_code == 0
    assert f"lvrpo {name} runs/digits" in result.stdout


def test_help_of_the_whole_lists_every_command():
    result = command("--help")
    for name in ("train", "eval", "sample", "report", "info"):
        assert f"\n  {name} " in result.stdout


def test_module_runs_as_a_command():
    result = subprocess.run([sys.executable, "-m", "lvrpo", "info"], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "gather_logprobs" in result.stdout


def test_printed_config_is_the_one_that_would_run(tmp_path):
    result = command("train", tmp_path / "run", "--print-config", "--seed", 3, tiny=True)
    assert result.exit_code == 0
    (tmp_path / "printed.toml").write_text(result.stdout)
    assert load_config(tmp_path / "printed.toml") == load_config(
        overrides=[*OVERRIDES, "run.seed=3"]
    )
    assert not (tmp_path / "run").exists()


def test_a_run_directory_says_what_it_was_made_with(trained):
    assert load_config(trained / "config.toml") == load_config(overrides=OVERRIDES)
    environment = json.loads((trained / "environment.json").read_text())
    assert environment["seed"] == 0
    assert environment["versions"]["torch"]
    assert 0.9 < environment["judge_accuracy"] <= 1
    html = (trained / "report.html").read_text()
    assert 'src="data:image/png;base64' in html
    assert "http://" not in html.replace("http://www.w3.org", "")


def test_a_finished_run_only_writes_its_report_again(trained, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    (run / "report.html").unlink()
    result = command("train", run)
    assert result.exit_code == 0
    assert (run / "report.html").exists()
    assert (run / "metrics.jsonl").read_text() == (trained / "metrics.jsonl").read_text()


def test_eval_prints_rates_with_intervals(trained):
    results = [command("eval", trained, "--items", 16, "--seed", seed) for seed in (1, 1)]
    assert [result.exit_code for result in results] == [0, 0]
    assert results[0].stdout == results[1].stdout
    assert all("  [" in line and "]  of " in line for line in results[0].stdout.splitlines())


def test_sample_draws_the_same_picture_for_the_same_seed(trained, tmp_path):
    prompt = "draw 3 at top-left and 7 at bottom-right"
    for name in ("a.png", "b.png"):
        result = command("sample", trained, prompt, "--seed", 5, "-o", tmp_path / name)
        assert result.stdout == f"{tmp_path / name}\n"
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    with Image.open(tmp_path / "a.png") as picture:
        assert (picture.size, picture.mode) == ((128, 128), "L")
    result = command("sample", trained, prompt, "-n", 2, "-o", tmp_path / "c.png")
    assert result.stdout.split() == [str(tmp_path / f"c-{i}.png") for i in (1, 2)]
    assert (tmp_path / "c-1.png").read_bytes() != (tmp_path / "c-2.png").read_bytes()


def test_sample_answers_a_question_about_a_picture_of_any_size_and_mode(trained, tmp_path):
    Image.new("RGBA", (50, 30), "white").save(tmp_path / "scene.png")
    arguments = ("what digit is at top-left", "--image", tmp_path / "scene.png", "-n", 3)
    results = [command("sample", trained, *arguments) for _ in range(2)]
    assert results[0].exit_code == 0, results[0].output
    assert len(results[0].stdout.splitlines()) == 3
    assert results[0].stdout == results[1].stdout


def test_report_compares_runs(trained, tmp_path):
    for name in ("a", "b"):
        shutil.copytree(trained, tmp_path / name)
    result = command("report", tmp_path / "a", "--compare", tmp_path / "b")
    assert result.exit_code == 0, result.output
    assert "b</" in (tmp_path / "a" / "report.html").read_text()
