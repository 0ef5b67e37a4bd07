"""The Triton kernels: on a GPU, or on the CPU in Triton's interpreter."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lvrpo.backends import library, row_loss
from lvrpo.backends.backend import Backend, Function
from lvrpo.testing import interpreter_has_bf16

INSTALLED = importlib.util.find_spec("triton") is not None
NO_BF16 = (
    "Triton's interpreter multiplies the bit patterns of bf16 "
    "(inside lvrpo.testing.interpreter_with_bf16() it does not)"
)


class TritonBackend(Backend):
    """`kernels/`, on whatever device Triton runs on here."""

    name = "triton"
    reads_schedule = True
    # Older GPUs have half the shared memory that tiles of attention take, and no bf16.
    least_capability = (8, 0)

    @property
    def device(self) -> str:
        """Of a GPU; in the interpreter, of the CPU."""
        return "cpu" if triton_interprets() else "cuda"

    def why_unavailable(self) -> str:
        """What is missing: Triton, or a GPU."""
        if not INSTALLED:
            return "triton is not installed (pip install lvrpo[triton])"
        if not torch.cuda.is_available() and not triton_interprets():
            return (
                "torch sees no GPU (TRITON_INTERPRET=1 tests the kernels on the CPU, not in bf16)"
            )
        return ""

    def about(self) -> str:
        """What the interpreter lacks."""
        return f" in the interpreter, but for bf16: {NO_BF16}" if triton_interprets() else ""

    def has_kernels(self, op: str) -> bool:
        """Whether `lvrpo.kernels` has a launcher."""
        return not library.KERNELS["triton"].isdisjoint((op, f"{op}_fwd"))

    def known(self, op: str, choice: str) -> Sequence[str]:
        """Those that the launcher's file lists."""
        return _names_in_kernels(op, choice)

    def limit(self, op: str, arguments: Mapping[str, Any]) -> str:
        """Attention holds a tile of whole heads."""
        if op != "packed_attention":
            return ""
        q, v = arguments["q"], arguments["v"]
        width, widest = max(q.shape[2], v.shape[2]), 128 if q.dtype == torch.float64 else 256
        return f"its heads are up to {widest} wide, got {width}" if width > widest else ""

    def why_not_dtype(self, dtype: torch.dtype) -> str:
        """As `Backend.why_not_dtype`; in the interpreter, bf16 too."""
        if dtype == torch.bfloat16 and triton_interprets() and not interpreter_has_bf16():
            return NO_BF16
        return super().why_not_dtype(dtype)

    def op(self, name: str) -> Function:
        """The Triton overload of `torch.ops.lvrpo.<name>`."""
        function: Function = getattr(torch.ops.lvrpo, f"{name}_triton")
        return function

    def chosen(self, name: str, choices: Mapping[str, str]) -> Function:
        """As `Backend.chosen`."""
        function = getattr(torch.ops.lvrpo, f"{name}_triton").default
        names = tuple(choices[argument] for argument in library.CHOICE_ARGUMENTS[name])
        return lambda *arguments: function(*arguments, *names)

    def scaled(self, gradient: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
        """As `Backend.scaled`, at most once over the gradient, and not at all where it is 1."""
        module = importlib.import_module("lvrpo.kernels.logits_grpo_loss")
        scaled: Tensor = module.scale_gradient(gradient, factor, dtype)
        return scaled

    def fused(self, op: str) -> Function | None:
        """What runs the kernel that has a whole row, where there is one."""
        has_rows = f"{op}_rows" in library.KERNELS["triton"]
        return functools.partial(row_loss.run, self) if has_rows else None


def _names_in_kernels(op: str, choice: str) -> tuple[str, ...]:
    if not library.has_module(op):
        return ()
    kernels = importlib.import_module(f"lvrpo.kernels.{op}")
    names: dict[str, tuple[str, ...]] = getattr(kernels, "CHOICES", {})
    return names.get(choice, ())


# What torch.compiler.assume_constant_result sets, which would import torch._dynamo with lvrpo: a
# graph that is traced imports nothing, and the names do not change.
_names_in_kernels._dynamo_marked_constant = True  # type: ignore[attr-defined]


def triton_interprets() -> bool:
    """Whether Triton runs kernels in its interpreter, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET") == "1"
