"""Where a policy is."""

from __future__ import annotations

import torch
import torch.distributed

from lvrpo.trainer.config import ConfigError


def run_device(name: str) -> torch.device:
    """The device that `run.device` names, for this process.

    Args:
        name: "" for the CPU, or "cpu", "cuda" or "cuda:N"; "cuda" is the GPU of the process's rank
            on its node under torchrun, and else the first.

    Raises:
        ConfigError: there is no such device here.
    """
    given = f"run.device is {name!r}"
    kind, colon, index = name.partition(":")
    if kind not in ("", "cpu", "cuda") or (colon and not (kind == "cuda" and index.isdecimal())):
        raise ConfigError(f"{given}, expected '' or 'cpu', 'cuda' or 'cuda:N'")
    if kind != "cuda":
        return torch.device("cpu")
    started = torch.distributed.is_torchelastic_launched()
    if colon and started:
        raise ConfigError(
            f"{given}, expected 'cuda' under torchrun: every process has a GPU of its own"
        )
    local = torch.distributed.get_node_local_rank(fallback_rank=0)
    number = int(index) if colon else local
    there = torch.cuda.device_count()
    if number >= there:
        needs = f"process {local} of this node needs GPU {number}" if started else f"GPU {number}"
        raise ConfigError(
            f"{given}, expected a GPU that is there: {needs}, torch sees {there} of them; '' is "
            "the CPU"
        )
    return torch.device("cuda", number)
