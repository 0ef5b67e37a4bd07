"""A run of a folder's model in several processes, against one. To be run in every rank."""

from __future__ import annotations

import dataclasses
import gc
import weakref
from collections.abc import Sequence
from pathlib import Path

import torch
from shared_runs import Told, trained
from trainer.memory_journal import MemoryJournal

from lvrpo.models.bagel import BagelPolicy
from lvrpo.models.protocol import Policy
from lvrpo.runs.config_file import load_config
from lvrpo.runs.setup import Setup
from lvrpo.trainer.placement import place_frozen, place_trained


def run(config_file: Path, overrides: Sequence[str], dtype: torch.dtype) -> Told:
    """Train a folder's model.

    Args:
        config_file: beside the folder and the data.
        overrides: of the configuration.
        dtype: that the weights are held in.
    """
    config = load_config(config_file, overrides)
    setup = Setup(config)
    parts = setup.unfitted_parts()
    task = setup.task(parts)

    def new_policy() -> Policy:
        policy = setup.new_policy(parts)
        policy.network.to(dtype)
        if isinstance(policy, BagelPolicy):
            policy.autoencoder.to(dtype)
        return policy

    return trained(config, dataclasses.replace(task, new_policy=new_policy), MemoryJournal())


def whole_parameters(config_file: Path, overrides: Sequence[str]) -> tuple[int, int]:
    """How many a policy and its reference have, and how many of these stay once they are placed."""
    config = load_config(config_file, overrides)
    setup = Setup(config)
    parts = setup.unfitted_parts()
    seen, placed = [], []
    for place in (place_trained, place_frozen):
        policy = setup.new_policy(parts)
        seen += [weakref.ref(parameter) for parameter in policy.network.parameters()]
        placed.append(place(policy, config.run))
        del policy
    gc.collect()
    return len(seen), sum(parameter() is not None for parameter in seen)
