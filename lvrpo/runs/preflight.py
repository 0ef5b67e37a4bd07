"""Refuse a run that could not be run, before its directory exists or an hour has passed.

Whoever uses a value also checks it: what is made here is what the run uses.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterator
from itertools import chain

import torch
import torch.distributed

from lvrpo import backends
from lvrpo.data.example import SKILLS
from lvrpo.data.sources import LabelErrors
from lvrpo.params.advantages import AdvantageParams
from lvrpo.planning import memory
from lvrpo.planning.memory import Numerics
from lvrpo.rewards.registry import BUILT_IN, reward_label
from lvrpo.runs.family import LaidOutPolicy
from lvrpo.runs.probe import probe_rewards
from lvrpo.runs.setup import Data, Setup, used_rewards
from lvrpo.runs.trackers import check_tracker
from lvrpo.trainer.config import ConfigError, TrainConfig
from lvrpo.trainer.objective import Objective
from lvrpo.trainer.placement import run_device
from lvrpo.trainer.schedule import flow_schedule


def check_config(config: TrainConfig) -> Setup:
    """Build whatever reads the configuration, the data and the user's rewards included.

    Returns:
        The parts of the run, so that files are read once.

    Raises:
        ConfigError: a value is wrong; the message starts with its section.
        DataError: a line or picture of a JSONL file is wrong.
        RewardError: a reward cannot be imported, or fails or says nothing on the training data.
    """
    device = run_device(config.run.device)
    _check_backend(config.run.backend, device)
    _check_ranks(config)
    check_tracker(config.run.tracker)
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
        setup = Setup(config)
        _check_data(config, setup.data)
    with _named("model"):
        setup.family.check(setup.data)
    with _named("rewards"):
        _check_rewards(setup)
    _check_curriculum(setup)
    with _named("model"):
        parts = setup.unfitted_parts()
        with torch.device("meta"):
            policy = setup.new_policy(parts)
        _check_memory(setup, policy, device)
    _check_stop_tokens(config, policy)
    with _named("rewards"):
        probe_rewards(setup, parts)
    return setup


def _check_ranks(config: TrainConfig) -> None:
    """Refuse more processes than an update has groups for."""
    size = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    rollout, count = config.rollout, config.optimizer.minibatches
    groups = rollout.understand_prompts // count + rollout.generate_prompts // count
    if size > groups and config.run.objective == "grpo":
        raise ConfigError(
            f"rollout.understand_prompts is {rollout.understand_prompts} and "
            f"rollout.generate_prompts {rollout.generate_prompts}, in optimizer.minibatches = "
            f"{count}: an update has {groups} groups for {size} processes, expected one each at "
            "least"
        )


def _check_curriculum(setup: Setup) -> None:
    """Let the hook choose the prompts of a first step."""
    if setup.curriculum is None:
        return
    for skill in SKILLS:
        count = getattr(setup.config.rollout, f"{skill}_prompts")
        drawn = setup.data.source.examples("train", skill, count * setup.curriculum.pool, 0)
        if drawn:
            setup.curriculum.pick(drawn, count, 1)


def _check_backend(name: str, device: torch.device) -> None:
    """Refuse a backend that does not exist, or that has nothing to train with on the device."""
    given = f"run.backend is {name!r}"
    if not name:
        name = os.environ.get("LVRPO_BACKEND", "")
        given = f"LVRPO_BACKEND is {name!r} in the environment, over which run.backend wins"
    if not name:
        return
    known = [backend.name for backend in backends.ALL]
    if name not in known:
        raise ConfigError(f'{given}, expected one of {", ".join(known)}, or "" for the first')
    backend = backends.named(name)
    why_not = backend.why_not("linear_grpo_loss", [torch.empty(0, device=device)])
    if reason := backend.why_unavailable() or "; ".join(why_not):
        raise ConfigError(f"{given}, which cannot run here: {reason}")


def _check_memory(setup: Setup, policy: LaidOutPolicy, device: torch.device) -> None:
    """Refuse a model whose weights, reference, gradient and moments do not fit into a process."""
    counted = setup.family.parameters(policy)
    section = setup.config.optimizer
    kept = section.minibatches * section.updates_per_rollout > 1
    run, ranks = setup.config.run, 1
    if run.shard and torch.distributed.is_initialized():
        ranks = torch.distributed.get_world_size()
    numerics = Numerics(2 if run.precision == "bf16" else 4)
    needed = sum(memory.state(counted, numerics, ranks=ranks, kept=kept).values())
    owner, there = "this machine", os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if device.type == "cuda":
        owner, there = str(device), torch.cuda.get_device_properties(device).total_memory
    if needed > there:
        raise ConfigError(
            f"{setup.family.described} make {counted.total:,} parameters, whose training needs "
            f"{math.ceil(needed / 2**30):,} GiB at least; {owner} has {there / 2**30:.0f} GiB"
        )


def _check_stop_tokens(config: TrainConfig, policy: LaidOutPolicy) -> None:
    """Refuse tokens that no answer can have."""
    low, high = policy.answer_range
    for token in config.rollout.stop_token_ids:
        if not low <= token < high:
            raise ConfigError(
                f"rollout.stop_token_ids has {token}, expected tokens in [{low}, {high}), of which "
                "answers are sampled"
            )


def _check_data(config: TrainConfig, data: Data) -> None:
    """See that there are prompts, and something to imitate."""
    to_imitate = []
    for skill in SKILLS:
        prompts = getattr(config.rollout, f"{skill}_prompts")
        data.source.examples("train", skill, min(1, prompts), 0)
        batch = getattr(config.warm_start, f"{skill}_batch")
        to_imitate += data.source.labelled(skill, min(1, batch), LabelErrors(), 0)
    is_supervised = config.run.objective == "supervised"
    if (config.warm_start.steps or is_supervised) and not to_imitate:
        steps = f"warm_start.steps is {config.warm_start.steps}"
        given = "run.objective is 'supervised'" if is_supervised else steps
        raise ConfigError(f"{given}, but the training data has no answer and no target to imitate")


def _check_rewards(setup: Setup) -> None:
    """See that every reward exists and applies to the data.

    Raises:
        ConfigError: an unknown name, two of one name, or one that needs what the data lacks.
        RewardError: a reward of the user's cannot be imported.
    """
    labels: dict[str, str] = {}
    for name in sorted(set(chain.from_iterable(used_rewards(setup.config).values()))):
        other = labels.setdefault(reward_label(name), name)
        if other != name:
            raise ConfigError(
                f"rewards: {other!r} and {name!r} would both be reported as "
                f"{reward_label(name)!r}; rename one of the files"
            )
        if ":" not in name and name not in BUILT_IN:
            raise ConfigError(
                f"rewards: unknown reward {name!r}; expected one of {', '.join(BUILT_IN)} or "
                "'module:function'"
            )
    in_use = sorted({*labels.values(), *setup.config.rewards.right.values()})
    for name in setup.config.rewards.arguments:
        if name not in in_use:
            raise ConfigError(
                f"rewards.arguments has {name!r}, expected the name of a reward in use: "
                f"{', '.join(in_use)}"
            )
    _ = setup.checks  # a reward that cannot say what is right is refused here
    for rewards in setup.rewards.values():
        for label, reward in rewards.items():
            if "encoder" in reward.needs and setup.data.new_encoder() is None:
                raise ConfigError(
                    f"rewards: {label} comes with an encoder of digit scenes; with data.source = "
                    f"{setup.config.data.source!r} set rewards.generate to r_ins where drawings "
                    "have rules, or to a reward of your own ('module:function')"
                )


@contextlib.contextmanager
def _named(section: str) -> Iterator[None]:
    """Say in which section a value is that an op or a model refused."""
    try:
        yield
    except ValueError as error:
        # Errors with a class of their own name a key, a file or a reward already.
        if type(error) is ValueError:
            named = str(error).startswith(f"{section}.")
            raise ConfigError(str(error) if named else f"[{section}] {error}") from error
        raise
