"""Drawings of clothes: what is written, whom the judge learns from, and that it all trains."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from runs.tiny import command

from lvrpo.data.jsonl import JsonlExamples
from lvrpo.real import class_names, drawings, fashion_mnist, imagenet, minilm
from lvrpo.real.fashion_mnist import Photos
from lvrpo.rewards.reward import Samples
from lvrpo.runs.log import read_evals, read_metrics

SMALL = {
    "run.steps": 1,
    "run.eval_items": 4,
    "warm_start.steps": 1,
    "warm_start.generate_batch": 2,
    "rollout.group_size": 2,
    "rollout.generate_prompts": 2,
    "rollout.denoise_steps": 4,
}


def bright(count: int, seed: int) -> Photos:
    """Photos that are told apart by the row that is lit."""
    labels = np.arange(count) % len(drawings.WORDS)
    images = np.random.default_rng(seed).integers(0, 60, (count, 28, 28), np.uint8)
    images[np.arange(count), 2 * labels + 3] = 250
    return Photos(images, labels)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    photos = {"train": bright(240, 0), "validation": bright(20, 1), "test": bright(20, 2)}
    drawn = {"train": (0, 90), "validation": (3, 9), "test": (0, 12)}
    monkeypatch.setattr(drawings, "DRAWN", drawn)
    monkeypatch.setattr(drawings, "JUDGED", slice(100, 240))
    monkeypatch.setattr(fashion_mnist, "load", lambda folder: photos)
    drawings.write(tmp_path, photos)
    return tmp_path


def test_every_photo_is_drawn_after_by_the_word_of_its_class(folder):
    for split, (first, count) in drawings.DRAWN.items():
        examples = JsonlExamples(folder / f"drawings/{split}.jsonl", (1, 28, 28))
        assert len(examples) == count
        photos = fashion_mnist.load(folder)[split][first : first + count]
        for example, image, label in zip(examples, photos.images, photos.labels, strict=True):
            np.testing.assert_array_equal(np.round(example.target[0] * 255), image)
            assert example.extra["word"] == drawings.WORDS[label]
            assert example.prompt.split()[-1] == drawings.WORDS[label].split()[-1]


def test_no_photo_is_both_drawn_after_and_the_judges():
    first, count = drawings.DRAWN["train"]
    assert first + count <= drawings.JUDGED.start


def test_the_judge_sees_the_word_that_is_asked_for_and_no_other(folder):
    judge = drawings.Judge(str(folder))
    examples = list(JsonlExamples(folder / "drawings/test.jsonl", (1, 28, 28)))
    targets = torch.stack([torch.from_numpy(example.target) for example in examples])
    assert judge(Samples.of_images(examples, targets)) == [1.0] * len(examples)
    assert judge(Samples.of_images(examples, targets.roll(1, 0))) == [0.0] * len(examples)


def test_it_trains_at_tiny_size(folder, monkeypatch):
    """As written, with other encoders."""
    seen = []

    def classifier(side, *, negative):
        assert negative
        return lambda pictures: seen.append(len(pictures)) or pictures.flatten(1)[:, :20]

    def embed(texts):
        return torch.nn.functional.one_hot(torch.tensor([len(text) for text in texts]), 99).float()

    monkeypatch.setattr(class_names, "efficientnet_classifier", classifier)
    monkeypatch.setattr(minilm, "load", lambda: embed)
    monkeypatch.setattr(imagenet, "descriptions", lambda folder: ["x" * k for k in range(20)])
    changes = [part for key, value in SMALL.items() for part in ("--set", f"{key}={value}")]
    config = folder / "drawings.toml"
    result = command("train", folder / "run", "--config", config, "--no-report", *changes)
    assert result.exit_code == 0, result.output
    before, after = read_evals(folder / "run")
    assert before["generate/total"] == after["generate/total"] == 4
    assert any("ClassNamesReward" in name for name in read_metrics(folder / "run")[-1])
    assert seen
