"""What the ops on a linear head do with their arguments before any arithmetic.

R rows, H hidden width, V vocabulary, T tokens.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from lvrpo import checks
from lvrpo.ops.head import targets as _targets
from lvrpo.ops.head.gemm import dtypes_of
from lvrpo.ops.head.rows import OUTSIDE

#: Default bytes of logits on a GPU. Every chunk reads and writes the whole fp32 weight gradient, so
#: that few are wanted. This holds 4096 rows of a vocabulary of 151,936 from bf16; with the gradient
#: of a weight of width 4096 next to it, 6 GiB in all.
GPU_BYTES = 3_800_000_000
#: On a CPU: rows at which a GEMM has most of its speed while the chunk is small next to the weight
#: gradient. More are faster still.
CPU_BYTES, CPU_ROWS = 12 << 20, 112


@dataclasses.dataclass(frozen=True)
class Slice:
    """The part of the vocabulary that is multiplied, and what is left to mask in it.

    Attributes:
        low: first column.
        high: one past the last.
        ranges: [R, 2] columns of each row; None when each row has all of the slice.
    """

    low: int
    high: int
    ranges: Tensor | None


def as_factors(
    op: str, hidden: Tensor, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The factors of a linear head as F.linear takes them, hidden states [..., H] as [R, H].

    Under autocast all that is not fp64 goes to its dtype.

    Raises:
        ValueError: as `check_head`.
    """
    hidden = _targets.as_rows(op, "hidden", hidden, "H")
    hidden, weight = checks.as_factor(hidden), checks.as_factor(weight)
    bias = None if bias is None else checks.as_factor(bias)
    check_head(op, hidden, weight, bias)
    return checks.as_saved(hidden), checks.as_saved(weight), checks.as_saved(bias)


def check_head(op: str, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """The shapes, dtypes and devices of a linear head fit each other."""
    checks.check_shape(op, "hidden", hidden, ("R", "H"))
    checks.check_floating(op, "hidden", hidden)
    checks.check_shape(op, "weight", weight, ("V", hidden.shape[1]))
    checks.check_same_device(op, hidden=hidden, weight=weight, bias=bias)
    if not weight.shape[0]:
        raise ValueError(f"{op}: weight has shape {tuple(weight.shape)}, expected V >= 1")
    if bias is not None:
        checks.check_shape(op, "bias", bias, (weight.shape[0],))
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and tensor.dtype != hidden.dtype:
            raise ValueError(f"{op}: {name} is {tensor.dtype}, but hidden is {hidden.dtype}")


def rows_at_once(op: str, hidden: Tensor, vocab: int, memory_budget: int | None) -> int:
    """How many rows of logits, and of their gradient where it has a buffer, fit the budget."""
    factors, sums = dtypes_of(hidden)
    row_bytes = vocab * (sums.itemsize + (factors.itemsize if factors != sums else 0))
    if memory_budget is None:
        on_cpu = max(CPU_BYTES, CPU_ROWS * row_bytes)
        memory_budget = max(GPU_BYTES, row_bytes) if hidden.is_cuda else on_cpu
    if memory_budget < row_bytes:
        raise ValueError(
            f"{op}: memory_budget is {memory_budget} bytes, but the logits of one row of {vocab} "
            f"columns need {row_bytes}"
        )
    return memory_budget // row_bytes


def vocab_slice(op: str, vocab_range: Any, vocab: int) -> Slice:
    """A pair is multiplied out of the weight, ranges per row are left to the row kernels."""
    if vocab_range is None or isinstance(vocab_range, Tensor):
        return Slice(0, vocab, vocab_range)
    low, high = vocab_range
    if not 0 <= low < high <= vocab:
        raise ValueError(f"{op}: vocab_range is {vocab_range}, expected 0 <= low < high <= {vocab}")
    return Slice(low, high, None)


def token_columns(token_ids: Tensor, low: int, ignore_index: int) -> Tensor:
    """Ids counted from the first column of the slice."""
    return torch.where(token_ids == ignore_index, OUTSIDE, token_ids - low)


def refuse_rows(
    op: str,
    statistic: Tensor,
    logits: str = "hidden @ weight.T + bias",
    used: Tensor | None = None,
) -> None:
    """Name the row whose log-sum-exp, or entropy, is not a number; of those `used`, if given."""
    if not checks.check_values(statistic):
        return
    bad = ~statistic.isfinite()
    if used is not None:
        bad &= used
    if bool(bad.any()):
        raise ValueError(
            f"{op}: row {int(bad.nonzero()[0])} of {logits} has no finite log-sum-exp; expected "
            "finite values, or -inf beside them"
        )
