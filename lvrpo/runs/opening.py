"""How a run directory is opened: a new run, one that goes on, or one that begins with another's.

Nothing is created before everything is checked, and whatever differs from what the run began with
is refused or recorded.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

from lvrpo.runs.changes import (
    CHECKPOINT,
    changed_config,
    changes_between,
    fingerprint,
    forked_config,
    rate_bridge,
)
from lvrpo.runs.checkpoint import (
    checkpoints,
    delete_after,
    load_checkpoint,
    load_newest,
    save_checkpoint,
    step_of,
)
from lvrpo.runs.compute import equal_compute_steps
from lvrpo.runs.config_file import Settings, load_config, read_settings, to_toml
from lvrpo.runs.directory import (
    VERSION,
    RunDirectoryError,
    is_run,
    locked,
    refuse_other_contents,
    require_format,
    write_version,
)
from lvrpo.runs.files import Row, read_rows, write_atomically
from lvrpo.runs.inputs import (
    INPUTS,
    Inputs,
    compare_inputs,
    find_inputs,
    fingerprint_of,
    read_inputs,
    write_inputs,
)
from lvrpo.runs.log import CHANGES, METRICS, read_changes, read_metrics, write_changes
from lvrpo.runs.preflight import check_config
from lvrpo.runs.setup import Setup, used_rewards
from lvrpo.trainer.config import ConfigError, TrainConfig


@dataclass(frozen=True)
class OpenRun:
    """A run directory that this process holds.

    Attributes:
        directory: of the run.
        config: in force.
        setup: its parts.
        step: the last finished one.
        facts: about its beginning, for environment.json.
        changes: of this opening, as rows of changes.jsonl.
        notes: lines on what was settled for the user.
    """

    directory: Path
    config: TrainConfig
    setup: Setup
    step: int
    facts: dict[str, Any]
    changes: list[Row]
    notes: list[str] = field(default_factory=list)


@contextlib.contextmanager
def open_run(
    directory: Path,
    config_file: Path | None,
    overrides: list[str],
    *,
    origin: Path | None = None,
    accept_changes: bool = False,
    resume_at: int | None = None,
    dry: bool = False,
) -> Iterator[OpenRun]:
    """Hold a run directory and settle its configuration.

    A new directory gets `version.json`, `inputs.json` and `config.toml`. An existing run goes on
    with its own configuration; of the keys that are named again some may change, and are recorded.
    A supervised run that begins with the warm start of another takes the compute of its policy
    phase, unless `run.steps` is named.

    Args:
        directory: of the run.
        config_file: TOML file of a new run, or of keys to compare.
        overrides: `section.key=value`.
        origin: a run whose warm start the new run begins with.
        accept_changes: go on with data and reward code that are not what the run began with.
        resume_at: step of an earlier checkpoint to go on after; later ones are deleted.
        dry: check everything, and create and change nothing.

    Raises:
        ConfigError: the configuration is wrong, or a key differs that may not change.
        RunDirectoryError: the directory is in use, cannot be made, or is of another version, or its
            inputs have changed.
    """
    named = read_settings(config_file, overrides)
    is_new = not is_run(directory)
    if is_new:
        refuse_other_contents(directory, "run", "config.toml", early=(VERSION, INPUTS, CHANGES))
        config, notes = _new_config(origin, named)
        with named.located():
            setup = check_config(config)  # before anything is created
    elif origin is not None:
        raise RunDirectoryError(f"{directory} is a run already; give --from a new directory")
    with contextlib.nullcontext() if dry else locked(directory):
        if not is_new:
            yield _existing(directory, named, accept_changes, resume_at, dry)
            return
        if resume_at is not None:
            raise RunDirectoryError(f"{directory} has no checkpoint of step {resume_at}")
        if is_run(directory):
            raise RunDirectoryError(f"{directory} was started by another process just now")
        inputs = find_inputs(config, _rewards(config))
        changes: list[Row] = []
        if origin is not None:
            then = read_inputs(origin) or {}
            # A warm start depends on data alone.
            changes = _accepted(origin, _of_data(then), _of_data(inputs), 0, accept_changes)
        if not dry:
            if origin is not None:
                _copy_warm_start(origin, directory, config)
            write_version(directory)
            write_inputs(directory, inputs)
            write_changes(directory, changes)
            write_atomically(directory / "config.toml", to_toml(config).encode())
        facts = {} if origin is None else {"warm_start_of": os.path.abspath(origin)}
        step = 0 if origin is None else config.warm_start.steps
        yield OpenRun(directory, config, setup, step, facts, changes, notes)


def _existing(
    directory: Path,
    named: Settings,
    accept_changes: bool,
    resume_at: int | None,
    dry: bool,
) -> OpenRun:
    require_format(directory)
    own = load_config(directory / "config.toml")
    config = changed_config(directory, own, named)
    step, changes = _step_to_resume(directory, resume_at, accept_changes)
    if config.warm_start.steps + config.run.steps < step:
        raise ConfigError(
            f"run.steps is {config.run.steps}, but {directory} has "
            f"{step - config.warm_start.steps} policy steps behind it"
        )
    with named.located():
        setup = check_config(config)
    setup.saved_parts(directory)  # damaged ones, or of another model's folder, are refused here
    inputs = find_inputs(config, _rewards(config))
    bridge = rate_bridge(own, read_changes(directory) + changes)
    changes += changes_between(own, config, step, bridge)
    changes += _accepted(directory, read_inputs(directory) or {}, inputs, step, accept_changes)
    if not dry:
        # In this order a kill in between can only make a record twice.
        write_changes(directory, changes)
        delete_after(directory / "checkpoints", step)
        write_inputs(directory, inputs)
        if config != own:
            write_atomically(directory / "config.toml", to_toml(config).encode())
    return OpenRun(directory, config, setup, step, {}, changes)


def _step_to_resume(
    directory: Path, resume_at: int | None, accept_changes: bool
) -> tuple[int, list[Row]]:
    """The step of the checkpoint to go on from, and what has to be recorded about it.

    It is the newest one whose steps are all in the log: from an earlier one the run comes to the
    same weights and writes the lost rows again.
    """
    steps = [step_of(path) for path in checkpoints(directory / "checkpoints")]
    newest = steps[-1] if steps else 0
    if resume_at is not None:
        if resume_at not in steps:
            kept = ", ".join(map(str, steps)) or "none"
            raise RunDirectoryError(
                f"{directory} has no checkpoint of step {resume_at}; there are {kept}"
            )
        return resume_at, _went_back(newest, resume_at)
    logged = {row["step"] for row in read_metrics(directory)}
    for row in read_changes(directory):
        if row["key"] == METRICS:  # a hole that was accepted
            logged |= set(range(row["new"] + 1, row["old"] + 1))
    whole = next(step for step in itertools.count(1) if step not in logged) - 1
    if whole >= newest:
        return newest, []
    earlier = [step for step in steps if step <= whole]
    if earlier:
        return earlier[-1], _went_back(newest, earlier[-1])
    if accept_changes:
        return newest, [{"step": newest, "key": METRICS, "old": newest, "new": whole}]
    raise RunDirectoryError(
        f"{directory}/{METRICS} lacks the row of step {whole + 1}, and there is no checkpoint "
        "before it; put the file back, or go on without the row by --accept-changes, which the "
        "run will record"
    )


def _went_back(newest: int, step: int) -> list[Row]:
    row: Row = {"step": step, "key": CHECKPOINT, "old": newest, "new": step}
    return [] if step == newest else [row]


def _accepted(
    directory: Path, then: Inputs, now: Inputs, step: int, accept_changes: bool
) -> list[Row]:
    """Rows for the inputs that differ, if that is accepted."""
    differences = compare_inputs(then, now)
    if differences and not accept_changes:
        key, difference = next(iter(differences.items()))
        more = f" ({len(differences) - 1} more inputs differ)" if len(differences) > 1 else ""
        raise RunDirectoryError(
            f"{directory}: {key}: {difference}{more}; put it back, give a new directory, or go on "
            "with what is there now by --accept-changes, which the run will record"
        )
    return [
        {
            "step": step,
            "key": key,
            "old": fingerprint_of(then[key]) if key in then else None,
            "new": fingerprint_of(now[key]),
        }
        for key in differences
    ]


def _rewards(config: TrainConfig) -> list[str]:
    used = chain(config.rewards.right.values(), *used_rewards(config).values())
    return [name for name in used if ":" in name]


def _new_config(origin: Path | None, named: Settings) -> tuple[TrainConfig, list[str]]:
    """The configuration of a new run, and what was settled in it for the user."""
    if origin is None:
        return named.over(TrainConfig()), []
    if not is_run(origin):
        raise RunDirectoryError(f"{origin} is not a run: it has no config.toml")
    require_format(origin)
    if load_newest(origin / "reference") is None:
        raise RunDirectoryError(f"{origin} has not finished its warm start: lvrpo train {origin}")
    own = load_config(origin / "config.toml")
    config = forked_config(origin, own, named)
    becomes_supervised = config.run.objective == "supervised" != own.run.objective
    if not becomes_supervised or "steps" in named.table.get("run", {}):
        return config, []
    steps, note = equal_compute_steps(origin, own)
    run = dataclasses.replace(config.run, steps=steps)
    return dataclasses.replace(config, run=run), [note]


def _of_data(inputs: Inputs) -> Inputs:
    return {key: value for key, value in inputs.items() if key.startswith("data.")}


def _copy_warm_start(origin: Path, directory: Path, config: TrainConfig) -> None:
    """Leave a new run directory as it would be right after the warm start of `origin`.

    It is put together under a hidden name, so a kill leaves nothing that looks like a run.
    """
    own = load_config(origin / "config.toml")
    task, reference = load_newest(origin / "task"), load_newest(origin / "reference")
    if task is None or reference is None:
        raise RunDirectoryError(f"{origin} lacks its task/ or reference/ folder")
    task.require({"fingerprint": fingerprint(own)})
    reference.require({"fingerprint": fingerprint(own), "task": task.fingerprint})
    hidden = directory / ".from"
    shutil.rmtree(hidden, ignore_errors=True)
    made_with = {"fingerprint": fingerprint(config)}
    path = save_checkpoint(hidden / "task", 0, task.tensors, _state(task.state) | made_with, keep=1)
    made_with["task"] = load_checkpoint(path).fingerprint
    tensors = {f"model.{name}": tensor for name, tensor in reference.tensors.items()}
    save_checkpoint(hidden / "checkpoints", reference.step, tensors, made_with, keep=1)
    lines = [line for line, row in read_rows(origin / METRICS) if row.get("phase") == "warm_start"]
    write_atomically(hidden / METRICS, b"".join(line + b"\n" for line in lines))
    for part in list(hidden.iterdir()):
        part.rename(directory / part.name)
    hidden.rmdir()


def _state(state: Mapping[str, Any]) -> dict[str, Any]:
    """What a caller gave to `save_checkpoint`."""
    return {k: v for k, v in state.items() if k not in ("format", "step", "sha256")}
