"""The examples run, at a size at which rewards rise in seconds, and download nothing."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


def load(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """An example as a script finds itself: its folder is the first of the path."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.setitem(os.environ, "HF_HUB_OFFLINE", "1")
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
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
