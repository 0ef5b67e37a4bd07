"""The vision-language model of real parts, with small random ones in their place, as it is made."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from integrations.tiny_folders import tokenizer
from integrations.tiny_models import FAMILIES, transformers
from PIL import Image
from sklearn.linear_model import Ridge
from sklearn.preprocessing import StandardScaler
from torch.testing import assert_close
from typer.testing import CliRunner

from lvrpo.cli import app
from lvrpo.real import efficientnet, photos
from lvrpo.real.fashion_mnist import Photos

SMALL = {
    "run.steps": 1,
    "run.eval_items": 4,
    "rollout.group_size": 2,
    "rollout.understand_prompts": 2,
}


def noise(count: int, seed: int) -> Photos:
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 256, (count, 28, 28), np.uint8)
    return Photos(images, rng.integers(0, 10, count))


def random_eye():
    torch.manual_seed(0)
    eye = transformers.EfficientNetForImageClassification(efficientnet.config()).eval()
    for module in eye.modules():  # as random as it begins, all that it sees is alike
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.ones_(module.weight)
        elif isinstance(module, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(module.weight)
    return eye


@pytest.fixture
def parts(monkeypatch):
    """Text model, tokenizer and eye, whose words and picture token are those of tiny models."""
    monkeypatch.setattr(photos, "IMAGE_TOKEN", "<image>")
    monkeypatch.setattr(photos, "WORDS", tuple(f"w{20 + number}" for number in range(10)))
    return FAMILIES["llama"].model(), tokenizer(), random_eye()


def test_a_picture_becomes_what_ridge_regression_says_of_it(parts):
    text, tokens, eye = parts
    fitted, other = noise(40, 0), noise(3, 1)
    model, processor = photos.assemble(text, tokens, eye, fitted)
    x, z = (photos.see(eye.efficientnet, each).double().flatten(0, 1) for each in (fitted, other))
    scaler = StandardScaler().fit(x)
    scaler.scale_ = x.std(0).numpy() + 1e-3
    words = text.get_input_embeddings().weight.detach()[20 + torch.from_numpy(fitted.labels)]
    peer = Ridge(photos.RIDGE).fit(scaler.transform(x), words.repeat_interleave(4, 0).double())
    expected = torch.from_numpy(peer.predict(scaler.transform(z))).reshape(3, 4, -1).float()
    shown = efficientnet.pixels(torch.from_numpy(other.images[:, None] / np.float32(255)), 64)
    with torch.no_grad():
        found = model.get_image_features(pixel_values=shown).pooler_output
    assert (found - expected).norm() < 1e-4 * expected.norm()
    images = [Image.fromarray(image).convert("RGB") for image in other.images]
    read = processor(text=["<image>"] * 3, images=images, return_tensors="pt")
    assert (read["input_ids"] == 60).sum() == 3 * 4
    # PIL keeps eight bits of what it resizes.
    assert (read["pixel_values"] - shown).abs().max() <= 1 / efficientnet.PIXEL_SCALE


def test_text_and_its_logits_are_those_of_the_text_model(parts):
    text, tokens, eye = parts
    model, _ = photos.assemble(text, tokens, eye, noise(20, 0))
    ids = torch.arange(3, 15)[None]
    with torch.no_grad():
        assert_close(model(input_ids=ids).logits, text(input_ids=ids).logits)


def test_it_trains_as_written(parts, tmp_path: Path, monkeypatch):
    text, tokens, eye = parts
    monkeypatch.setattr(efficientnet, "load", lambda: eye)
    monkeypatch.setattr(photos, "FITTED", 20)
    asked = {"train": (20, 8), "validation": (0, 4), "test": (1, 4)}
    monkeypatch.setattr(photos, "ASKED", asked)
    splits = {"train": noise(28, 0), "validation": noise(4, 1), "test": noise(5, 2)}
    photos.write(tmp_path, splits, text, tokens)
    monkeypatch.chdir(tmp_path)
    sets = [word for key, value in SMALL.items() for word in ("--set", f"{key}={value}")]
    arguments = ["train", "run", "--config", "photos.toml", "--no-report", *sets]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    (step,) = map(json.loads, Path("run/metrics.jsonl").read_text().splitlines())
    assert step["phase"] == "grpo"
    before, after = map(json.loads, Path("run/evals.jsonl").read_text().splitlines())
    assert before["understand/total"] == after["understand/total"] == 4
    assert not any("vision_tower" in path.name for path in Path("run").rglob("*"))
