"""hidden @ weight.T one chunk of rows at a time, and the gradients of what comes back.

R rows, H hidden width, V columns of the vocabulary slice in use. No tensor is [R, V].
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

#: Rows [begin, end) of an order of rows.
Chunk = tuple[int, int]
#: Which rows: a slice where they are adjacent, else their indices.
Rows = slice | Tensor

#: Bytes of a narrow weight's fp32 tile, where no GEMM multiplies it as it is.
TILE_BYTES = {"cpu": 4 << 20, "cuda": 256 << 20}


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

        #: By input, hidden, weight, bias: its gradient, or an empty tensor.
        self.gradients = tuple(
            hidden.new_empty(tensor.shape if wanted and tensor is not None else 0, dtype=self.sums)
            for tensor, wanted in zip((hidden, weight, bias), needs, strict=True)
        )
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
        size = vocab
        if self.weight.dtype != self.factors:
            tile = TILE_BYTES[self.weight.device.type]
            size = max(1, tile // max(1, width * self.factors.itemsize))
        for begin in range(0, vocab, size):
            columns = slice(begin, min(begin + size, vocab))
            yield columns, self.weight[columns].to(self.factors)


def _matmul(out: Tensor, left: Tensor, right: Tensor, *, plus: Tensor | None) -> None:
    """out = left @ right + plus; sums of narrow factors stay in the wider dtype of `out`."""
    if out.dtype != left.dtype:
        if plus is None:
            torch.mm(left, right, out_dtype=out.dtype, out=out)
        else:
            torch.addmm(plus, left, right, out_dtype=out.dtype, out=out)
    elif plus is None:
        torch.mm(left, right, out=out)
    else:
        torch.addmm(plus, left, right, out=out)


def fake_gradients(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    needs: Sequence[bool],
    dtype: torch.dtype,
) -> tuple[Tensor, ...]:
    """The shapes of `LinearHead.gradients`."""
    return tuple(
        hidden.new_empty(tensor.shape if wanted and tensor is not None else 0, dtype=dtype)
        for tensor, wanted in zip((hidden, weight, bias), needs, strict=True)
    )
