"""The directory of a study: which runs it has, and that it goes on with the settings it began with.

study.json      the study, its arms and how many seeds; the last file of a beginning
base.toml       the configuration of the base's runs
<arm>/<seed>/   a run directory; <seed>.log is what its command said
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lvrpo.runs.config_file import Settings, load_config, read_settings, to_table, to_toml
from lvrpo.runs.directory import (
    VERSION,
    RunDirectoryError,
    locked,
    refuse_other_contents,
    require_format,
    write_version,
)
from lvrpo.runs.files import write_atomically
from lvrpo.runs.preflight import check_config
from lvrpo.studies.study import Arm, Study
from lvrpo.trainer.config import ConfigError, TrainConfig

STUDY, BASE = "study.json", "base.toml"
SEEDS = 5  # of a study that is not told how many


@dataclass(frozen=True)
class StudyRun:
    """One run of a study.

    Attributes:
        arm: that it belongs to.
        seed: of it.
        directory: of it.
        origin: directory of the run whose warm start it begins with; None for the base.
    """

    arm: Arm
    seed: int
    directory: Path
    origin: Path | None

    @property
    def name(self) -> str:
        """Of the arm and the seed."""
        return f"{self.arm.name}/{self.seed}"

    @property
    def log(self) -> Path:
        """What its command said."""
        return self.directory.with_name(f"{self.seed}.log")


@contextlib.contextmanager
def open_study(
    directory: Path,
    study: Study,
    overrides: list[str],
    seeds: int | None = None,
    config: Path | None = None,
) -> Iterator[list[StudyRun]]:
    """Hold the directory of a study: a new one, or one that goes on with what it began with.

    Args:
        directory: of the study.
        study: to run.
        overrides: `section.key=value` of all runs; where a study goes on, these are compared.
        seeds: how many, from 0 on; more than before adds some. None: as before, or five.
        config: TOML file of all runs, over what the study says; `overrides` are over both.

    Returns:
        Its runs, those of the base first.

    Raises:
        ConfigError: an arm's configuration is wrong, or a setting is not what the study began with.
        RunDirectoryError: the directory is in use, holds something else, or another lvrpo wrote it.
    """
    named = read_settings(config, overrides)
    if "run.seed" in named.overridden:
        raise ConfigError("run.seed is another in every run of a study: give --seeds, how many")
    is_new = not (directory / STUDY).exists()
    if is_new:
        refuse_other_contents(directory, "study", STUDY, early=(VERSION, BASE))
        base = _checked(study, named)  # before anything is created
    with locked(directory):
        if not is_new:
            seeds = _existing(directory, study, named, seeds)
        elif (directory / STUDY).exists():
            raise RunDirectoryError(f"{directory} was started by another process just now")
        else:
            seeds = seeds or SEEDS
            write_version(directory)
            write_atomically(directory / BASE, to_toml(base).encode())
        record = {**_definition(study), "seeds": seeds}
        write_atomically(directory / STUDY, json.dumps(record, indent=1).encode() + b"\n")
        yield runs_of(directory, study, seeds)


def runs_of(directory: Path, study: Study, seeds: int) -> list[StudyRun]:
    """Every run of a study, those of the base first, then seed by seed."""
    bases = {seed: directory / study.base.name / str(seed) for seed in range(seeds)}
    runs = [StudyRun(study.base, seed, bases[seed], None) for seed in bases]
    return runs + [
        StudyRun(arm, seed, directory / arm.name / str(seed), origin)
        for seed, origin in bases.items()
        for arm in study.arms
    ]


def _definition(study: Study) -> dict[str, Any]:
    """What decides the numbers of a study, ready for JSON."""
    arms = {arm.name: list(arm.settings) for arm in study.all_arms}
    return {"study": study.name, "settings": list(study.settings), "arms": arms}


def _checked(study: Study, named: Settings) -> TrainConfig:
    """The configuration of the base, after every arm was found to be one that could be run."""
    # Runs stand side by side instead of threads.
    shared = named.over(load_config(overrides=["run.threads=1", *study.settings]))
    for skill in study.skills:
        if not getattr(shared.rollout, f"{skill}_prompts"):
            raise ConfigError(
                f"rollout.{skill}_prompts is 0, expected at least 1 for the study {study.name}, "
                "some of whose arms would not differ without them"
            )
    configs = [read_settings(None, arm.settings).over(shared) for arm in study.all_arms]
    for config in configs:
        check_config(config)
    return configs[0]


def _existing(directory: Path, study: Study, named: Settings, seeds: int | None) -> int:
    require_format(directory)
    try:
        record = json.loads((directory / STUDY).read_bytes())
        begun, recorded = record.pop("seeds"), record["study"]
        arms = record["arms"]
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise RunDirectoryError(f"{directory / STUDY} is damaged: give a new directory") from error
    if recorded != study.name:
        raise RunDirectoryError(
            f"{directory} has the study {recorded}, expected {study.name}: give a new directory"
        )
    definition = _definition(study)
    for arm in {**arms, **definition["arms"]}:
        if arms.get(arm) != definition["arms"].get(arm):
            raise RunDirectoryError(
                f"{directory} was begun with another arm {arm}: {_in_words(arms.get(arm))} there, "
                f"{_in_words(definition['arms'].get(arm))} here; give a new directory"
            )
    if record["settings"] != definition["settings"]:
        raise RunDirectoryError(
            f"{directory} was begun with other settings: {_in_words(record['settings'])} there, "
            f"{_in_words(definition['settings'])} here; give a new directory"
        )
    _refuse_other_settings(directory, named)
    if seeds is not None and seeds < begun:
        raise ConfigError(
            f"--seeds is {seeds}, but {directory} has {begun} seeds: give as many or more, or a "
            "new directory"
        )
    return seeds or int(begun)


def _refuse_other_settings(directory: Path, named: Settings) -> None:
    base = load_config(directory / BASE)
    ours, theirs = to_table(base), to_table(named.over(base))
    for section, values in ours.items():
        for key, value in values.items():
            if theirs[section][key] != value:
                raise ConfigError(
                    f"{directory} was begun with other settings: {section}.{key} is {value!r} "
                    f"there, {theirs[section][key]!r} here; give a new directory"
                )


def _in_words(settings: list[str] | None) -> str:
    if settings is None:
        return "none"
    return ", ".join(settings) or "the defaults"
