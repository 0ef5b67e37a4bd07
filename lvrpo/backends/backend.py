"""What an op asks of whatever runs it."""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lvrpo.backends import library
from lvrpo.kept import kept

FLOATING = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
Function = Callable[..., Any]


class Backend(ABC):
    """One way to run ops. A subclass says in what it differs; it has no state.

    A backend has either kernels, which the op calls inside its own autograd function (`op`), or the
    whole op as a differentiable function (`functional`).

    Attributes:
        name: what the argument `backend` of an op calls it.
        reads_schedule: whether its attention goes through the tiles of the mask's schedule.
        checks_arguments: whether its kernels refuse tensors whose shapes, dtypes or devices do not
            fit, by a RuntimeError.
        checks_offsets: whether they refuse offsets that do not fit likewise.
        least_capability: compute capability of the oldest GPUs that its kernels are for.
    """

    name: str
    reads_schedule = False
    checks_arguments = False
    checks_offsets = False
    least_capability: tuple[int, int] = (0, 0)

    @property
    @abstractmethod
    def device(self) -> str:
        """Type of the tensors that it runs on; "" for any."""

    def why_unavailable(self) -> str:
        """Why no op can run on it here; empty when one can."""
        return ""

    def about(self) -> str:
        """What `lvrpo.info` tells of it where it is available, after that word."""
        return ""

    @abstractmethod
    def has_kernels(self, op: str) -> bool:
        """Whether it has kernels for an op that is not made of others."""

    def implements(self, op: str) -> bool:
        """Whether this build has what it needs to run the op of this name."""
        parts = library.COMPOSITES.get(op)
        return self.has_kernels(op) if parts is None else all(map(self.implements, parts))

    def known(self, op: str, choice: str) -> Collection[str] | None:
        """The names that its kernels of an op know for a choice like "surrogate"; None for all."""
        return None

    def limit(self, op: str, arguments: Mapping[str, Any]) -> str:
        """Why these arguments are beyond what it has kernels for; empty when they are not."""
        return ""

    def why_not_dtype(self, dtype: torch.dtype) -> str:
        """Why it does not take tensors of this dtype; empty when it does."""
        if dtype.is_floating_point and dtype not in FLOATING:
            return f"dtype {dtype} is not supported"
        return ""

    def why_not(
        self,
        op: str,
        tensors: Sequence[Tensor] = (),
        choices: Mapping[str, str] | None = None,
        arguments: Mapping[str, Any] | None = None,
    ) -> list[str]:
        """Reasons that it cannot run `op` on these inputs, empty when it can; see `resolve`."""
        if not self.implements(op):
            return [f"{op} has no {self.name} kernel"]
        if self.why_unavailable():
            return [self.why_unavailable()]
        reasons = [*_unknown(self, op, tuple(choices.items()))] if choices else []
        if arguments is not None and (limit := self.limit(op, arguments)):
            reasons.append(limit)
        for device in dict.fromkeys([tensor.device for tensor in tensors]):
            if device.type != self.device:
                needed = self.device.upper()
                reasons.append(f"it runs on {needed} tensors, got one on {device}")
                break
        for dtype in dict.fromkeys([tensor.dtype for tensor in tensors]):
            if reason := self.why_not_dtype(dtype):
                reasons.append(reason)
                break
        on_gpu = bool(tensors) and tensors[0].device.type == "cuda"
        if not reasons and on_gpu and self.least_capability > (0, 0):
            found = _capability(tensors[0].device.index)
            if found < self.least_capability:
                least, own = (".".join(map(str, x)) for x in (self.least_capability, found))
                reasons.append(
                    f"its kernels are for GPUs of compute capability {least} and newer, got {own}"
                )
        return reasons

    def op(self, name: str) -> Function:
        """What runs the kernels of `torch.ops.lvrpo.<name>`; choices go by keyword, as names."""
        raise NotImplementedError(f"{self.name} runs whole ops (`functional`), asked for {name}")

    def chosen(self, name: str, choices: Mapping[str, str]) -> Function:
        """What `op` gives, with these choices made."""
        return functools.partial(self.op(name), **choices)

    def functional(self, op: str, reference: Function) -> Function | None:
        """The whole op, a differentiable function of the reference's arguments; None: `op` runs it.

        Args:
            op: its name.
            reference: what has its definition.
        """
        return None

    def scaled(self, gradient: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
        """A gradient times a factor [] on its device, in `dtype`; it may be written to."""
        # On the CPU the caller has read the factor, and none of 1 comes here. A GPU's is not read:
        # this passes over the gradient for 1 too, which a kernel that looks at it first does not.
        return gradient.mul_(factor).to(dtype)

    def fused(self, op: str) -> Function | None:
        """A launcher that does by itself what an op made of others does in steps; or None."""
        return None


@kept
def _unknown(backend: Backend, op: str, choices: tuple[tuple[str, str], ...]) -> tuple[str, ...]:
    """Which names of choices none of the kernels of an op knows, in words."""
    reasons = []
    parts = library.COMPOSITES.get(op, (op,))
    for choice, name in choices:
        known: list[str] = []
        for part in parts:
            names = backend.known(part, choice)
            if names is None or name in names:
                break
            known += names
        else:
            listed = ", ".join(known) or "none"
            reasons.append(f"{choice} {name!r} has no {backend.name} kernel; known: {listed}")
    return tuple(reasons)


def _capability(device: int | None) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


# As in `library.has_module`: tracing a graph meets no GPU whose capability changes.
_capability._dynamo_marked_constant = True  # type: ignore[attr-defined]
