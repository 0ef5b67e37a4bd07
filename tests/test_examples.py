"""The examples run, at a size at which rewards rise in seconds, and download nothing."""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from typer.testing import CliRunner

from lvrpo.cli import app
from lvrpo.data.jsonl import JsonlExamples
from lvrpo.rewards import Samples, load_reward
from lvrpo.rewards.score import score
from lvrpo.runs.gallery import load_samples
from lvrpo.runs.log import read_evals
from lvrpo.runs.scores import eval_rewards

EXAMPLES = Path(__file__).parents[1] / "examples"


def load(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """An example as a script finds itself: its folder is the first of the path."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.setitem(os.environ, "HF_HUB_OFFLINE", "1")
    spec = importlib.util.spec_from_file_location(Path(name).name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_plain_loop_needs_torch_and_lvrpo_alone(monkeypatch):
    before = set(sys.modules)
    rewards = load("plain_loop", monkeypatch).main(steps=110)
    assert not {"transformers", "trl", "datasets"} & (set(sys.modules) - before)
    assert sum(rewards[:10]) < 2
    assert sum(rewards[-10:]) > 6
    lines = (EXAMPLES / "plain_loop.py").read_text().splitlines()
    assert len(lines) <= 50


@pytest.mark.parametrize("options", [[], ["--share-prompts"]])
def test_text_in_trl(options, monkeypatch, tmp_path):
    pytest.importorskip("trl", reason="pip install 'lvrpo[trl]'")
    logged = load("trl_text", monkeypatch).main(
        ["--tiny", "--steps", "12", "--output", str(tmp_path), *options]
    )
    rewards = [float(entry["reward"]) for entry in logged]
    assert len(rewards) == 12
    assert sum(rewards[-3:]) > sum(rewards[:3]) + 0.3


def test_vision_in_trl(monkeypatch, tmp_path):
    pytest.importorskip("trl", reason="pip install 'lvrpo[trl]'")
    logged = load("trl_vision", monkeypatch).main(
        ["--tiny", "--steps", "12", "--output", str(tmp_path)]
    )
    rewards = [float(entry["reward"]) for entry in logged]
    assert len(rewards) == 12
    assert sum(rewards[-3:]) > sum(rewards[:3]) + 0.1


#: Sizes alone: what the example says of data and rewards stays.
SMALL = {
    "run.steps": 2,
    "run.eval_every": 1,
    "run.gallery_every": 1,
    "warm_start.steps": 3,
    "model.hidden": 16,
    "model.layers": 1,
    "model.heads": 2,
    "model.mlp": 16,
    "rollout.group_size": 4,
    "rollout.denoise_steps": 4,
    "rollout.stochastic_steps": 2,
}


def test_own_data_by_its_commands_as_they_are_written(monkeypatch, tmp_path):
    folder = tmp_path / "own-data"
    shutil.copytree(EXAMPLES / "own-data", folder)
    monkeypatch.chdir(folder)
    (block,) = re.findall(r"```bash\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    sets = [word for key, value in SMALL.items() for word in ("--set", f"{key}={value}")]
    commands = [shlex.split(line, comments=True) for line in block.splitlines()]
    assert [words[:2] for words in commands[:2]] == [["python", "make_data.py"], ["lvrpo", "train"]]
    for program, *arguments in commands:
        if program == "python":
            subprocess.run([sys.executable, *arguments], check=True)
            continue
        more = sets if arguments[0] == "train" else []
        result = CliRunner().invoke(app, [*arguments, *more])
        assert result.exit_code == 0, result.output
    run = folder / "runs" / "shapes"
    rows = read_evals(run)
    assert [row["label"] for row in rows] == ["warm start", "step 4", "after"]
    for row in rows:
        assert set(eval_rewards(row)) == {
            ("understand", "normalized"),
            ("generate", "rewards.py:colour"),
        }
    assert list(load_samples(run)) == [4, 5]
    assert "Samples of training" in (run / "report.html").read_text()
    assert (folder / "disc.png").is_file()


def test_either_of_several_right_answers_is_right_in_own_data(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    load("own-data/make_data", monkeypatch).main(tmp_path)
    examples = JsonlExamples(tmp_path / "train.jsonl", (3, 24, 24))
    gray = next(example for example in examples if example.answers == ("gray", "grey"))
    samples = Samples.of_texts([gray] * 3, ["gray", "Grey.", "red"])
    assert score([load_reward("normalized")], samples).flatten().tolist() == [1, 1, 0]
    drawing = next(example for example in examples if example.extra.get("wanted") == "red")
    red, white = torch.zeros(3, 24, 24), torch.ones(3, 24, 24)
    red[0] = 1
    drawn = Samples.of_images([drawing] * 2, torch.stack([red, white]))
    reward = load_reward(f"{EXAMPLES / 'own-data' / 'rewards.py'}:colour")
    right, wrong = score([reward], drawn).flatten().tolist()
    assert right > 0.99 > wrong
