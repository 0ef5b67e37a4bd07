"""A few processes that are the ranks of a group, and run whatever function a test names.

They talk NCCL where there is a GPU for each, and gloo elsewhere.
"""

from __future__ import annotations

import datetime
import multiprocessing
import os
import tempfile
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.distributed

#: Seconds that a rank waits for the others, and that a test waits for a rank: a rank that is still
#: at it then hangs, on a machine that does other things too.
TIMEOUT, PATIENCE = 30.0, 90.0


def on_gpus(size: int) -> bool:
    """Whether each rank has a GPU of its own."""
    return torch.cuda.device_count() >= size and torch.distributed.is_nccl_available()


class Ranks:
    """The processes of a group; `run` is of one function in all of them."""

    def __init__(self, size: int, timeout: float = TIMEOUT) -> None:
        # What they import is imported once, in a server that they are forked from.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["torch", "torch.distributed.tensor", "lvrpo.distributed"])
        self._folder = tempfile.TemporaryDirectory(prefix="lvrpo-ranks-")
        self.size = size
        self._pipes: list[Connection] = []
        self._processes: list[Any] = []
        for rank in range(size):
            here, there = context.Pipe()
            arguments = there, f"{self._folder.name}/store", rank, size, timeout
            process = context.Process(target=_serve, args=arguments, daemon=True)
            process.start()
            there.close()
            self._pipes.append(here)
            self._processes.append(process)

    def run(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """What the ranks return; the first that raised, as a failure of the test.

        Args:
            function: of a module; called with these arguments.
            arguments: likewise what can be pickled.
        """
        found = self.outcomes(function, *arguments)
        for rank, result in enumerate(found):
            if isinstance(result, BaseException):
                raise AssertionError(f"rank {rank}: {getattr(result, 'trace', result)}")
        return found

    def outcomes(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """What the ranks return, or the exceptions that they raised."""
        for pipe in self._pipes:
            pipe.send((function, arguments))
        found = []
        for pipe in self._pipes:
            try:
                assert pipe.poll(PATIENCE), "a rank hangs"
                found.append(pipe.recv())
            except EOFError:
                found.append(ChildProcessError("the process has ended"))
        return found

    def close(self) -> None:
        for pipe in self._pipes:
            pipe.close()
        for process in self._processes:
            process.join(timeout=5)
            if process.is_alive():
                process.kill()
        self._folder.cleanup()


@contextmanager
def ranks(size: int, timeout: float = TIMEOUT) -> Iterator[Ranks]:
    """The ranks of a group for a while."""
    group = Ranks(size, timeout)
    try:
        yield group
    finally:
        group.close()


def _serve(pipe: Connection, store: str, rank: int, size: int, timeout: float) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    backend = "gloo"
    if on_gpus(size):
        backend, os.environ["LVRPO_CHECK"] = "nccl", "1"
        torch.cuda.set_device(rank)
        torch.set_default_device("cuda")
    torch.distributed.init_process_group(
        backend,
        init_method=f"file://{store}",
        rank=rank,
        world_size=size,
        timeout=datetime.timedelta(seconds=timeout),
    )
    while True:
        try:
            function, arguments = pipe.recv()
        except EOFError:
            break
        result: Any
        try:
            torch.manual_seed(0)
            result = function(*arguments)
        except Exception as error:
            result = error
            result.trace = traceback.format_exc()  # type: ignore[attr-defined]
        pipe.send(result)
    torch.distributed.destroy_process_group()
