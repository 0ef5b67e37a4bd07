"""Who is measured: the backends of lvrpo and their peers, all called the same way."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import lvrpo

#: At small size only what CI needs; compiling takes longer there than everything measured.
PROVIDERS = {"small": ("torch", "cpp"), "full": ("torch", "cpp", "torch.compile")}


@dataclass(frozen=True)
class Case:
    """One op at one shape.

    Attributes:
        op: its name in lvrpo.
        inputs: keyword arguments of `call`.
        differentiable: the inputs whose gradients are taken.
        call: call(functional, **inputs) -> tensor or tuple of tensors, for ops whose arguments or
            results are not plain tensors; None calls functional(**inputs).
        bytes_moved: by direction: what an ideal implementation reads and writes.
        flops: by direction; empty for ops that memory limits.
        peers: by provider name: another implementation with the signature of the op.
        scales: of the correctness gate, see `lvrpo.testing.check_op`.
    """

    op: str
    inputs: Mapping[str, Any]
    differentiable: tuple[str, ...] = ()
    call: Callable[..., Any] | None = None
    bytes_moved: Mapping[str, int] = field(default_factory=dict)
    flops: Mapping[str, int] = field(default_factory=dict)
    peers: Mapping[str, Callable[..., Any]] = field(default_factory=dict)
    scales: Mapping[str, Tensor | float] = field(default_factory=dict)

    def bind(self, provider: str) -> Callable[..., Any]:
        """The op as `provider` runs it, called with `inputs`."""
        functional = self.peers.get(provider)
        if functional is None:
            module = importlib.import_module(f"lvrpo.ops.{self.op}")
            backend = "cpp" if provider == "cpp" else "torch"
            functional = functools.partial(getattr(module, self.op), backend=backend)
        bound = functional if self.call is None else functools.partial(self.call, functional)
        if provider == "torch.compile":
            torch._dynamo.reset()
            return torch.compile(bound, dynamic=False)
        return bound


def version(provider: str) -> str:
    """The version that a result of `provider` belongs to."""
    return lvrpo.__version__ if provider == "cpp" else torch.__version__
