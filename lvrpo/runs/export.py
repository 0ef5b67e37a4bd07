"""The weights of a run as one folder for others: of transformers, of BAGEL, or a unified model."""

from __future__ import annotations

import os
import shutil
from functools import partial
from pathlib import Path

from safetensors import SafetensorError

from lvrpo.runs.directory import RunDirectoryError
from lvrpo.runs.files import flush_to_disk, why_not_written
from lvrpo.runs.inference import load_reference, policy_at, read_run
from lvrpo.trainer.config import ConfigError


def export_run(
    directory: Path,
    output: Path,
    *,
    step: int | None = None,
    reference: bool = False,
    adapter: bool = False,
) -> None:
    """Write a folder whole or not at all: under a hidden name, flushed to the disk, renamed.

    Args:
        directory: of the run.
        output: the folder, which is not there yet.
        step: of the checkpoint; None for the newest.
        reference: whether the weights are those of the end of the warm start instead.
        adapter: whether only what a LoRA has trained is written.

    Raises:
        RunDirectoryError: the folder is there, or the run or its checkpoint is not.
        ConfigError: there is no LoRA.
    """
    if step is not None and reference:
        raise RunDirectoryError(f"--step {step} and --reference, expected one of them")
    if output.exists() or output.is_symlink():
        raise RunDirectoryError(f"{output}: is there already, expected the name of a new folder")
    if not output.absolute().parent.is_dir():
        raise RunDirectoryError(f"{output}: cannot be written: no folder {output.parent}")
    setup, parts = read_run(directory, device="cpu")
    if adapter and not setup.config.model.lora_rank:
        raise ConfigError(f"--adapter: model.lora_rank is 0 in {directory}, which trains no LoRA")
    load = load_reference if reference else partial(policy_at, step=step)
    policy = load(directory, setup, parts)
    if policy is None:
        raise RunDirectoryError(f"--reference: {directory} has not finished its warm start")
    hidden = output.with_name(f".{output.name}.partial")
    shutil.rmtree(hidden, ignore_errors=True)  # of an export that was killed
    try:
        setup.family.export(policy, hidden, adapter=adapter)
        for file in hidden.rglob("*"):
            if file.is_file():
                flush_to_disk(file)
        os.rename(hidden, output)
    except (OSError, SafetensorError) as error:
        raise RunDirectoryError(why_not_written(output, error)) from error
    finally:
        shutil.rmtree(hidden, ignore_errors=True)
