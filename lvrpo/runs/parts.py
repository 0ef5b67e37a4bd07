"""Tensors that processes have parts of, in one folder: `torch.distributed.checkpoint`.

Every process writes its parts into a file of its own, `.metadata` says which are where, and any
number of processes reads them.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
import torch.distributed
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from lvrpo.trainer.placement import is_split


def have_parts(tensors: Mapping[str, Tensor]) -> bool:
    """Whether processes have parts of some of the tensors, and so have to write them together."""
    return any(map(is_split, tensors.values()))


def in_step(do: Callable[[], None]) -> None:
    """Do something that every process does, and know of the others that they have.

    Raises:
        OSError: on all of them, that of the first that failed.
    """
    failed: OSError | None = None
    try:
        do()
    except OSError as error:
        failed = error
    except CheckpointException as error:
        causes = [cause for cause, _ in error.failures.values() if isinstance(cause, OSError)]
        failed = causes[0] if causes else OSError(str(error).partition("\n")[0])
    found: list[OSError | None] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(found, failed)
    for failure in found:
        if failure is not None:
            raise failure


def write_parts(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write the parts of this process, flushed to the disk; all processes call."""
    writer = FileSystemWriter(folder, sync_files=True)
    save({name: tensor.detach() for name, tensor in tensors.items()}, storage_writer=writer)


def read_parts(folder: Path) -> dict[str, Tensor]:
    """Whole tensors on the CPU, in this process alone."""
    reader = FileSystemReader(folder)
    found: dict[str, Tensor] = {}
    for name, stored in reader.read_metadata().state_dict_metadata.items():
        assert isinstance(stored, TensorStorageMetadata), name
        found[name] = torch.empty(stored.size, dtype=stored.properties.dtype)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # it is meant
        load(found, storage_reader=reader, no_dist=True)
    return found
