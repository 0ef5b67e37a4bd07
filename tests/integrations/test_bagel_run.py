"""A published BAGEL folder as a run: answers and drawings trained, resumed, evaluated."""

from __future__ import annotations

import json
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from models.bagel.folder import write_folder
from models.bagel.test_tokenizer import files
from PIL import Image
from typer.testing import CliRunner

from lvrpo.cli import app
from lvrpo.models.bagel import load_bagel
from lvrpo.runs.checkpoint import load_newest
from lvrpo.runs.inference import load_policy

pytest.importorskip("transformers")

CONFIG = """
[run]
steps = 2
eval_items = 2
frontier_items = 0
checkpoint_every = 1

[data]
source = "train.jsonl"
eval_source = "test.jsonl"
height = 8
width = 12

[model]
family = "bagel"
path = "bagel"
frozen = ["vit_model"]
gradient_checkpointing = true

[warm_start]
steps = 1
understand_batch = 2
generate_batch = 0

[rollout]
group_size = 4
understand_prompts = 2
generate_prompts = 2
max_answer_tokens = 3
denoise_steps = 3
stochastic_steps = 2

[rewards]
understand = { exact = 1.0 }
generate = { "rewards.py:brightness" = 1.0 }
truncated = "keep"

[optimizer]
lr = 1e-3
minibatches = 1
"""


def write(folder: Path) -> Path:
    write_folder(folder / "bagel", vocab_size=264)
    for name, content in files().items():
        (folder / "bagel" / name).write_bytes(content)
    draw = np.random.default_rng(0)
    for split in ("train", "test"):
        rows: list[dict[str, Any]] = []
        for number in range(4):
            name = f"{split}{number}.png"
            size = (*draw.integers(6, 40, 2).tolist(), 3)
            Image.fromarray(draw.integers(0, 256, size).astype(np.uint8)).save(folder / name)
            question = {"task": "understand", "prompt": f"how many, {split} {number}?"}
            rows.append(question | {"image": name, "answer": str(number)})
            rows.append({"task": "generate", "prompt": f"draw {number} for {split}"})
        (folder / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "rewards.py").write_text(
        "def brightness(samples):\n    return [float(image.mean()) for image in samples.images]\n"
    )
    (folder / "run.toml").write_text(CONFIG)
    return folder / "run.toml"


def lvrpo(*arguments: Any, code: int = 0) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == code, result.output
    return result.output


@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_it_answers_and_draws_in_one_run(tmp_path, guidance):
    config, run = write(tmp_path), tmp_path / "run"
    lvrpo("train", run, "--config", config, "--set", f"rollout.guidance={guidance}")
    steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["phase"] for row in steps] == ["warm_start", "grpo", "grpo"]
    for kind in ("text", "image"):
        assert (
            abs(steps[1][f"ratio/{kind}/min"] - 1) < 1e-5 > abs(steps[1][f"ratio/{kind}/max"] - 1)
        )
    _, _, policy = load_policy(run)
    assert policy.latent_grid == (2, 3)
    newest = load_newest(run / "checkpoints")
    assert newest is not None
    begun = load_bagel(tmp_path / "bagel", dtype=torch.float32).model.state_dict()
    moved = {n for n, x in begun.items() if not torch.equal(x, newest.tensors[f"model.{n}"])}
    assert {"_moe_gen" in name for name in moved} == {True, False}
    assert not any(name.startswith("vit_model") or "pos_embed" in name for name in moved)
    lvrpo("eval", run)


@pytest.mark.parametrize("image_scale", [1.0, 1.5])
def test_it_edits(tmp_path, image_scale):
    """Rewards see the picture that was edited; `lvrpo sample --edit` draws it anew."""
    config, run = write(tmp_path), tmp_path / "run"
    for split in ("train", "test"):
        rows = [json.loads(row) for row in (tmp_path / f"{split}.jsonl").read_text().splitlines()]
        for row, shown in zip(rows[1::2], rows[::2], strict=True):
            row["image"] = shown["image"]
        (tmp_path / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "rewards.py").write_text(
        "def brightness(samples):\n"
        "    sources = [float(example.image.mean()) for example in samples.examples]\n"
        "    return [float(x.mean()) - s for x, s in zip(samples.images, sources)]\n"
    )
    scales = "rollout.guidance=4.0", f"rollout.guidance_image={image_scale}"
    lvrpo("train", run, "--config", config, *chain.from_iterable(("--set", key) for key in scales))
    steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert abs(steps[1]["ratio/image/max"] - 1) < 1e-5
    image, output = tmp_path / "test0.png", tmp_path / "edited.png"
    lvrpo("sample", run, "make it red", "--image", image, "--edit", "-o", output)
    with Image.open(output) as picture:
        assert picture.mode == "RGB"
    assert "expected the one to be edited as --image" in lvrpo("sample", run, "x", "--edit", code=2)


@pytest.mark.parametrize(
    ("override", "match"),
    [
        ('model.path="nowhere"', "nowhere', where there is no folder, expected that of a model"),
        ('model.path="."', "has no llm_config.json, expected a BAGEL folder"),
        ("model.lora_rank=2", "model.lora_rank is 2, expected 0"),
        ("warm_start.generate_batch=2", "warm_start.generate_batch is 2, expected 0"),
        ("data.width=10", "a drawing is (8, 10) pixels, expected multiples of 4"),
        ('model.frozen=["eye"]', "no parameter of Bagel is in 'eye'"),
    ],
)
def test_what_cannot_be_is_refused_before_the_run(tmp_path, override, match):
    run = tmp_path / "run"
    output = lvrpo("train", run, "--config", write(tmp_path), "--set", override, code=2)
    assert match in " ".join(output.split())
    assert not run.exists()
