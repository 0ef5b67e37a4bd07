"""A tiny run of several processes, against one. To be run in every rank."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from runs.tiny import tiny_config
from torch import Tensor
from trainer.memory_journal import MemoryJournal

from lvrpo.models.protocol import Policy
from lvrpo.rewards.reward import FunctionReward, Samples
from lvrpo.runs.setup import Setup
from lvrpo.runs.signals import Signals
from lvrpo.trainer import loop, update
from lvrpo.trainer.config import TrainConfig
from lvrpo.trainer.journal import Snapshot
from lvrpo.trainer.loop import train
from lvrpo.trainer.placement import whole_tensor
from lvrpo.trainer.ranks import Ranks
from lvrpo.trainer.task import Rewards, Task


class Told(NamedTuple):
    """What a rank was told of a run."""

    rows: Sequence[Mapping[str, Any]]
    sampled: Sequence[Sequence[list[int]]]  # tokens of the answers that each step learned from
    evals: Mapping[tuple[str, int], Any]
    saved: Sequence[Snapshot]
    references: Sequence[Snapshot]
    error: str = ""


def task_of(folder: Path, overrides: Sequence[str], reward: str = "") -> Task:
    """In fp64, so that what differs is more than rounding, unless the run computes in bf16."""
    setup = Setup(tiny_config(*overrides))
    parts = Setup(tiny_config()).frozen_parts(folder)
    dtype = torch.float64 if setup.config.run.precision == "fp32" else torch.float32
    parts.family.autoencoder.to(dtype)
    task = setup.task(parts)

    def new_policy() -> Policy:
        policy = setup.new_policy(parts)
        policy.module.to(dtype)
        return policy

    make = (lambda reference: rewards_of(reward)) if reward else task.make_rewards
    return dataclasses.replace(task, new_policy=new_policy, make_rewards=make)


def run(
    folder: Path,
    overrides: Sequence[str] = (),
    reward: str = "",
    saved: tuple[Sequence[Snapshot], Sequence[Snapshot]] = ((), ()),
    equal_passes: bool = False,
) -> Told:
    """Train, or go on from what was saved.

    Args:
        folder: of the parts that every run has.
        overrides: of the tiny configuration.
        reward: of answers, in place of those of the configuration, see `rewards_of`.
        saved: snapshots, and references.
        equal_passes: as if ranks had parts of the parameters.
    """
    journal = MemoryJournal()
    journal.saved, journal.references = map(list, saved)
    task = task_of(folder, overrides, reward)
    return trained(tiny_config(*overrides), task, journal, equal_passes)


def trained(
    config: TrainConfig, task: Task, journal: MemoryJournal, equal_passes: bool = False
) -> Told:
    """Train, and tell what the journal was told, with what each step learned from."""
    sampled = []
    gather = loop.gather_experience

    def told(*arguments: Any) -> Any:
        experience, metrics = gather(*arguments)
        sampled.append(experience.answers.token_ids if experience.answers else [])
        return experience, metrics

    error = ""
    parts = update.has_parts if not equal_passes else lambda module: True
    with (
        mock.patch.object(loop, "gather_experience", told),
        mock.patch.object(update, "has_parts", parts),
    ):
        try:
            train(config, task, journal, Signals(), Ranks.joined())
        except Exception as raised:
            error = f"{type(raised).__name__}: {raised}"
    saved_since = [list(map(whole, part)) for part in (journal.saved, journal.references)]
    return Told(journal.rows, sampled, journal.evals, *saved_since, error)


def whole(snapshot: Snapshot) -> Snapshot:
    """With all of its tensors on every rank."""
    tensors = {name: whole_tensor(tensor) for name, tensor in snapshot.tensors.items()}
    return Snapshot(snapshot.step, tensors)


def text_length(samples: Samples) -> list[float]:
    return [float(len(text or "")) for text in samples.texts]


def brightness(samples: Samples) -> Tensor:
    assert samples.images is not None
    return samples.images.flatten(1).mean(dim=1)


def failing(samples: Samples) -> list[float]:
    """On the last rank."""
    if torch.distributed.is_initialized() and torch.distributed.get_rank() > 0:
        raise KeyError("no such sample")
    return [0.5] * len(samples)


def constant(samples: Samples) -> list[float]:
    """The same of all samples of every second prompt, or so."""
    pairs = zip(samples.examples, samples.texts, strict=True)
    return [float(len(example.prompt) % 2 * len(text or "")) for example, text in pairs]


def rewards_of(name: str) -> Rewards:
    """Of both skills."""
    functions = {"length": text_length, "failing": failing, "constant": constant}
    return {
        "understand": {name: FunctionReward(functions[name], name)},
        "generate": {"brightness": FunctionReward(brightness, "brightness")},
    }
