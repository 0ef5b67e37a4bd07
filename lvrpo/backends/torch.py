"""The references, which are plain PyTorch and run anywhere."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from lvrpo.backends.backend import Backend, Function


class TorchBackend(Backend):
    """Runs every op of every choice on any device, as its reference has it."""

    name = "torch"
    device = ""

    def has_kernels(self, op: str) -> bool:
        """Every op has a reference."""
        return True

    def why_not(
        self,
        op: str,
        tensors: Sequence[Tensor] = (),
        choices: Mapping[str, str] | None = None,
        arguments: Mapping[str, Any] | None = None,
    ) -> list[str]:
        """No reasons: what a reference cannot compute, it says itself."""
        return []

    def functional(self, op: str, reference: Function) -> Function:
        """The reference."""
        return reference
