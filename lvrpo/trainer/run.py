"""What the commands do with a run directory: open it, train in it, and load what it learned."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from lvrpo.models.policy import Policy
from lvrpo.trainer.checkpoint import CheckpointError, load_newest, write_text
from lvrpo.trainer.config import ConfigError, TrainConfig, load_config, to_table, to_toml
from lvrpo.trainer.environment import write_environment
from lvrpo.trainer.loop import Listener, train
from lvrpo.trainer.preflight import check_config
from lvrpo.trainer.progress import ProgressView
from lvrpo.trainer.run_directory import RunDirectoryError, locked
from lvrpo.trainer.sources import Source
from lvrpo.trainer.state import fingerprint, load_weights
from lvrpo.trainer.task import Task, load_or_fit_task


@dataclass(frozen=True)
class OpenRun:
    """A run directory that this process holds."""

    directory: Path
    config: TrainConfig
    source: Source


@contextlib.contextmanager
def open_run(directory: Path, config_file: Path | None, overrides: list[str]) -> Iterator[OpenRun]:
    """Hold a run directory and settle its configuration.

    A new directory gets `config.toml`. An existing run goes on with its own; flags given again must
    agree with it, for none would be obeyed.

    Raises:
        ConfigError: the configuration is wrong, or not the one the run was started with.
        RunDirectoryError: the directory is in use or cannot be made.
    """
    given = load_config(config_file, overrides)
    is_new = not (directory / "config.toml").exists()
    if is_new:
        _refuse_other_contents(directory)
        source = check_config(given)  # before anything is created
    with locked(directory):
        if is_new and (directory / "config.toml").exists():
            raise RunDirectoryError(f"{directory} was started by another process just now")
        if is_new:
            write_text(directory / "config.toml", to_toml(given))
            config = given
        else:
            config = load_config(directory / "config.toml")
            named = config_file is not None or bool(overrides)
            if named and given != config:
                raise ConfigError(
                    f"{directory} was started with another configuration "
                    f"({_difference(config, given)}); leave the flags away to go on with its own, "
                    "or give a new directory"
                )
            source = check_config(config)
        yield OpenRun(directory, config, source)


def _refuse_other_contents(directory: Path) -> None:
    # What starts with a dot may be of a run that was killed while it wrote its configuration.
    others = [path.name for path in directory.glob("*") if not path.name.startswith(".")]
    if others:
        raise RunDirectoryError(
            f"{directory} is not empty and not a run (it has {min(others)}, no config.toml); give "
            "a new directory"
        )


def _difference(ours: TrainConfig, theirs: TrainConfig) -> str:
    a, b = to_table(ours), to_table(theirs)
    for section, values in a.items():
        for key, value in values.items():
            if b[section][key] != value:
                return f"{section}.{key} is {value!r} there, {b[section][key]!r} here"
    return "no key differs"


def run_training(run: OpenRun) -> bool:
    """Train to the end (True) or to Ctrl-C (False), with a progress bar."""
    config = run.config
    if config.run.threads:
        torch.set_num_threads(config.run.threads)
    with ProgressView(config.warm_start.steps) as view:
        view.message("preparing data and rewards")
        task = load_or_fit_task(config, run.directory, run.source)
        if not (run.directory / "environment.json").exists():
            write_environment(run.directory, seed=config.run.seed, **task.facts())
        for line in task.notes():
            view.message(line)
        return train(
            config, task, run.directory, Listener(view.progress, view.message, view.evaluation)
        )


def load_policy(directory: Path) -> tuple[TrainConfig, Task, Policy]:
    """The averaged weights of a run's newest checkpoint, ready to sample from.

    Raises:
        RunDirectoryError: not a run, or no checkpoint yet.
        CheckpointError: the checkpoint is damaged.
    """
    if not (directory / "config.toml").exists():
        raise RunDirectoryError(f"{directory} is not a run: it has no config.toml")
    config = load_config(directory / "config.toml")
    if load_newest(directory / "task") is None:
        raise RunDirectoryError(f"{directory} has no checkpoint yet: lvrpo train {directory}")
    task = load_or_fit_task(config, directory)
    newest = load_newest(directory / "checkpoints")
    if newest is None:
        raise RunDirectoryError(f"{directory} has no checkpoint yet: lvrpo train {directory}")
    if newest.state.get("fingerprint") != fingerprint(config):
        raise CheckpointError(f"{newest.path} is foreign: it is not of this run's configuration")
    model = task.new_model()
    load_weights(model, newest, "average.")
    return config, task, task.policy(model.requires_grad_(False))
