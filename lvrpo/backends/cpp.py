"""The kernels that are compiled into `lvrpo._C`: those of the CPU."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lvrpo.backends import library, row_loss
from lvrpo.backends.backend import Backend, Function
from lvrpo.kept import kept


class CompiledBackend(Backend):
    """Kernels of `lvrpo._C` for one kind of device.

    Attributes:
        key: the dispatch key that they are registered for.
        namespace: of `torch.ops`.
    """

    key: str
    namespace = "lvrpo"
    checks_arguments = True

    def why_unavailable(self) -> str:
        """That the extension is missing, if it is."""
        return library.MISSING

    def has_kernels(self, op: str) -> bool:
        """Whether the extension was built with some."""
        return not library.KERNELS[self.key].isdisjoint((op, f"{op}_fwd"))

    def why_not(
        self,
        op: str,
        tensors: Sequence[Tensor] = (),
        choices: Mapping[str, str] | None = None,
        arguments: Mapping[str, Any] | None = None,
    ) -> list[str]:
        """As `Backend.why_not`; without an extension that is the reason, whatever the op."""
        if library.MISSING:
            return [library.MISSING]
        return super().why_not(op, tensors, choices, arguments)

    def known(self, op: str, choice: str) -> Sequence[str]:
        """Those that the extension lists."""
        return library.CHOICES.get(op, {}).get(choice, ())

    def op(self, name: str) -> Function:
        """`torch.ops.lvrpo.<name>`, which picks the kernel by the device of the tensors."""
        function = self._overload(name)
        if not library.CHOICE_ARGUMENTS.get(name):
            return function

        def run(*arguments: Any, **choices: str) -> Any:
            return function(*arguments, *_positions(name, tuple(choices.items())))

        return run

    def chosen(self, name: str, choices: Mapping[str, str]) -> Function:
        """As `Backend.chosen`; the names are looked up now."""
        function = self._overload(name)
        at = _positions(name, tuple(choices.items()))
        return lambda *arguments: function(*arguments, *at)

    def _overload(self, name: str) -> Function:
        function: Function = getattr(getattr(torch.ops, self.namespace), name).default
        return function

    def scaled(self, gradient: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
        """As `Backend.scaled`; where there is a kernel, once over dense memory at most."""
        if not self.has_kernels("scale_gradient") or not gradient.is_contiguous():
            return super().scaled(gradient, factor, dtype)
        scaled = gradient if gradient.dtype == dtype else torch.empty_like(gradient, dtype=dtype)
        self.op("scale_gradient")(scaled, gradient, factor)
        return scaled

    def fused(self, op: str) -> Function | None:
        """What runs the kernel that has a whole row, where this kind of device has that kernel."""
        has_rows = f"{op}_rows" in library.KERNELS[self.key]
        return functools.partial(row_loss.run, self) if has_rows else None


@kept
def _positions(name: str, choices: tuple[tuple[str, str], ...]) -> tuple[int, ...]:
    found = library.positions(name, dict(choices))
    return tuple(found[argument] for argument in library.CHOICE_ARGUMENTS[name])


class CppBackend(CompiledBackend):
    """`csrc/cpu`."""

    name = "cpp"
    device = "cpu"
    key = "CPU"
    checks_offsets = True
