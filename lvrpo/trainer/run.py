"""What the commands do with a run directory: open it, train in it, and use what it learned."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from lvrpo.data.example import Example
from lvrpo.data.jsonl import DataError, load_picture
from lvrpo.models.policy import Policy
from lvrpo.trainer.checkpoint import CheckpointError, load_newest, write_text
from lvrpo.trainer.config import ConfigError, TrainConfig, load_config, to_table, to_toml
from lvrpo.trainer.environment import write_environment
from lvrpo.trainer.evaluate import evaluate
from lvrpo.trainer.loop import Listener, train
from lvrpo.trainer.preflight import check_config
from lvrpo.trainer.progress import ProgressView
from lvrpo.trainer.records import eval_scores
from lvrpo.trainer.rollout import sample_answers, sample_pictures
from lvrpo.trainer.run_directory import RunDirectoryError, locked
from lvrpo.trainer.schedule import flow_schedule
from lvrpo.trainer.sources import Source
from lvrpo.trainer.state import fingerprint, load_weights
from lvrpo.trainer.statistics import wilson_interval
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
        return train(config, task, run.directory, Listener(view.progress, view.message))


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


def evaluate_run(directory: Path, *, items: int, seed: int, data: Path | None) -> list[str]:
    """Lines with the score of a run on held-out prompts, or on a JSONL file."""
    config, task, policy = load_policy(directory)
    if data is not None:
        task.use_evaluation_file(data)
    row, _ = evaluate(
        policy,
        task,
        config.rollout,
        flow_schedule(config.rollout),
        items=items,
        gallery_items=0,
        seed=seed,
    )
    if not row:
        raise DataError(f"{data}: nothing to judge, no example has an answer or a rule")
    lines = []
    for found in eval_scores(row):
        low, high = wilson_interval(found.successes, found.total)
        rate = found.successes / found.total
        lines.append(f"{found.name:<32} {rate:6.1%}  [{low:.1%}, {high:.1%}]  of {found.total}")
    return lines


def draw_prompt(directory: Path, prompt: str, *, count: int, seed: int, output: Path) -> list[Path]:
    """Draw a prompt `count` times into PNG files, `name-1.png`, ... for more than one."""
    config, _, policy = load_policy(directory)
    example = Example("generate", "command line", prompt)
    schedule = flow_schedule(config.rollout)
    drawn = sample_pictures(policy, [example], count, schedule, seed=seed, step=0).images
    paths = []
    for number, picture in enumerate(drawn.numpy(), start=1):
        path = output if count == 1 else output.with_stem(f"{output.stem}-{number}")
        try:
            save_enlarged(picture, path)
        except (OSError, ValueError) as error:
            raise RunDirectoryError(f"{path}: cannot be written: {error}") from error
        paths.append(path)
    return paths


def save_enlarged(picture: np.ndarray, path: Path) -> None:
    """Write a [C, H, W] picture, small ones with pixels as squares."""
    from PIL import Image

    pixels = (picture * 255).round().astype(np.uint8)
    image = Image.fromarray(pixels[0] if len(pixels) == 1 else pixels.transpose(1, 2, 0))
    scale = max(1, 128 // image.height)
    size = image.width * scale, image.height * scale
    image.resize(size, Image.Resampling.NEAREST).save(path)


def answer_question(
    directory: Path, question: str, image: Path, *, count: int, seed: int
) -> list[str]:
    """Sample `count` answers to a question about an image file."""
    config, task, policy = load_policy(directory)
    try:
        pixels = load_picture(image, task.source.picture_shape)
    except Exception as error:  # Pillow raises a different class for every broken format
        raise DataError(f"{image}: cannot be read: {error}") from error
    example = Example("understand", "command line", question, image=pixels, answer="")
    return sample_answers(
        policy,
        [example],
        count,
        max_tokens=config.rollout.max_answer_tokens,
        temperature=config.rollout.temperature,
        seed=seed,
        step=0,
    ).texts
