"""The vision-language model of real parts: the map between them, and what it learns from."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.linear_model import Ridge
from sklearn.preprocessing import StandardScaler
from torch.testing import assert_close

from lvrpo.data.jsonl import JsonlExamples
from lvrpo.real import photos
from lvrpo.real.fashion_mnist import CLASSES, Photos
from lvrpo.rewards.registry import find_reward
from lvrpo.rewards.reward import Samples
from lvrpo.runs.config_file import load_config


def noise(count: int) -> Photos:
    rng = np.random.default_rng(0)
    return Photos(rng.integers(0, 256, (count, 28, 28), np.uint8), np.arange(count) % len(CLASSES))


def test_the_map_is_that_of_ridge_regression_of_scaled_features():
    generator = torch.Generator().manual_seed(0)
    inputs, targets = (torch.rand(60, size, generator=generator) for size in (12, 5))
    weight, bias = photos.ridge(inputs, targets, 7.0)
    scaler = StandardScaler().fit(inputs.double())
    scaler.scale_ = inputs.double().std(0).numpy() + 1e-3
    peer = Ridge(7.0).fit(scaler.transform(inputs.double()), targets.double())
    expected = torch.from_numpy(peer.predict(scaler.transform(inputs.double())))
    assert_close(inputs @ weight.T + bias, expected.float())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("photos")
    splits = {"train": noise(12), "validation": noise(3), "test": noise(5)}
    photos.write_questions(out, splits)
    return out


def test_every_photo_is_a_question_with_the_word_of_its_class(folder):
    for split, count in (("train", 12), ("validation", 3), ("test", 5)):
        rows = [json.loads(line) for line in (folder / f"photos/{split}.jsonl").open()]
        examples = JsonlExamples(folder / f"photos/{split}.jsonl", (1, 28, 28))
        assert len(rows) == len(examples) == count
        for example, image, label in zip(examples, *vars(noise(count)).values(), strict=True):
            np.testing.assert_array_equal(np.round(example.image[0] * 255), image)
            assert example.answer.strip() == photos.WORDS[label]
            assert example.kind == photos.WORDS[label]


@pytest.mark.parametrize(
    ("text", "right"),
    [(" boot", 1), (" boot\n", 1), ("boot.", 1), (" boots", 0), (" bo", 0), (" a boot", 0)],
)
def test_the_word_that_a_text_begins_with_is_what_counts(folder, text, right):
    config = load_config(folder / "photos.toml")
    (name,) = config.rewards.understand
    assert config.rewards.right == {"understand": name}
    reward = find_reward(name, config.rewards.arguments[name]).make()
    examples = JsonlExamples(folder / "photos/train.jsonl", (1, 28, 28))
    (boot,) = (example for example in examples if example.kind == "boot")
    assert list(reward(Samples.of_texts([boot], [text]))) == [right]
