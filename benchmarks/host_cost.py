"""What a call costs the host, in microseconds of CPU time, where the arithmetic takes none.

The least of many short samples of one thread's clock, so that what else the machine does matters
little. Beside it, what of that is the C++ op itself, called with everything made and checked.

    python benchmarks/host_cost.py
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from bench_dispatch import NULL, OPS
from harness.null_launch import null_driver, unread
from torch.utils._python_dispatch import TorchDispatchMode

import lvrpo

CALLS, SAMPLES = 20, 500


def least(function: Callable[[], Any]) -> float:
    """Microseconds of CPU time of a call."""
    for _ in range(CALLS):
        function()
    best = float("inf")
    for _ in range(SAMPLES):
        began = time.thread_time_ns()
        for _ in range(CALLS):
            function()
        best = min(best, (time.thread_time_ns() - began) / CALLS / 1e3)
    return best


class Recorded(TorchDispatchMode):
    """The last op of lvrpo, and what it was called with."""

    def __torch_dispatch__(
        self, op: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if op.namespace == "lvrpo":
            self.op, self.arguments = op, args
        return op(*args, **kwargs or {})


def own_op(call: Callable[[], Any]) -> float:
    """Of the op that a call ends in."""
    with torch.no_grad(), Recorded() as found:
        call()
    with torch.no_grad():
        return least(lambda: found.op(*found.arguments))


def rows(name: str) -> Iterator[tuple[str, float]]:
    """What is measured, and its microseconds."""
    make, differentiable = OPS[name]
    op, inputs = getattr(lvrpo, name), make()
    with torch.no_grad():
        yield "the C++ op alone", own_op(lambda: op(**inputs, backend="cpp"))
        yield "C++, without a graph", least(lambda: op(**inputs, backend="cpp"))
    inputs |= {leaf: inputs[leaf].requires_grad_() for leaf in differentiable}
    leaves = [inputs[leaf] for leaf in differentiable]
    if leaves:
        yield "C++, with a graph", least(lambda: op(**inputs, backend="cpp"))
        yield (
            "C++, and backward",
            least(lambda: torch.autograd.grad(op(**inputs, backend="cpp").loss, leaves)),
        )
    with null_driver(), unread():
        yield "Triton, without a launch", least(lambda: op(**inputs, backend=NULL.name))


def main() -> None:
    """Print a table."""
    torch.set_num_threads(1)
    for name in ("grpo_loss", "normalize_advantages"):
        for what, cost in rows(name):
            print(f"| `{name}` | {what} | {cost:.1f} |", flush=True)


if __name__ == "__main__":
    main()
