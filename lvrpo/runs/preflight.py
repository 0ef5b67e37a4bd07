"""Refuse a run that could not be run, before its directory exists or an hour has passed.

Whoever uses a value also checks it: here every such part is built once, and thrown away.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterator
from typing import get_args

import torch

from lvrpo.data.example import SKILLS
from lvrpo.data.sources import JsonlSource, Source
from lvrpo.models.unified.latents import LinearAutoencoder
from lvrpo.models.unified.model import UnifiedConfig, UnifiedModel
from lvrpo.params.advantages import AdvantageParams
from lvrpo.runs.probe import probe_rewards
from lvrpo.runs.rewards import check_rewards
from lvrpo.runs.setup import Task
from lvrpo.trainer.config import Backend, ConfigError, TrainConfig
from lvrpo.trainer.objective import Objective
from lvrpo.trainer.schedule import flow_schedule


def check_config(config: TrainConfig) -> Source:
    """Build whatever reads the configuration, the data and the user's rewards included.

    Returns:
        The source of the prompts, so that files are read once.

    Raises:
        ConfigError: a value is wrong; the message starts with its section.
        DataError: a line or picture of a JSONL file is wrong.
        RewardError: a reward cannot be imported, or fails or says nothing on the training data.
    """
    from_environment = os.environ.get("LVRPO_BACKEND", "")
    if not config.run.backend and from_environment not in get_args(Backend):
        raise ConfigError(
            f"LVRPO_BACKEND is {from_environment!r} in the environment, expected cpp, torch, or "
            "unset; run.backend wins over it"
        )
    with _named("rollout"):
        schedule = flow_schedule(config.rollout)
    if config.rollout.generate_prompts and not schedule.stochastic_steps:
        raise ConfigError(
            f"rollout.dynamics is {config.rollout.dynamics!r} with rollout.noise_level "
            f"{config.rollout.noise_level:g}: no step is stochastic, so drawings teach nothing"
        )
    with _named("loss"):
        Objective.from_config(config)
        AdvantageParams.preset(config.rewards.advantage, clip=config.loss.advantage_clip)
    with _named("data"):
        source = _source_with_prompts(config)
    _check_patches(config, source.picture_shape)
    with _named("model"):
        section = config.model
        autoencoder = LinearAutoencoder(
            *source.picture_shape, patch=section.latent_patch, dim=section.latent_dim
        )
        _check_memory(Task(config, source, autoencoder, None).model_config())
    with _named("rewards"):
        check_rewards(config, source)
        probe_rewards(config, source, autoencoder)
    return source


def _check_patches(config: TrainConfig, picture_shape: tuple[int, int, int]) -> None:
    section = config.model
    channels, height, width = picture_shape
    for key in ("image_patch", "latent_patch"):
        patch = getattr(section, key)
        if height % patch or width % patch:
            raise ConfigError(
                f"model.{key} is {patch}, which does not tile pictures of {height} x {width} pixels"
            )
    numbers = channels * section.latent_patch**2
    if section.latent_dim > numbers:
        raise ConfigError(
            f"model.latent_dim is {section.latent_dim}, expected 1 to {numbers}, the numbers of a "
            f"patch of {channels} x {section.latent_patch} x {section.latent_patch}"
        )


def _check_memory(shape: UnifiedConfig) -> None:
    """Refuse a model whose weights, reference, average, gradient and moments cannot be held."""
    with torch.device("meta"):
        parameters = sum(weight.numel() for weight in UnifiedModel(shape).parameters())
    needed = 6 * 4 * parameters
    there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > there:
        raise ConfigError(
            f"model.hidden = {shape.hidden}, model.mlp = {shape.mlp} and model.layers = "
            f"{shape.layers} make {parameters:,} parameters, whose training needs "
            f"{math.ceil(needed / 2**30):,} GiB at least; this machine has {there / 2**30:.0f} GiB"
        )


def _source_with_prompts(config: TrainConfig) -> Source:
    source = Source.from_config(config.data)
    to_imitate = []
    for task in SKILLS:
        prompts = getattr(config.rollout, f"{task}_prompts")
        source.examples("train", task, min(1, prompts), 0)
        batch = getattr(config.warm_start, f"{task}_batch")
        to_imitate += source.labelled(task, min(1, batch), 0.0, 0)
    if config.warm_start.steps and not to_imitate:
        raise ConfigError(
            f"warm_start.steps is {config.warm_start.steps}, but the training data has no answer "
            "and no target to imitate"
        )
    if isinstance(source, JsonlSource):
        source.check_pictures()
    return source


@contextlib.contextmanager
def _named(section: str) -> Iterator[None]:
    """Say in which section a value is that an op or a model refused."""
    try:
        yield
    except ValueError as error:
        # Errors with a class of their own name a key, a file or a reward already.
        if type(error) is ValueError:
            raise ConfigError(f"[{section}] {error}") from error
        raise
