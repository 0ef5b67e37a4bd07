"""Logits that are there: what may be done with them, and a head that hands them out.

R rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lvrpo import checks
from lvrpo.ops.head.rows import Chunk, Rows


def check_logits(op: str, logits: Tensor, inplace_backward: bool) -> None:
    """Logits [R, V] that a softmax can be taken of and, if asked for, a gradient written over."""
    checks.check_shape(op, "logits", logits, ("R", "V"))
    checks.check_floating(op, "logits", logits)
    rows, vocab = logits.shape
    if rows and not vocab:
        raise ValueError(f"{op}: logits has shape ({rows}, 0), expected at least one column")
    row_stride, column_stride = logits.stride()
    own = (rows <= 1 or row_stride >= vocab) and (vocab <= 1 or column_stride == 1)
    if inplace_backward and not own:
        raise ValueError(
            f"{op}: logits has strides {logits.stride()}; inplace_backward=True needs rows that do "
            "not overlap and adjacent columns"
        )


def dtypes_of(logits: Tensor) -> tuple[torch.dtype, torch.dtype]:
    """The dtypes of the results, and of the gradient until it is scaled.

    fp16 cannot hold the gradient of a mean over many tokens before a loss scale multiplies it.
    """
    sums = torch.float64 if logits.dtype == torch.float64 else torch.float32
    return sums, sums if logits.dtype == torch.float16 else logits.dtype


class GivenLogits:
    """Logits in the place of the GEMMs of `LinearHead`."""

    def __init__(self, logits: Tensor, dlogits: Tensor) -> None:
        self._logits, self._dlogits = logits, dlogits
        self.rows = len(logits)
        #: Empty, of the dtype and device of the results.
        self.like = logits.new_empty(0, dtype=dtypes_of(logits)[0])

    def project(self, rows: Rows, count: int) -> Tensor:
        """[count, V] logits of these rows."""
        return self._logits[rows]

    def gradient_buffer(self, rows: Rows, count: int) -> Tensor:
        """[count, V] for their gradient."""
        return self._dlogits[rows]

    def backward(self, rows: Rows, dlogits: Tensor, asked: Tensor) -> None:
        """Nothing to add: the gradient of the logits is the result."""


def chunks_of(active: Sequence[bool], shortest: int) -> list[Chunk]:
    """Adjacent rows that are active, together with gaps of fewer than `shortest` between them."""
    chunks: list[Chunk] = []
    for row, is_active in enumerate(active):
        if is_active:
            joins = chunks and (row == chunks[-1][1] or row - chunks[-1][1] < shortest)
            chunks.append((chunks.pop()[0] if joins else row, row + 1))
    return chunks
