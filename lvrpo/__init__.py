"""Fused kernels for GRPO on models that read and draw."""

from lvrpo.ops.gather_logprobs import gather_logprobs

__version__ = "0.1.0"

__all__ = ["gather_logprobs"]
