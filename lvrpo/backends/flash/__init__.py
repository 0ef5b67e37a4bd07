"""`packed_attention` over calls of flash-attn."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lvrpo.backends.backend import Backend, Function
from lvrpo.backends.flash import attention, varlen


class FlashBackend(Backend):
    """Flash attention over copies of the keys that several spans see; one op, NVIDIA GPUs only."""

    name = "flash"
    device = "cuda"

    def why_unavailable(self) -> str:
        """What is missing: an NVIDIA GPU, or a flash attention."""
        return varlen.why_unavailable()

    def about(self) -> str:
        """Which flash attentions there are."""
        found = varlen.installed()
        return ": " + ", ".join(f"{x.name} ({version})" for x, version in found.items())

    def has_kernels(self, op: str) -> bool:
        """Of attention."""
        return op == "packed_attention"

    def limit(self, op: str, arguments: Mapping[str, Any]) -> str:
        """See `lvrpo.backends.flash.attention.why_not`."""
        return attention.why_not(**arguments)

    def functional(self, op: str, reference: Function) -> Function:
        """It brings its own gradient."""
        return attention.flash_attention
