"""The recipes of docs/recipes run as written, with a small folder in the place of a large one."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from integrations.tiny_folders import processor
from integrations.tiny_models import FAMILIES
from models.bagel.folder import write_folder
from models.bagel.test_tokenizer import files
from PIL import Image
from typer.testing import CliRunner

from lvrpo.cli import app
from lvrpo.runs import huggingface_family
from lvrpo.trainer import loop
from lvrpo.trainer.loop import check_ratio

pytest.importorskip("transformers")
RECIPES = Path(__file__).parents[2] / "docs" / "recipes"
#: Sizes alone: what a recipe says of data, model, rewards and loss stays.
SMALL = {
    "run.steps": 1,
    "run.eval_items": 2,
    "rollout.group_size": 2,
    "rollout.understand_prompts": 2,
    "rollout.max_answer_tokens": 3,
}


def blocks(recipe: str, language: str) -> str:
    text = (RECIPES / f"{recipe}.md").read_text()
    return "".join(re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL))


def qwen(folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    pytest.importorskip("peft")
    torch.manual_seed(0)
    FAMILIES["qwen2_5_vl"].model().save_pretrained(folder / "model")
    # A folder has a processor of videos, too, which needs torchvision.
    made = processor("qwen2_5_vl")
    monkeypatch.setattr(huggingface_family, "load_processor", lambda path: made)
    return [f"model.path={folder / 'model'}"]


def bagel(folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    write_folder(folder / "model", vocab_size=264)
    for name, content in files().items():
        (folder / "model" / name).write_bytes(content)
    small = {"data.height": 8, "data.width": 12, "rollout.generate_prompts": 2}
    small |= {"rollout.denoise_steps": 4}
    return [f"model.path={folder / 'model'}", *(f"{key}={value}" for key, value in small.items())]


def write_data(folder: Path, recipe: str) -> None:
    """The lines of the recipe, with other words for every example, and pictures of noise."""
    rows: list[dict[str, Any]] = [json.loads(line) for line in blocks(recipe, "json").splitlines()]
    draw = np.random.default_rng(0)
    (folder / "img").mkdir()
    for split in ("train", "test"):
        lines = []
        for number in range(4):
            for row in rows:
                of_split = row | {"prompt": f"{row['prompt']} {split} {number}"}
                if "image" in row:
                    of_split["image"] = f"img/{split}{number}.png"
                    pixels = draw.integers(0, 256, (16, 24, 3)).astype(np.uint8)
                    Image.fromarray(pixels).save(folder / of_split["image"])
                lines.append(json.dumps(of_split))
        (folder / f"{split}.jsonl").write_text("\n".join(lines))


@pytest.mark.parametrize(
    ("recipe", "model", "kinds"),
    [("qwen-vl", qwen, ["text"]), ("bagel", bagel, ["text", "image"])],
)
def test_a_recipe_trains(recipe, model, kinds, tmp_path, monkeypatch):
    """And its first update replays the rollout, within the tolerance that runs hold it to."""
    first_updates: list[dict[str, Any]] = []
    monkeypatch.setattr(loop, "check_ratio", lambda found, *_: first_updates.append(found))
    write_data(tmp_path, recipe)
    (tmp_path / "rewards.py").write_text(blocks(recipe, "python"))
    (tmp_path / "recipe.toml").write_text(blocks(recipe, "toml"))
    overrides = [*model(tmp_path, monkeypatch), *(f"{key}={value}" for key, value in SMALL.items())]
    sets = [word for override in overrides for word in ("--set", override)]
    run = tmp_path / "run"
    arguments = ["train", str(run), "--config", str(tmp_path / "recipe.toml"), "--no-report", *sets]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    (step,) = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    assert step["phase"] == "grpo"
    (first,) = first_updates
    ratios = {key for key in first if key.startswith("ratio/") and key.endswith(("/min", "/max"))}
    assert ratios == {f"ratio/{kind}/{end}" for kind in kinds for end in ("min", "max")}
    check_ratio(first)
    commands = re.findall(r"^lvrpo (\w+)", blocks(recipe, "bash"), re.MULTILINE)
    assert {"train"} <= set(commands) <= {"train", "eval", "plan"}
