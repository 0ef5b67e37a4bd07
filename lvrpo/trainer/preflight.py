"""Refuse a run that could not be run, before its directory exists or an hour has passed.

Whoever uses a value also checks it: here every such part is built once, and thrown away.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from lvrpo.data.example import TASKS
from lvrpo.models.latents import LinearAutoencoder
from lvrpo.ops.normalize_advantages import AdvantageParams
from lvrpo.trainer.config import ConfigError, TrainConfig
from lvrpo.trainer.schedule import flow_schedule
from lvrpo.trainer.sources import Source
from lvrpo.trainer.task import Task, check_rewards
from lvrpo.trainer.update import Objective

#: The trainer has no other device.
CPU_BACKENDS = ("cpp", "torch")


def check_config(config: TrainConfig) -> Source:
    """Build whatever reads the configuration, the data and the user's rewards included.

    Returns:
        The source of the prompts, so that files are read once.

    Raises:
        ConfigError: a value is wrong; the message starts with its section.
        DataError: a line or picture of a JSONL file is wrong.
        RewardError: a reward cannot be imported.
    """
    if config.run.backend not in ("", *CPU_BACKENDS):
        raise ConfigError(
            f"run.backend is {config.run.backend!r}, expected one of {', '.join(CPU_BACKENDS)}, or "
            "empty for the first that can run"
        )
    with _named("rollout"):
        schedule = flow_schedule(config.rollout)
    if config.rollout.generate_prompts and not schedule.stochastic_steps:
        raise ConfigError(
            f"rollout.dynamics is {config.rollout.dynamics!r} with noise_level "
            f"{config.rollout.noise_level:g}: no step is stochastic, so drawings teach nothing"
        )
    with _named("loss"):
        Objective.from_config(config)
        AdvantageParams.preset(config.rewards.advantage, clip=config.loss.advantage_clip)
    with _named("data"):
        source = _source_with_prompts(config)
    section = config.model
    _, height, width = source.picture_shape
    if height % section.image_patch or width % section.image_patch:
        raise ConfigError(
            f"model.image_patch is {section.image_patch}, which does not tile pictures of "
            f"{height} x {width} pixels"
        )
    with _named("model"):
        autoencoder = LinearAutoencoder(
            *source.picture_shape, patch=section.latent_patch, dim=section.latent_dim
        )
        Task(config, source, autoencoder, None).model_config()
    with _named("rewards"):
        check_rewards(config, source)
    return source


def _source_with_prompts(config: TrainConfig) -> Source:
    source = Source.from_config(config.data)
    to_imitate = []
    for task in TASKS:
        prompts = getattr(config.rollout, f"{task}_prompts")
        source.examples("train", task, min(1, prompts), 0)
        batch = getattr(config.warm_start, f"{task}_batch")
        to_imitate += source.labelled(task, min(1, batch), 0.0, 0)
    if config.warm_start.steps and not to_imitate:
        raise ConfigError(
            f"warm_start.steps is {config.warm_start.steps}, but the training data has no answer "
            "and no target to imitate"
        )
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
