"""Wrong data: one line that names file and line, exit code 2, nothing half-written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image
from runs.own_data import write_own_data
from runs.test_bad_input import refused
from runs.tiny import OVERRIDES, settings

JSONL = {
    "not JSON": ("{", "train.jsonl:3: not JSON"),
    "a list": ("[1]", "train.jsonl:3: expected a JSON object"),
    "a field is missing": ('{"task": "generate"}', "train.jsonl:3: field 'prompt' is missing"),
    "no answer": (
        '{"task": "understand", "prompt": "what", "image": "q0.png"}',
        "train.jsonl:3: field 'answer' is missing",
    ),
    "unknown field": (
        '{"task": "generate", "prompt": "x", "targets": "no.png"}',
        "train.jsonl:3: field 'targets' is unknown",
    ),
    "no such picture": (
        '{"task": "generate", "prompt": "x", "target": "no.png"}',
        "train.jsonl:3: field 'target' there is no file",
    ),
    "no picture": (
        '{"task": "generate", "prompt": "x", "target": "text.png"}',
        "train.jsonl:3: field 'target' cannot read",
    ),
    "half a picture": (
        '{"task": "generate", "prompt": "x", "target": "half.png"}',
        "train.jsonl:3: field 'target' cannot read",
    ),
}


@pytest.mark.parametrize(("line", "message"), JSONL.values(), ids=JSONL.keys())
def test_bad_line_of_a_data_file(tmp_path, line, message):
    overrides = write_own_data(tmp_path)
    broken_pictures(tmp_path)
    path = tmp_path / "train.jsonl"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines[:2], line, *lines[2:]]) + "\n")
    found = refused("train", tmp_path / "run", *settings([*OVERRIDES, *overrides]))
    assert f"{tmp_path}/{message}" in found
    assert not (tmp_path / "run").exists()


def broken_pictures(folder: Path) -> None:
    (folder / "text.png").write_text("not a picture")
    Image.effect_noise((64, 64), 90).save(folder / "whole.png")
    content = (folder / "whole.png").read_bytes()
    (folder / "half.png").write_bytes(content[: len(content) // 2])
    spoiled = bytearray(content)
    spoiled[38] ^= 0xFF  # of a chunk's name: Pillow raises a SyntaxError
    (folder / "spoiled.png").write_bytes(spoiled)


DATA = {
    "no evaluation file": (["data.eval_source=''"], "data.eval_source is empty"),
    "no such file": (["data.source=absent.jsonl"], "absent.jsonl: No such file"),
    "training data to evaluate on": (["data.eval_source={folder}/train.jsonl"], "splits overlap"),
    "training data to validate on": (
        ["data.validation_source={folder}/train.jsonl"],
        "splits overlap",
    ),
    "test data to validate on": (
        ["data.validation_source={folder}/test.jsonl"],
        "splits overlap",
    ),
    "no such validation file": (
        ["data.validation_source=absent.jsonl"],
        "absent.jsonl: No such file",
    ),
    "semantic reward": (
        ["rewards.generate={{ r_sem = 1.0 }}"],
        "r_sem comes with an encoder of digit scenes; with data.source = '{folder}/train.jsonl'",
    ),
    "channels": (["data.channels=2"], "2 channels, expected 1 or 3"),
}


@pytest.mark.parametrize(("changes", "message"), DATA.values(), ids=DATA.keys())
def test_bad_data_settings(tmp_path, changes, message):
    changes = [change.format(folder=tmp_path) for change in changes]
    overrides = settings([*OVERRIDES, *write_own_data(tmp_path), *changes])
    assert message.format(folder=tmp_path) in refused("train", tmp_path / "run", *overrides)
    assert not (tmp_path / "run").exists()


def test_a_task_that_the_file_has_no_example_of(tmp_path):
    overrides = write_own_data(tmp_path)
    path = tmp_path / "train.jsonl"
    path.write_text("\n".join(row for row in path.read_text().splitlines() if "answer" in row))
    message = refused("train", tmp_path / "run", *settings([*OVERRIDES, *overrides]))
    assert message == (
        f"{path}: no line has the task 'generate'; set rollout.generate_prompts = 0 to train "
        "without it"
    )


@pytest.mark.parametrize("name", ["text.png", "half.png", "spoiled.png", "absent.png"])
def test_sample_with_an_unreadable_image(trained, tmp_path, name):
    broken_pictures(tmp_path)
    image = tmp_path / name
    message = refused("sample", trained, "what digit is at top-left", "--image", image)
    assert message.startswith(f"{image}: cannot be read")


def test_sample_into_a_folder_that_is_not_there(trained, tmp_path):
    output = tmp_path / "no" / "drawing.png"
    assert f"{output}: cannot be written" in refused("sample", trained, "draw 3", "-o", output)


def test_eval_with_a_bad_data_file(trained, tmp_path):
    path = tmp_path / "mine.jsonl"
    path.write_text("{")
    assert f"{path}:1: not JSON" in refused("eval", trained, "--data", path)


def test_eval_with_nothing_to_judge(trained, tmp_path):
    path = tmp_path / "mine.jsonl"
    path.write_text('{"task": "generate", "prompt": "draw a boat"}')
    message = refused("eval", trained, "--data", path)
    assert message.startswith(
        f"{path}: nothing to judge, no example has an answer, a rule or a rew"
    )


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize(
    ("change", "given"),
    [
        ({"images": ["train-q0.png", "train-q1.png"]}, "2 pictures and 0 videos"),
        ({"videos": [["train-q0.png"]]}, "0 pictures and 1 videos"),
        (
            {"images": ["train-q0.png"], "prompt": "is <image> dark"},
            "its picture where <image> stands",
        ),
        ({"task": "generate", "answer": None, "image": "train-q0.png"}, "a picture to be edited"),
    ],
)
def test_more_pictures_than_the_unified_model_reads(tmp_path, split, change, given):
    overrides = write_own_data(tmp_path)
    row = {"task": "understand", "prompt": "which", "answer": "dark", "id": "mine"} | change
    path = tmp_path / f"{split}.jsonl"
    path.write_text(path.read_text() + json.dumps(row) + "\n")
    message = refused("train", tmp_path / "run", *settings([*OVERRIDES, *overrides]))
    assert message.startswith(f"data: mine: the prompt has {given}, expected one picture")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("section", ["rollout", "eval"])
def test_a_model_that_edits_nothing_is_not_guided_by_pictures(tmp_path, section):
    scales = f"{section}.guidance=4.0", f"{section}.guidance_image=1.5"
    message = refused("train", tmp_path / "run", *settings([*OVERRIDES, *scales]))
    assert message.startswith(f"{section}.guidance_image is 1.5, expected 1: it is of pictures to ")
    assert not (tmp_path / "run").exists()


def test_eval_with_more_pictures_than_the_unified_model_reads(trained, tmp_path):
    Image.new("L", (16, 16)).save(tmp_path / "a.png")
    row = {"task": "understand", "prompt": "which", "images": ["a.png"] * 2, "answer": "3"}
    (tmp_path / "mine.jsonl").write_text(json.dumps(row))
    message = refused("eval", trained, "--data", tmp_path / "mine.jsonl")
    assert message.startswith("mine:1: the prompt has 2 pictures and 0 videos")
