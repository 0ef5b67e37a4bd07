"""hidden @ weight.T one chunk of rows at a time, and the gradients of what comes back.

R rows, H hidden width, V columns of the vocabulary slice in use. No tensor is [R, V].
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from lvrpo import checks
from lvrpo.ops.head.rows import OUTSIDE, Chunk, Rows
from lvrpo.ops.head.targets import Ids, Targets, VocabRange, as_rows, as_targets, is_pair

#: Default bytes of logits on a GPU. Every chunk reads and writes the whole fp32 weight gradient, so
#: that few are wanted. This holds 4096 rows of a vocabulary of 151,936 from bf16; with the gradient
#: of a weight of width 4096 next to it, 6 GiB in all.
GPU_BYTES = 3_800_000_000
#: On a CPU: rows at which a GEMM has most of its speed while the chunk is small next to the weight
#: gradient. More are faster still.
CPU_BYTES, CPU_ROWS = 12 << 20, 112
#: Bytes of a narrow weight's fp32 tile, where no GEMM multiplies it as it is.
TILE_BYTES = {"cpu": 4 << 20, "cuda": 256 << 20}


@dataclasses.dataclass(frozen=True)
class Projection:
    """A linear head and what is asked of it, checked.

    Attributes:
        hidden: [R, H].
        weight: [whole vocabulary, H].
        bias: [whole vocabulary], or None.
        targets: of the rows; ids and ranges count through the whole vocabulary.
        columns: the first of the slice that is multiplied, and one past its last.
        sliced: whether the slice says all that the targets' ranges do.
        most: rows of logits, and of their gradient where it has a buffer, that fit the budget.
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    targets: Targets
    columns: tuple[int, int]
    sliced: bool
    most: int

    def factors(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """hidden, weight and bias."""
        return self.hidden, self.weight, self.bias

    def indices(self) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """As `HeadRows` takes targets: ids from the first column, ranges where they say more."""
        ids, row_index, ranges = self.targets.indices()
        ids = torch.where(ids == self.targets.ignore_index, OUTSIDE, ids - self.columns[0])
        return ids, row_index, None if self.sliced else ranges


def project(
    op: str,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    token_ids: Ids,
    row_index: Ids | None,
    vocab_range: VocabRange,
    ignore_index: int,
    memory_budget: int | None,
) -> Projection:
    """The arguments of an op on a linear head, hidden states [..., H] as [R, H].

    Factors are as F.linear takes them: under autocast all that is not fp64 goes to its dtype. A
    pair for `vocab_range` is multiplied out of the weight, ranges per row are left to the kernels.

    Raises:
        ValueError: they do not fit each other, or the budget does not hold one row.
    """
    shaped, hidden = hidden, checks.as_factor(as_rows(op, "hidden", hidden, "H"))
    weight = checks.as_factor(weight)
    bias = None if bias is None else checks.as_factor(bias)
    check_factors(op, hidden, weight, bias)
    vocab = weight.shape[0]
    if not vocab:
        raise ValueError(f"{op}: weight has shape {tuple(weight.shape)}, expected V >= 1")
    low, high = 0, vocab
    if is_pair(vocab_range):
        low, high = vocab_range  # type: ignore[misc, assignment]
        if not 0 <= low < high <= vocab:
            raise ValueError(
                f"{op}: vocab_range is {vocab_range}, expected 0 <= low < high <= {vocab}"
            )
    targets = as_targets(
        op, "hidden", shaped, vocab, token_ids, row_index, vocab_range, ignore_index
    )
    most = rows_at_once(op, hidden, high - low, memory_budget)
    save = checks.as_saved
    factors = save(hidden), save(weight), save(bias)
    return Projection(*factors, targets, (low, high), is_pair(vocab_range), most)


def split(begin: int, end: int, most: int) -> list[Chunk]:
    """[begin, end) in as few chunks of at most `most` rows as there can be, and even ones."""
    if begin == end:
        return []
    size = math.ceil((end - begin) / math.ceil((end - begin) / most))
    if size > 128:  # whole tiles of a GPU's GEMM
        size = min(most, math.ceil(size / 128) * 128)
    return [(start, min(start + size, end)) for start in range(begin, end, size)]


def dtypes_of(hidden: Tensor) -> tuple[torch.dtype, torch.dtype]:
    """The dtype of the factors of each GEMM, and that of its sums.

    Factors stay bf16 on a GPU alone: its tensor cores multiply them exactly and add in fp32. fp16
    would lose the gradients of logits, which are as small as 1 / T, below its smallest number.
    """
    sums = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    return torch.bfloat16 if hidden.is_cuda and hidden.dtype == torch.bfloat16 else sums, sums


def empty_gradients(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    needs: Sequence[bool],
    dtype: torch.dtype,
) -> tuple[Tensor, ...]:
    """By input, hidden, weight, bias: the place of its gradient; empty for one without."""
    return tuple(
        hidden.new_empty(tensor.shape if wanted and tensor is not None else 0, dtype=dtype)
        for tensor, wanted in zip((hidden, weight, bias), needs, strict=True)
    )


class LinearHead:
    """The GEMMs of one call, and the only buffers it has.

    Logits and gradients are in fp32 (fp64 from fp64) whatever the inputs are: a gradient that was
    rounded to its narrow dtype before all chunks are in, or before the upstream gradient scales it,
    loses what cannot come back.
    """

    def __init__(
        self,
        hidden: Tensor,  # [R, H]
        weight: Tensor,  # [whole vocabulary, H]
        bias: Tensor | None,
        vocab: tuple[int, int],
        chunks: Sequence[Chunk],
        needs: Sequence[bool] = (False, False, False),
    ) -> None:
        low, high = vocab
        self.factors, self.sums = dtypes_of(hidden)
        self.hidden, self.weight = hidden.detach(), weight.detach()[low:high]
        self.bias = None if bias is None else bias.detach()[low:high].to(self.sums)
        most = max((end - begin for begin, end in chunks), default=0)
        self.rows = len(hidden)
        #: Empty, of the dtype and device of the results.
        self.like = hidden.new_empty(0, dtype=self.sums)
        self._logits = hidden.new_empty(most, high - low, dtype=self.sums)
        self._dlogits = self._logits
        if any(needs) and self.factors != self.sums:
            self._dlogits = torch.empty_like(self._logits, dtype=self.factors)
        self.gradients = empty_gradients(hidden, weight, bias, needs, self.sums)
        self._needs = tuple(bool(wanted) for wanted in needs)
        self._columns = slice(low, high)
        self._first = True
        if self._needs[0]:
            self.gradients[0].zero_()  # rows that no chunk holds
        for gradient in self.gradients[1:]:
            gradient[:low].zero_()
            gradient[high:].zero_()

    def project(self, rows: Rows, count: int) -> Tensor:
        """[count, V] logits of these rows, in the buffer that the next call overwrites."""
        out, hidden = self._logits[:count], self.hidden[rows].to(self.factors)
        for columns, weight in self._tiles():
            bias = None if self.bias is None else self.bias[columns]
            _matmul(out[:, columns], hidden, weight.t(), plus=bias)
        return out

    def gradient_buffer(self, rows: Rows, count: int) -> Tensor:
        """[count, V] for the gradient of these rows: the logits themselves where dtypes allow."""
        return self._dlogits[:count]

    def backward(self, rows: Rows, dlogits: Tensor, asked: Tensor) -> None:
        """Add what these rows contribute to the gradients that are wanted.

        Args:
            rows: which.
            dlogits: [count, V], 0 in a row that is not asked.
            asked: [count] whether a row has a gradient. Others may hold anything.
        """
        dhidden, dweight, dbias = self.gradients
        if self._needs[0]:
            adjacent = isinstance(rows, slice)
            out = dhidden[rows] if adjacent else dhidden.new_empty(len(dlogits), dhidden.shape[1])
            for columns, weight in self._tiles():
                before = out if columns.start > 0 else None
                _matmul(out, dlogits[:, columns], weight, plus=before)
            if not adjacent:
                dhidden[rows] = out
        if self._needs[1]:
            out = dweight[self._columns]
            # Not multiplied by their gradient of 0, which a NaN would survive.
            hidden = self.hidden[rows].to(self.factors).masked_fill(~asked[:, None], 0.0)
            _matmul(out, dlogits.t(), hidden, plus=None if self._first else out)
        if self._needs[2]:
            total = dlogits.sum(dim=0, dtype=self.sums)
            dbias[self._columns] = total if self._first else dbias[self._columns] + total
        self._first = False

    def finish(self) -> tuple[Tensor, ...]:
        """The gradients; zero where no row contributed."""
        if self._first:
            for gradient in self.gradients:
                gradient.zero_()
        return self.gradients

    def _tiles(self) -> Iterator[tuple[slice, Tensor]]:
        """The weight as factors: as it is, or converted a tile at a time and never whole."""
        vocab, width = self.weight.shape
        size = max(1, vocab)
        if self.weight.dtype != self.factors:
            tile = TILE_BYTES[self.weight.device.type]
            size = max(1, tile // max(1, width * self.factors.itemsize))
        for begin in range(0, vocab, size):
            columns = slice(begin, min(begin + size, vocab))
            yield columns, self.weight[columns].to(self.factors)


def _matmul(out: Tensor, left: Tensor, right: Tensor, *, plus: Tensor | None) -> None:
    """out = left @ right + plus; sums of narrow factors stay in the wider dtype of `out`."""
    wider: dict[str, Any] = {} if out.dtype == left.dtype else {"out_dtype": out.dtype}
    if plus is None:
        torch.mm(left, right, out=out, **wider)
    else:
        torch.addmm(plus, left, right, out=out, **wider)


def check_factors(op: str, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Hidden states [R, H], weight [V, H] and bias [V] are of one dtype and fit each other."""
    checks.check_shape(op, "hidden", hidden, ("R", "H"))
    checks.check_floating(op, "hidden", hidden)
    checks.check_shape(op, "weight", weight, ("V", hidden.shape[1]))
    checks.check_same_device(op, hidden=hidden, weight=weight, bias=bias)
    if bias is not None:
        checks.check_shape(op, "bias", bias, (weight.shape[0],))
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and tensor.dtype != hidden.dtype:
            raise ValueError(f"{op}: {name} is {tensor.dtype}, but hidden is {hidden.dtype}")


def rows_at_once(op: str, hidden: Tensor, vocab: int, memory_budget: int | None) -> int:
    """Rows whose logits of so many columns, and their gradients, fit the budget.

    Raises:
        ValueError: not one does.
    """
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
