"""A tiny run in a directory, of one process or of several. To be run in every rank."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path
from unittest import mock

import torch
from runs.tiny import OVERRIDES
from torch import Tensor

from lvrpo.runs.checkpoint import CheckpointError, save_checkpoint
from lvrpo.runs.commands import opened_by_first, run_training
from lvrpo.runs.opening import open_run
from lvrpo.trainer.ranks import Ranks

QUICK = ("run.eval_items=0", "run.frontier_items=0", "run.checkpoint_every=1")


def run(directory: Path, *overrides: str) -> None:
    """As `lvrpo train` makes it, or goes on with it, with the tiny configuration."""
    run_of(directory, None, *OVERRIDES, *QUICK, *overrides)


def run_of(directory: Path, config_file: Path | None, *overrides: str) -> None:
    """Likewise with that of a file; None where it is there."""
    ranks = Ranks.joined()
    opening = open_run(directory, config_file, overrides)
    with contextlib.redirect_stderr(io.StringIO()), opened_by_first(opening, ranks) as opened:
        run_training(opened, ranks)


def sharded(shape: tuple[int, ...]) -> Tensor:
    """Numbers of which every rank has a part."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    numbers = torch.arange(torch.Size(shape).numel(), dtype=torch.float32).view(shape)
    return distribute_tensor(numbers, mesh, [Shard(0)])


def save_and_fail(folder: Path) -> str:
    """Save step 1, then fail to save step 2 on the first rank; returns what this one is told."""
    tensors = {"sharded": sharded((5, 3)), "whole": torch.ones(2)}
    save_checkpoint(folder, 1, tensors, {"of": "a test"}, keep=3)
    full = OSError(28, "No space left on device")
    with mock.patch("lvrpo.runs.checkpoint._make_folder", side_effect=full):
        try:
            save_checkpoint(folder, 2, tensors, {}, keep=3)
        except CheckpointError as error:
            return str(error)
    return ""
