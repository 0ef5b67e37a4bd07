"""Checkpoints that survive anything: written whole or not at all, verified when read.

A checkpoint is a folder `checkpoints/step-00000120` with `tensors.safetensors` and `state.json`. It
is written under a temporary name, flushed to the disk and renamed, so a folder of that name is
complete; `state.json` holds the SHA-256 of the tensors. Of a run whose processes share the weights
the tensors are in several files, see parts.py.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from lvrpo.runs.files import flush_to_disk, sha256, why_not_written, write_atomically
from lvrpo.runs.parts import have_parts, in_step, read_parts, write_parts
from lvrpo.trainer.journal import Snapshot

FORMAT = "lvrpo-checkpoint-3"
_TENSORS, _STATE = "tensors.safetensors", "state.json"


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be written or read; one line naming it."""


@dataclass(frozen=True)
class Checkpoint:
    """What `load_checkpoint` returns."""

    path: Path
    step: int
    tensors: dict[str, Tensor]
    state: dict[str, Any]
    fingerprint: str  # of the whole: of state.json, which holds that of the tensors

    def snapshot(self) -> Snapshot:
        """What the trainer needs of it."""
        return Snapshot(self.step, self.tensors, str(self.path))

    def require(self, made_with: Mapping[str, str]) -> None:
        """See that it was made with what the run has now, by the fingerprints in its state.

        Raises:
            CheckpointError: it was not; the message names the first that differs.
        """
        for name, expected in made_with.items():
            found = self.state.get(name)
            if found != expected:
                what = _MADE_WITH.get(name, f"another {name}")
                raise CheckpointError(
                    f"{self.path} is foreign: it was made with {what} ({found}, this run has "
                    f"{expected}); put this run's own back, or start a new run"
                )


#: What a fingerprint in a checkpoint's state is of.
_MADE_WITH = {"fingerprint": "another configuration", "task": "another task/ folder"}


def save_checkpoint(
    folder: Path, step: int, tensors: Mapping[str, Tensor], state: Mapping[str, Any], keep: int
) -> Path:
    """Write `folder/step-<step>` and then delete all but the newest `keep` checkpoints.

    Where processes have parts of the tensors all of them call, with the same; the first makes the
    folder, and gives it its name when all have written.

    Raises:
        CheckpointError: the disk is full or not writable; earlier checkpoints are untouched. On
            every process.
    """
    final = folder / f"step-{step:08d}"
    temporary = folder / f".writing-{step:08d}"
    shared = have_parts(tensors)
    is_first = not shared or torch.distributed.get_rank() == 0

    def make() -> None:
        if is_first:
            _make_folder(folder, temporary)

    def write() -> None:
        if shared:
            write_parts(temporary, tensors)
        else:
            _write_tensors(temporary / _TENSORS, tensors)

    def finish() -> None:
        if is_first:
            _finish(temporary, final, {"format": FORMAT, "step": step, **state})

    try:
        for do in (make, write, finish):
            in_step(do) if shared else do()
    except (OSError, SafetensorError) as error:
        if is_first:
            shutil.rmtree(temporary, ignore_errors=True)
        said = why_not_written(final, error)
        raise CheckpointError(f"{said}; the checkpoints before it are kept") from error
    if is_first:
        for old in checkpoints(folder)[:-keep]:
            _delete(old)
    return final


def _make_folder(folder: Path, temporary: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for leftover in (*folder.glob(".writing-*"), *folder.glob(".deleting-*")):
        shutil.rmtree(leftover)
    temporary.mkdir()


def _finish(temporary: Path, final: Path, state: Mapping[str, Any]) -> None:
    content = {"sha256": _digests(temporary), **state}
    text = json.dumps(content, indent=1, sort_keys=True) + "\n"
    write_atomically(temporary / _STATE, text.encode())
    if final.exists():
        _delete(final)
    os.replace(temporary, final)
    _sync_folder(final.parent)


def _digests(folder: Path) -> str | dict[str, str]:
    """Of the one file of tensors, or of each of several by name."""
    names = sorted(path.name for path in folder.iterdir() if path.name != _STATE)
    if names == [_TENSORS]:
        return sha256(folder / _TENSORS)
    return {name: sha256(folder / name) for name in names}


def _delete(path: Path) -> None:
    """Rename first: a kill in the middle must not leave a part under a checkpoint's name."""
    hidden = path.with_name(f".deleting-{path.name}")
    os.replace(path, hidden)
    shutil.rmtree(hidden)


def checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    return sorted(path for path in folder.glob("step-" + 8 * "[0-9]") if path.is_dir())


def load_checkpoint(path: Path) -> Checkpoint:
    """Read and verify one checkpoint.

    Raises:
        CheckpointError: it is missing, not an lvrpo checkpoint, or its checksum does not match.
    """
    try:
        text = (path / _STATE).read_bytes()
        state = json.loads(text)
    except OSError as error:
        reason = f"{error.strerror}: {_STATE}"
        raise CheckpointError(f"{path} is not a checkpoint: {reason}") from error
    except ValueError as error:
        raise CheckpointError(f"{path} is corrupt: {_STATE} is not JSON") from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        found = state.get("format") if isinstance(state, dict) else type(state).__name__
        raise CheckpointError(f"{path} is foreign: its format is {found!r}, expected {FORMAT!r}")
    step = state.get("step")
    if not isinstance(step, int) or isinstance(step, bool) or step < 0:
        raise CheckpointError(f"{path} is corrupt: the step in {_STATE} is {step!r}")
    expected = state.get("sha256")
    files = expected if isinstance(expected, dict) else {_TENSORS: str(expected)}
    try:
        for name, known in files.items():
            digest = sha256(path / name)
            if digest != known:
                raise CheckpointError(
                    f"{path} is corrupt: the checksum of {name} is {digest[:12]}..., expected "
                    f"{str(known)[:12]}..."
                )
        tensors = read_parts(path) if isinstance(expected, dict) else load_file(path / _TENSORS)
    except OSError as error:
        name = Path(error.filename or _TENSORS).name
        raise CheckpointError(f"{path} is corrupt: {name}: {error}") from error
    except SafetensorError as error:
        raise CheckpointError(f"{path} is corrupt: {_TENSORS}: {error}") from error
    return Checkpoint(path, step, tensors, state, hashlib.sha256(text).hexdigest()[:16])


def load_newest(folder: Path) -> Checkpoint | None:
    """The newest checkpoint of a run, or None when there is none yet.

    Raises:
        CheckpointError: see `load_checkpoint`; the message names the one before it.
    """
    found = checkpoints(folder)
    if not found:
        return None
    try:
        return load_checkpoint(found[-1])
    except CheckpointError as error:
        if len(found) == 1:
            raise
        step = step_of(found[-2])
        raise CheckpointError(
            f"{error}; `lvrpo train {folder.parent} --resume-at {step}` deletes it and goes on "
            f"after step {step}"
        ) from error


def step_of(path: Path) -> int:
    """The step in a checkpoint's name."""
    return int(path.name.removeprefix("step-"))


def delete_after(folder: Path, step: int) -> None:
    """Delete the checkpoints of later steps, the newest first."""
    for path in reversed(checkpoints(folder)):
        if step_of(path) > step:
            _delete(path)


def _write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a safetensors file, straight from the tensors, and flush it to the disk."""
    save_file({name: t.detach().contiguous() for name, t in tensors.items()}, path)
    flush_to_disk(path)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
