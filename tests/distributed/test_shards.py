"""Checkpoints that processes write together: read by any number of them, whole or not there."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import shared_directories
import torch
from rank_pool import Ranks, ranks

from lvrpo.runs.checkpoint import CheckpointError, checkpoints, load_checkpoint, load_newest


@pytest.fixture(scope="module")
def groups() -> Iterator[dict[int, Ranks]]:
    with ranks(2) as two, ranks(4) as four:
        yield {2: two, 4: four}


def run(groups: dict[int, Ranks], size: int, directory: Path, *overrides: str) -> None:
    if size == 1:
        shared_directories.run(directory, *overrides)
    else:
        groups[size].run(shared_directories.run, directory, *overrides)


@pytest.mark.parametrize(("before", "after"), [(2, 1), (4, 2), (1, 4)])
def test_a_run_goes_on_with_other_processes(groups, tmp_path, before, after):
    """Sharded by as many as are there, and with all weights where there is one."""
    whole, changing = tmp_path / "whole", tmp_path / "changing"
    run(groups, 1, whole, "optimizer.final_lr_fraction=1.0")
    for size, steps in ((before, 1), (after, 3)):
        shard = f"run.shard={'true' if size > 1 else 'false'}"
        run(groups, size, changing, f"run.steps={steps}", "optimizer.final_lr_fraction=1.0", shard)
    newest, expected = (load_newest(each / "checkpoints") for each in (changing, whole))
    assert newest is not None
    assert expected is not None
    assert newest.step == expected.step == 6
    assert newest.tensors.keys() == expected.tensors.keys()
    for name in ("model.embedding.weight", "model.layers.0.understand.qkv.weight"):
        ours, theirs = newest.tensors[name], expected.tensors[name]
        assert (ours - theirs).norm() < 0.1 * theirs.norm(), name
    in_parts = {path.name for path in newest.path.glob("*.distcp")}
    assert len(in_parts) == (after if after > 1 else 0)


def test_parts_are_checked_and_read_whole(groups, tmp_path):
    told = groups[2].run(shared_directories.save_and_fail, tmp_path)
    assert all("no space left on the disk" in each for each in told)
    (path,) = checkpoints(tmp_path)  # step 2 has left nothing
    assert [each.name for each in tmp_path.iterdir()] == [path.name]
    saved = load_checkpoint(path)
    assert saved.state["of"] == "a test"
    assert torch.equal(saved.tensors["sharded"], torch.arange(15.0).view(5, 3))
    assert torch.equal(saved.tensors["whole"], torch.ones(2))
    for name in sorted(saved.state["sha256"]):
        content = (path / name).read_bytes()
        (path / name).write_bytes(content[:-1])
        with pytest.raises(CheckpointError, match=rf"is corrupt: the checksum of {name} is"):
            load_checkpoint(path)
        (path / name).unlink()
        with pytest.raises(CheckpointError, match=rf"is corrupt: {name}: "):
            load_checkpoint(path)
        (path / name).write_bytes(content)
