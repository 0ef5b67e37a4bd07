from __future__ import annotations

import errno
import json
import resource

import pytest
import torch
from safetensors import SafetensorError

from lvrpo.runs import checkpoint as module
from lvrpo.runs.checkpoint import (
    CheckpointError,
    checkpoints,
    load_checkpoint,
    load_newest,
    save_checkpoint,
)
from lvrpo.runs.files import write_atomically

TENSORS = {"weight": torch.arange(6.0).view(2, 3), "step": torch.tensor(3.0)}


def test_round_trip_and_only_the_newest_are_kept(tmp_path):
    for step in (1, 2, 3):
        save_checkpoint(tmp_path, step, TENSORS, {"fingerprint": "f"}, keep=2)
    assert [path.name for path in checkpoints(tmp_path)] == ["step-00000002", "step-00000003"]
    found = load_newest(tmp_path)
    assert found.step == 3
    assert found.state["fingerprint"] == "f"
    assert all(torch.equal(found.tensors[name], tensor) for name, tensor in TENSORS.items())


def test_no_checkpoint_yet(tmp_path):
    assert load_newest(tmp_path / "absent") is None


def test_flipped_bit_is_found_by_the_checksum(tmp_path):
    path = save_checkpoint(tmp_path, 1, TENSORS, {}, keep=1)
    content = bytearray((path / "tensors.safetensors").read_bytes())
    content[-1] ^= 1
    (path / "tensors.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"step-00000001 is corrupt: the checksum"):
        load_checkpoint(path)


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ("{", "state.json is not JSON"),
        ("[]", "is foreign: its format is 'list'"),
        (json.dumps({"format": "other"}), "is foreign: its format is 'other'"),
    ],
)
def test_foreign_state(tmp_path, state, message):
    path = save_checkpoint(tmp_path, 1, TENSORS, {}, keep=1)
    (path / "state.json").write_text(state)
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(path)


def test_truncated_tensors(tmp_path):
    path = save_checkpoint(tmp_path, 1, TENSORS, {}, keep=1)
    (path / "tensors.safetensors").unlink()
    with pytest.raises(CheckpointError, match="is corrupt"):
        load_checkpoint(path)


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        SafetensorError("I/O error: No space left on device (os error 28)"),
    ],
)
def test_full_disk_leaves_the_previous_checkpoint(tmp_path, monkeypatch, error):
    save_checkpoint(tmp_path, 1, TENSORS, {}, keep=1)

    def no_space(tensors, path):
        path.write_bytes(b"half")
        raise error

    monkeypatch.setattr(module, "save_file", no_space)
    with pytest.raises(CheckpointError, match=r"step-00000002: no space left on the disk"):
        save_checkpoint(tmp_path, 2, TENSORS, {}, keep=1)
    monkeypatch.undo()
    assert load_newest(tmp_path).step == 1
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]


def test_a_file_that_the_system_refuses_is_named(tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(CheckpointError, match=r"step-00000001: .*File too large"):
            save_checkpoint(tmp_path, 1, {"weight": torch.ones(1000)}, {}, keep=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == []


def test_killed_while_writing(tmp_path):
    save_checkpoint(tmp_path, 1, TENSORS, {}, keep=3)
    half = tmp_path / ".writing-00000002"
    half.mkdir()
    (half / "tensors.safetensors").write_bytes(b"half")
    assert load_newest(tmp_path).step == 1
    save_checkpoint(tmp_path, 2, TENSORS, {}, keep=3)
    assert not half.exists()


def test_killed_while_deleting(tmp_path, monkeypatch):
    for step in (1, 2):
        save_checkpoint(tmp_path, step, TENSORS, {}, keep=2)

    def killed(path):
        (path / "state.json").unlink()
        raise KeyboardInterrupt

    monkeypatch.setattr(module.shutil, "rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(tmp_path, 3, TENSORS, {}, keep=1)
    monkeypatch.undo()
    assert [load_checkpoint(path).step for path in checkpoints(tmp_path)] == [2, 3]
    save_checkpoint(tmp_path, 4, TENSORS, {}, keep=1)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000004"]


def test_a_full_disk_is_named(tmp_path, monkeypatch):
    def no_space(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", no_space)
    with pytest.raises(OSError, match=r"No space left on device: '.*/config\.toml'"):
        write_atomically(tmp_path / "config.toml", b"[run]\n")
    assert list(tmp_path.iterdir()) == []
