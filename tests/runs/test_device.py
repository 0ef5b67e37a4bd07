"""A run that was trained on one device is evaluated and sampled on another."""

from __future__ import annotations

import copy
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from models.other_device import Device, moved
from PIL import Image
from runs.test_bad_input import refused
from runs.tiny import command

from lvrpo.models.unified.policy import UnifiedPolicy

COMMANDS = (("eval",), ("sample", "draw 3 at top-left"), ("study", "reward-attacks"))


def arguments(asked: tuple[str, ...], run: Path, *more: object) -> tuple[object, ...]:
    """The command, with the run where it expects one."""
    where = 2 if asked[0] == "study" else 1
    return (*asked[:where], run, *asked[where:], *more)


@pytest.fixture
def on_gpu(trained, tmp_path):
    """The run, as if it had been trained on a GPU."""
    directory = tmp_path / "run"
    shutil.copytree(trained, directory)
    config = directory / "config.toml"
    text, count = re.subn(r'(?m)^device = ""$', 'device = "cuda"', config.read_text())
    assert count == 1
    config.write_text(text)
    return directory


@pytest.fixture
def placed(monkeypatch):
    """A machine with one GPU, the other device; where policies were put, in order."""
    found: list[torch.device] = []
    to = UnifiedPolicy.to

    def put(policy: UnifiedPolicy, device: torch.device) -> UnifiedPolicy:
        found.append(device)
        if device.type == "cuda":
            autoencoder = moved(copy.deepcopy(policy.autoencoder))
            return replace(policy, module=moved(policy.module), autoencoder=autoencoder)
        return to(policy, device)

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(UnifiedPolicy, "to", put)
    return found


def drawn(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path), dtype=float)


@pytest.mark.parametrize("asked", COMMANDS, ids=lambda asked: asked[-1])
def test_a_device_that_is_not_here_is_refused_before_weights_are_read(on_gpu, asked, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    for path in on_gpu.rglob("tensors.safetensors"):
        if path.parents[1].name != "task":
            path.unlink()
    said = refused(*arguments(asked, on_gpu))
    assert "run.device is 'cuda', expected a GPU that is there" in said
    assert "--device names another" in said
    said = refused(*arguments(asked, on_gpu, "--device", "gpu"))
    assert "run.device is 'gpu', expected '' or 'cpu', 'cuda' or 'cuda:N'" in said


def test_an_evaluation_is_made_where_it_is_asked_for(trained, on_gpu, placed):
    def evaluated(run: Path, *more: object) -> list[dict[str, Any]]:
        with Device():
            result = command("eval", run, "--items", 4, "--json", *more)
        assert result.exit_code == 0, result.output
        return json.loads(result.stdout)

    cpu, gpu = torch.device("cpu"), torch.device("cuda", 0)
    expected = evaluated(trained)
    for run, more, device in (
        (trained, ("--device", "cuda"), gpu),
        (on_gpu, (), gpu),
        (on_gpu, ("--device", "cpu"), cpu),
    ):
        placed.clear()
        found = evaluated(run, *more)
        assert placed == [device, device]  # the policy, and the reference that rewards ask
        assert len(found) == len(expected)
        for ours, theirs in zip(found, expected, strict=True):
            for key, value in theirs.items():
                alike = value if isinstance(value, str | None) else pytest.approx(value, 1e-4)
                assert ours[key] == alike


def test_samples_are_made_where_they_are_asked_for(trained, on_gpu, placed, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    picture = tmp_path / "scene.png"
    Image.fromarray(np.arange(32 * 32, dtype=np.uint8).reshape(32, 32)).save(picture)

    def sampled(run: Path, name: str, *more: object) -> tuple[np.ndarray, str]:
        with Device():
            drawing = command("sample", run, "draw 3 at top-left", "-o", f"{name}.png", *more)
            answer = command("sample", run, "what digit", "--image", picture, "-n", 3, *more)
        assert drawing.exit_code == answer.exit_code == 0, drawing.output + answer.output
        return drawn(tmp_path / f"{name}.png"), answer.stdout

    cpu, gpu = torch.device("cpu"), torch.device("cuda", 0)
    image, text = sampled(trained, "expected")
    for run, more, device in (
        (trained, ("--device", "cuda"), gpu),
        (on_gpu, (), gpu),
        (on_gpu, ("--device", "cpu"), cpu),
    ):
        placed.clear()
        found, said = sampled(run, f"{device.type}-{len(more)}", *more)
        assert placed == [device, device]
        assert np.abs(found - image).max() <= 1  # a level of 256
        assert said == text


def test_an_export_needs_no_device(on_gpu, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    result = command("export", on_gpu, tmp_path / "model")
    assert result.exit_code == 0, result.output
