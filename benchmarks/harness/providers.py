"""Who is measured: the backends of lvrpo and their peers, all called the same way."""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import lvrpo
from lvrpo import backends

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@dataclass(frozen=True)
class Peer:
    """Somebody else's implementation, called like our op.

    Attributes:
        load: imports it and returns a function with the signature and results of our op.
        package: the distribution it comes in, for its version.
        why_not: the reason that it cannot run here, or "".
        compiles: with torch.compile or an autotuner, which takes longer than all small shapes.
    """

    load: Callable[[], Callable[..., Any]]
    package: str = "torch"
    why_not: str = ""
    compiles: bool = False


@dataclass(frozen=True)
class Case:
    """One op at one shape.

    Attributes:
        op: its name in lvrpo.
        inputs: keyword arguments of `call`.
        differentiable: the inputs whose gradients are taken.
        call: call(functional, **inputs) -> tensor or tuple of tensors, for ops whose arguments or
            results are not plain tensors; None calls functional(**inputs).
        plain: the op as one writes it in PyTorch, computing in the dtype of its inputs; None takes
            backend "torch". It is the base of all comparisons, and in fp64 the truth.
        bytes_moved: by direction: what an ideal implementation reads and writes.
        flops: by direction; empty for ops that memory limits.
        peers: by provider name.
        scales: of the correctness gate, see `lvrpo.testing.check_op`.
        gate: inputs of the correctness gate, where those in fp64 would not fit into memory: some of
            the rows. None takes all.
        turns: inputs for a shape that changes with every step: each call of a provider gets the
            next ones, so that all providers of a round get the same. Empty: `inputs` every time.
        compile_plain: whether torch.compile of the plain one is a provider, too; not worth its time
            where the plain one is a single fused call.
        shape: to print; None prints that of the first tensor.
    """

    op: str
    inputs: Mapping[str, Any]
    differentiable: tuple[str, ...] = ()
    call: Callable[..., Any] | None = None
    plain: Callable[..., Any] | None = None
    bytes_moved: Mapping[str, int] = field(default_factory=dict)
    flops: Mapping[str, int] = field(default_factory=dict)
    peers: Mapping[str, Peer] = field(default_factory=dict)
    scales: Mapping[str, Tensor | float] = field(default_factory=dict)
    gate: Mapping[str, Any] | None = None
    turns: Sequence[Mapping[str, Any]] = ()
    compile_plain: bool = True
    shape: str | None = None

    @property
    def first(self) -> Tensor:
        """The tensor that names the case."""
        return next(value for value in self.inputs.values() if isinstance(value, Tensor))

    @property
    def dtype(self) -> torch.dtype:
        return self.first.dtype

    @property
    def described(self) -> str:
        return self.shape or "x".join(map(str, self.first.shape))

    def providers(self, size: str) -> dict[str, str]:
        """Every provider, the plain one first, with the reason that it cannot run here or "".

        At small size without those that compile, which takes longer than everything measured.
        """
        tensors = [value for value in self.inputs.values() if isinstance(value, Tensor)]
        found = {"torch": ""}
        for backend in backends.ALL:
            if backend.name not in found and (backend.device != "cpu" or DEVICE == "cpu"):
                found[backend.name] = "; ".join(backend.why_not(self.op, tensors))
        if size != "small" and self.compile_plain:
            found["torch.compile"] = ""
        for name, peer in self.peers.items():
            if size != "small" or not peer.compiles:
                missing = self.version(name) is None
                found[name] = f"{peer.package} is not installed" if missing else peer.why_not
        return found

    def bind(self, provider: str) -> Callable[..., Any]:
        """The op as `provider` runs it, called with `inputs`."""
        if provider in self.peers:
            functional = self.peers[provider].load()
        elif self.plain is not None and provider in ("torch", "torch.compile"):
            functional = self.plain
        else:
            module = importlib.import_module(f"lvrpo.ops.{self.op}")
            backend = "torch" if provider == "torch.compile" else provider
            functional = functools.partial(getattr(module, self.op), backend=backend)
        bound = functional if self.call is None else functools.partial(self.call, functional)
        if provider == "torch.compile":
            torch._dynamo.reset()
            return torch.compile(bound, dynamic=False)
        return bound

    def version(self, provider: str) -> str | None:
        """The version that a result of `provider` belongs to; None if it is not installed."""
        if provider in self.peers:
            try:
                return importlib.metadata.version(self.peers[provider].package)
            except importlib.metadata.PackageNotFoundError:
                return None
        return torch.__version__ if provider.startswith("torch") else lvrpo.__version__
