"""Bytes that a rank receives (and sends as many) where all ranks share the parameters, as in FSDP2.

`fully_shard` gathers the weights of a unit before its forward pass and again before its backward
pass, in the dtype that is computed with, and scatters the sum of its gradients, in fp32. A ring of
N ranks passes (N - 1) / N of a tensor through each of them, for either.
"""

from __future__ import annotations

from lvrpo.models.transformer import Parameters
from lvrpo.planning.memory import FP32, Numerics


def gather(parameters: Parameters, numerics: Numerics, ranks: int) -> int:
    """All weights once, for one forward or one backward pass."""
    return _through_a_rank(numerics.compute * parameters.total, ranks)


def scatter(parameters: Parameters, ranks: int) -> int:
    """The sum of all gradients once."""
    return _through_a_rank(FP32 * parameters.trained, ranks)


def update(
    parameters: Parameters, numerics: Numerics, ranks: int, *, buffers: int, reference: bool
) -> int:
    """An update of so many packed buffers of each rank; each has its own passes."""
    passes = 3 if reference else 2
    each = passes * gather(parameters, numerics, ranks) + scatter(parameters, ranks)
    return buffers * each


def _through_a_rank(size: int, ranks: int) -> int:
    return size * (ranks - 1) // ranks
