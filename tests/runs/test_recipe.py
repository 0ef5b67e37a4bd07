"""The recipes of docs/data.md and docs/rewards.md, typed as they stand, of a smaller model."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from runs.tiny import OVERRIDES, command, settings

from lvrpo.runs.log import read_metrics

DOCS = Path(__file__).parents[2] / "docs"
SMALL = settings(override for override in OVERRIDES if not override.startswith("rewards."))


def block(page: str, language: str, start: str) -> str:
    """The block of a page that starts so."""
    found = re.findall(rf"^```{language}\n(.*?)^```$", (DOCS / page).read_text(), re.M | re.S)
    (text,) = [text for text in found if text.startswith(start)]
    return text


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """The current folder, with the files that the pages show."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_rewards.py").write_text(block("rewards.md", "python", "# my_rewards.py"))
    (tmp_path / "pets.toml").write_text(block("data.md", "toml", "# pets.toml"))
    shown = block("data.md", "json", "{").splitlines()
    # The unified model reads one picture, edits none, and the last line is of a digit scene.
    lines = [line for line in shown if json.loads(line).keys() & {"id", "target"}]
    assert len(lines) == 2
    (tmp_path / "pets.jsonl").write_text("\n".join(lines))
    held_out = [json.loads(line) for line in lines]
    held_out[0] |= {"prompt": "what else is in the bowl", "id": "bowl-2"}
    held_out[1] |= {"prompt": "draw a green boat"}
    (tmp_path / "held_out.jsonl").write_text("\n".join(json.dumps(row) for row in held_out))
    (tmp_path / "img").mkdir()
    for name in ("1.png", "boat.png"):
        pixels = np.random.default_rng(0).integers(0, 255, (40, 40, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / "img" / name)
    return tmp_path


def typed(page: str, start: str) -> list[str]:
    """The arguments of the command that a block of a page starts with."""
    return shlex.split(block(page, "bash", start).splitlines()[0], comments=True)[1:]


def test_own_data_with_own_rewards(folder):
    result = command(*typed("data.md", "lvrpo train runs/pets"), *SMALL)
    assert result.exit_code == 0, result.output
    last = read_metrics(folder / "runs/pets")[-1]
    assert last["reward/understand/my_rewards.py:brief"] < 0
    assert 0 < last["reward/generate/my_rewards.py:resembles"] < 1


def test_digit_scenes_with_an_own_reward(folder):
    result = command(*typed("rewards.md", "lvrpo train runs/brief"), *SMALL)
    assert result.exit_code == 0, result.output
    last = read_metrics(folder / "runs/brief")[-1]
    assert last["reward/understand/my_rewards.py:brief"] <= 0


def test_a_reward_that_has_no_score_for_this_data_is_met_before_the_start(folder):
    """As the page had it once: a reward of texts for drawings."""
    wrong = ["--set", 'rewards.generate={ "my_rewards.py:brief" = 1.0 }']
    result = command(*typed("data.md", "lvrpo train runs/pets"), *SMALL, *wrong)
    assert result.exit_code == 2
    assert "rewards.generate: no reward (my_rewards.py:brief) has a score for any" in result.output
    assert not (folder / "runs").exists()


def test_a_rule_reward_of_drawings_without_rules(folder):
    for name in ("r_ins", "r_kn"):
        alone = ["--set", f"rewards.generate={{ {name} = 1.0 }}"]
        result = command(*typed("data.md", "lvrpo train runs/pets"), *SMALL, *alone)
        assert result.exit_code == 2
        assert f"no reward ({name}) has a score for any" in result.output
        assert "need drawings with a 'rule'" in result.output
    both = ["--set", 'rewards.generate={ r_kn = 1.0, "my_rewards.py:resembles" = 1.0 }']
    result = command(*typed("data.md", "lvrpo train runs/pets"), *SMALL, *both)
    assert result.exit_code == 0, result.output
    assert "WARNING: r_kn has no score for 1 of 1 drawing prompts" in result.output
