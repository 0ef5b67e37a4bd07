"""The row kernels on the logits of a linear head, a chunk of rows at a time.

R rows, T tokens, V columns. An order of rows may differ from that of the input: a chunk [begin,
end) is of the order.
"""

from __future__ import annotations

import functools
from typing import Protocol

import torch
from torch import Tensor

from lvrpo import checks
from lvrpo.backends import Backend
from lvrpo.ops.head.targets import any_of

#: Rows [begin, end) of an order of rows.
Chunk = tuple[int, int]
#: Which rows: a slice where they are adjacent, else their indices.
Rows = slice | Tensor

#: Inside the head: a token that is not among the targets of a chunk.
OUTSIDE = -1


class Head(Protocol):
    """Where the logits of a chunk come from and their gradient goes: see `LinearHead`."""

    rows: int
    like: Tensor

    def project(self, rows: Rows, count: int) -> Tensor:
        """The logits of the first `count` of `rows`."""

    def gradient_buffer(self, rows: Rows, count: int) -> Tensor:
        """Where the gradient of these logits is to be written."""

    def backward(self, rows: Rows, dlogits: Tensor, asked: Tensor) -> None:
        """Hand on the gradient of the logits of `rows`."""


class HeadRows:
    """What is known of the rows and tokens of a head, filled chunk by chunk; 0 before.

    With `row_index` a chunk works on all T tokens, its own being the ones that are not ignored:
    which they are cannot be known without waiting for a GPU, and T numbers are nothing next to one
    row of logits.
    """

    def __init__(
        self,
        head: Head,
        backend: Backend,  # one with kernels
        numbers: Tensor,  # of `lvrpo::gather_logprobs_fwd`, with OUTSIDE as ignore_index
        token_ids: Tensor,  # [T], counted from the first column of the slice in use
        row_index: Tensor | None,  # [T]
        vocab_range: Tensor | None,  # [R, 2]
        order: Tensor | None = None,  # [R] rows in the order of the chunks
    ) -> None:
        self.head, self.backend, self.numbers = head, backend, numbers
        rows, like = head.rows, head.like
        self.token_ids, self.row_index, self.vocab_range = token_ids, row_index, vocab_range
        self._set_order(order)
        self.logprobs = like.new_zeros(token_ids.shape)
        self.lse, self.entropy = like.new_zeros(rows), like.new_zeros(rows)
        self.sum_squares = like.new_zeros(rows)

    def _set_order(self, order: Tensor | None) -> None:
        self.order = order
        if self.row_index is not None:
            # Sorting a permutation inverts it.
            index = self.row_index
            self._position = index if order is None else order.argsort()[index]

    def in_order(self, values: Tensor) -> Tensor:
        """[R] of the rows, in the order of the chunks."""
        return values if self.order is None else values[self.order]

    def put_first(self, flags: Tensor, chunk: Chunk) -> None:
        """Change the order inside a chunk: rows that are flagged [R] come first."""
        begin, end = chunk
        order = self.in_order(torch.arange(len(flags), device=flags.device))
        part = order[begin:end]
        sorted_part = part[(~flags[part]).long().argsort(stable=True)]
        self._set_order(torch.cat([order[:begin], sorted_part, order[end:]]))

    def entropy_of_tokens(self) -> Tensor:
        """[T] the entropy of each token's row."""
        return self.entropy if self.row_index is None else self.entropy[self.row_index]

    def forward(
        self, chunk: Chunk, with_entropy: bool = True, with_sum_squares: bool = False
    ) -> Tensor:
        """The logits of a chunk, valid until the next one's, after noting what they say."""
        rows, here, targets = self._part(chunk)
        logits = self.head.project(rows, chunk[1] - chunk[0])
        logprobs, lse, entropy, sum_squares = self.backend.op("gather_logprobs_fwd")(
            *(logits, *targets, self.numbers, with_entropy, with_sum_squares)
        )
        if here is None:
            self.logprobs[rows] = logprobs
        else:
            self.logprobs = torch.where(here, logprobs, self.logprobs)
        self.lse[rows] = lse
        if with_entropy:
            self.entropy[rows] = entropy
        if with_sum_squares:
            self.sum_squares[rows] = sum_squares
        return logits

    def backward(
        self,
        chunk: Chunk,
        dlogprobs: Tensor,  # [T]
        dentropy: Tensor | None,  # [R]
        logits: Tensor | None = None,
        entropy: Tensor | None = None,  # [R]
    ) -> None:
        """Add a chunk's part to the gradients of the head; None for logits projects them again.

        `entropy` is for the kernel to read in place of the entropies that are known.
        """
        rows, here, (token_ids, row_index, ranges) = self._part(chunk)
        count = chunk[1] - chunk[0]
        if logits is None:
            logits = self.head.project(rows, count)
        dlogits = self.head.gradient_buffer(rows, count)
        # Tokens of other chunks may have a gradient that is not a number yet.
        of_chunk = dlogprobs[rows] if here is None else torch.where(here, dlogprobs, 0.0)
        # A token that sends nothing back is no target: a row without one need not be read.
        token_ids = torch.where(of_chunk == 0, OUTSIDE, token_ids)
        asked = any_of(token_ids != OUTSIDE, row_index, count)
        if dentropy is not None:
            dentropy = dentropy[rows]
            asked = asked | (dentropy != 0)
        self.backend.op("gather_logprobs_bwd")(
            dlogits,
            of_chunk,
            dentropy,
            logits,
            token_ids,
            row_index,
            ranges,
            self.lse[rows],
            None if dentropy is None else (self.entropy if entropy is None else entropy)[rows],
            self.numbers,
        )
        self.head.backward(rows, dlogits, asked)

    def sum_over_rows(self, values: Tensor) -> Tensor:
        """[R] from [T], in the order of the tokens on every device."""
        if self.row_index is None:
            return values
        by_row, tokens_per_row = self._tokens_by_row
        return torch.segment_reduce(values[by_row], "sum", lengths=tokens_per_row, unsafe=True)

    @functools.cached_property
    def _tokens_by_row(self) -> tuple[Tensor, Tensor]:
        """Tokens [T] sorted by row, and how many each row has [R]."""
        assert self.row_index is not None
        in_order, by_row = self.row_index.sort(stable=True)
        bounds = torch.arange(len(self.lse) + 1, device=by_row.device)
        return by_row, torch.searchsorted(in_order, bounds).diff()

    def _part(
        self, chunk: Chunk
    ) -> tuple[Rows, Tensor | None, tuple[Tensor, Tensor | None, Tensor | None]]:
        """The rows of a chunk, its tokens [T] (None: one for each), its targets for the kernels."""
        rows = slice(*chunk) if self.order is None else self.order[slice(*chunk)]
        ranges = None if self.vocab_range is None else self.vocab_range[rows]
        if self.row_index is None:
            return rows, None, (self.token_ids[rows], None, ranges)
        here = (self._position >= chunk[0]) & (self._position < chunk[1])
        token_ids = torch.where(here, self.token_ids, OUTSIDE)
        return rows, here, (token_ids, torch.where(here, self._position - chunk[0], 0), ranges)


def refuse_rows(op: str, statistic: Tensor, logits: str) -> None:
    """Name the first row whose log-sum-exp, or entropy, is not a number."""
    if not checks.check_values(statistic):
        return
    bad = ~statistic.isfinite()
    if bool(bad.any()):
        raise ValueError(
            f"{op}: row {int(bad.nonzero()[0])} of {logits} has no finite log-sum-exp; expected "
            "finite values, or -inf beside them"
        )
