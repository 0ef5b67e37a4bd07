"""The processes of a run: one, or those that torchrun started."""

from __future__ import annotations

import contextlib
import datetime
from collections.abc import Iterator

import torch
import torch.distributed

from lvrpo.trainer.ranks import Ranks

#: That a process waits for the others: longer than a reward or a checkpoint of one of them takes.
TIMEOUT = datetime.timedelta(minutes=30)


@contextlib.contextmanager
def processes() -> Iterator[Ranks]:
    """Join the processes that torchrun started, if it has, and part from them at the end.

    They talk gloo about what is on the host, and NCCL about what is on GPUs, where there are some.
    """
    if torch.distributed.is_initialized() or not torch.distributed.is_torchelastic_launched():
        yield Ranks.joined()
        return
    backend = "gloo"
    if torch.cuda.is_available():
        backend = "cpu:gloo,cuda:nccl"
        local = torch.distributed.get_node_local_rank(fallback_rank=0)
        torch.cuda.set_device(local % torch.cuda.device_count())
    torch.distributed.init_process_group(backend, timeout=TIMEOUT)
    try:
        yield Ranks.joined()
    finally:
        torch.distributed.destroy_process_group()
