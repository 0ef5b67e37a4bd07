"""A folder of transformers as a run: trained, stopped, resumed, evaluated, asked."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from integrations.tiny_folders import processor
from integrations.tiny_models import FAMILIES
from PIL import Image
from typer.testing import CliRunner

from lvrpo.cli import app
from lvrpo.runs.checkpoint import load_newest
from lvrpo.runs.config_file import load_config
from lvrpo.runs.inference import load_policy
from lvrpo.runs.setup import Setup

STEPS, WARM = 2, 2
CONFIG = """
[run]
steps = {steps}
eval_items = 4
frontier_items = 0
checkpoint_every = 1

[data]
source = "train.jsonl"
eval_source = "test.jsonl"

[model]
family = "huggingface"
path = "model"
{model}

[warm_start]
steps = {warm}
understand_batch = 2
generate_batch = 0

[rollout]
group_size = 4
understand_prompts = 2
generate_prompts = 0
max_answer_tokens = 3

[rewards]
understand = {{ exact = 1.0 }}
truncated = "keep"

[optimizer]
lr = 1e-3
minibatches = 1
"""


def write(folder: Path, name: str = "llama", model: str = "", warm: int = WARM) -> Path:
    """A folder with a model, questions, and a configuration that is all relative to it."""
    torch.manual_seed(0)
    for part in (FAMILIES[name].model(), processor(name)):
        part.save_pretrained(folder / "model")
    draw = np.random.default_rng(0)
    for split, first in (("train", 20), ("test", 30)):
        rows = []
        for number in range(first, first + 6):
            row = {"task": "understand", "prompt": f"w{number} w7", "answer": f"w{number}"}
            if FAMILIES[name].image_tokens:
                row["image"] = f"{split}{number}.png"
                size = (int(draw.integers(8, 40)), 16, 3)
                pixels = draw.integers(0, 256, size).astype(np.uint8)
                Image.fromarray(pixels).save(folder / row["image"])
            rows.append(json.dumps(row))
        (folder / f"{split}.jsonl").write_text("\n".join(rows))
    config = folder / "run.toml"
    config.write_text(CONFIG.format(steps=STEPS, warm=warm, model=model))
    return config


def lvrpo(*arguments: Any, code: int = 0) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == code, result.output
    return result.output


def weights(run: Path) -> dict[str, torch.Tensor]:
    newest = load_newest(run / "checkpoints")
    assert newest is not None
    return dict(newest.tensors)


def rows(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("warm", [0, WARM])
def test_text_questions_are_trained_on_and_measured(tmp_path, warm):
    run = tmp_path / "run"
    lvrpo("train", run, "--config", write(tmp_path, warm=warm))
    steps = rows(run)
    assert [row["phase"] for row in steps] == ["warm_start"] * warm + ["grpo"] * STEPS
    first = steps[warm]
    assert abs(first["ratio/text/min"] - 1) < 1e-5 > abs(first["ratio/text/max"] - 1)
    labels = [json.loads(line) for line in (run / "evals.jsonl").read_text().splitlines()]
    assert {row["label"] for row in labels} == {"warm start", "after"}
    assert not any("generate" in key for row in labels for key in row)
    _, _, policy = load_policy(run)
    saved = {n: x for n, x in weights(run).items() if n.startswith("model.")}
    for part in (policy.model, policy.module):
        assert saved.keys() == {f"model.{n}" for n, _ in part.named_parameters()}
    lvrpo("eval", run)
    assert len(set(lvrpo("sample", run, "w20 w7", "-n", 3, "--seed", 1).splitlines()[-3:])) > 1


def test_a_run_goes_on_bit_for_bit(tmp_path):
    config = write(tmp_path)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    lvrpo("train", whole, "--config", config)
    lvrpo("train", parts, "--config", config, "--set", "run.steps=1")
    lvrpo("train", parts, "--set", f"run.steps={STEPS}")
    # The schedule of the learning rate goes by the number of steps, so the last one differs.
    losses = [[row["loss/text"] for row in rows(run)][: WARM + 1] for run in (whole, parts)]
    assert losses[0] == losses[1]
    assert weights(parts).keys() == weights(whole).keys()


def test_a_lora_is_all_that_is_saved(tmp_path):
    pytest.importorskip("peft", reason="pip install peft")
    run = tmp_path / "run"
    lvrpo("train", run, "--config", write(tmp_path, model="lora_rank = 2", warm=0))
    names = [n for n in weights(run) if n.startswith("model.")]
    assert names
    assert all("lora_" in n for n in names)


def test_a_policy_and_its_reference_share_what_is_frozen(tmp_path):
    config = load_config(write(tmp_path, model='frozen = ["model.layers.0"]'))
    setup = Setup(config)
    policy, reference = (setup.new_policy(setup.unfitted_parts()) for _ in range(2))
    ours, theirs = (dict(each.model.named_parameters()) for each in (policy, reference))
    trained = dict(policy.module.named_parameters()).keys()
    assert trained
    assert trained != ours.keys()
    for name, parameter in ours.items():
        assert torch.equal(parameter, theirs[name])
        assert (parameter is theirs[name]) == (name not in trained)


def test_pictures_keep_their_size(tmp_path):
    """It is the processor that they are resized by."""
    run = tmp_path / "run"
    model = 'frozen = ["model.vision_tower"]\ngradient_checkpointing = true'
    lvrpo("train", run, "--config", write(tmp_path, "llava", model=model))
    setup, _, policy = load_policy(run)
    examples = setup.data.source.examples("test", "understand", 6, 0)
    assert len({example.image.shape for example in examples}) > 1
    assert len({len(policy.reader.read(example).token_ids) for example in examples}) == 1
    names = [n for n in weights(run) if n.startswith("model.")]
    assert names
    assert not any("vision_tower" in n for n in names)


@pytest.mark.parametrize(
    ("override", "match"),
    [
        ("warm_start.generate_batch=2", "warm_start.generate_batch is 2, expected 0"),
        ('model.path="nowhere"', "nowhere', where there is no folder, expected that of a model"),
        ('model.path="."', "no config.json, expected a folder as save_pretrained"),
        ("rollout.guidance=4.0", "rollout.guidance is 4.0, expected 1: it is of drawings"),
        ("eval.guidance=4.0", "eval.guidance is 4.0, expected 1: it is of drawings"),
        ('model.frozen=["eye"]', "no parameter of LlamaForCausalLM is in 'eye'"),
        ('model.family="unified"', "expected model.family = 'huggingface' with it"),
        (
            "model.hidden=64",
            "model.hidden is 64, expected no such key where model.family is 'huggingface'",
        ),
        ('model.lora_targets=["q_proj"]', "model.lora_rank is 0, expected at least 1"),
        ("rollout.max_answer_tokens=200", "the model has positions for 128"),
    ],
)
def test_what_cannot_be_is_refused_before_the_run(tmp_path, override, match):
    run = tmp_path / "run"
    output = lvrpo("train", run, "--config", write(tmp_path), "--set", override, code=2)
    assert match in " ".join(output.split())
    assert not run.exists()


def test_a_folder_that_changed_under_a_run(tmp_path):
    run = tmp_path / "run"
    lvrpo("train", run, "--config", write(tmp_path))
    (tmp_path / "model" / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")
    output = lvrpo("train", run, "--set", "run.steps=3", code=2)
    assert "files have changed since the run began" in " ".join(output.split())


def test_a_folder_that_was_moved(tmp_path):
    """It is named again, and goes on if it is the same; nothing is written of another."""
    run, moved = tmp_path / "run", tmp_path / "moved"
    lvrpo("train", run, "--config", write(tmp_path))
    (tmp_path / "model").rename(moved)
    for command in (("train", run), ("eval", run), ("sample", run, "w20"), ("export", run, "x")):
        output = " ".join(lvrpo(*command, code=2).split())
        assert "where there is no folder" in output
        assert "`lvrpo train RUN --set model.path=FOLDER`" in output
    other = tmp_path / "other"
    shutil.copytree(moved, other)
    (other / "generation_config.json").write_text("{}")
    before = (run / "config.toml").read_bytes()
    output = lvrpo("train", run, "--set", f"model.path={other}", code=2)
    assert "files have changed since the run began" in " ".join(output.split())
    assert (run / "config.toml").read_bytes() == before
    lvrpo("train", run, "--set", f"model.path={moved}", "--set", "run.steps=3")
    assert rows(run)[-1]["step"] == WARM + 3
    lvrpo("sample", run, "w20 w7")


def test_weights_of_another_shape_are_refused_before_the_run(tmp_path):
    config = write(tmp_path)
    described = tmp_path / "model" / "config.json"
    described.write_text(json.dumps(json.loads(described.read_text()) | {"intermediate_size": 24}))
    output = lvrpo("train", tmp_path / "run", "--config", config, code=2)
    assert "of another shape: model.layers.0.mlp.down_proj.weight (32, 48), expected (32, 24)" in (
        " ".join(output.split())
    )
    assert len(output.splitlines()) == 1
    assert not (tmp_path / "run").exists()


def test_a_picture_that_is_measured_with_is_met_before_the_run(tmp_path):
    config = write(tmp_path)
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    row = {"task": "understand", "prompt": "w30 w7", "image": "a.png", "answer": "w30"}
    (tmp_path / "test.jsonl").write_text(json.dumps(row))
    output = lvrpo("train", tmp_path / "run", "--config", config, code=2)
    assert "test:1: the question has a picture, and a llama reads text alone" in output
    assert not (tmp_path / "run").exists()
