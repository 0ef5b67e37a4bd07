"""The rows of a head whose vocabulary ranks share: every rank sums its columns, all know the sums.

R rows, T tokens, S ranks. Derivation: docs/distributed.md.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lvrpo.backends import Backend
from lvrpo.distributed import ranks
from lvrpo.distributed.shards import OwnTargets, VocabShards
from lvrpo.ops.head.rows import Chunk, Head, HeadRows

#: Bits after the point that a log-sum-exp must have, as in `lost_digits` of the C++ kernels.
LEAST_BITS = 11


class ShardRows(HeadRows):
    """`HeadRows` of the rank's own columns, whose statistics are those of the whole vocabulary."""

    def __init__(
        self,
        op: str,
        head: Head,
        backend: Backend,
        numbers: Tensor,
        own: OwnTargets,
        shards: VocabShards,
        order: Tensor | None = None,
    ) -> None:
        super().__init__(head, backend, numbers, own.token_ids, own.row_index, own.ranges, order)
        self._op, self._own, self._shards = op, own, shards
        self._is_empty = own.columns[0] == own.columns[1]

    def forward(
        self, chunk: Chunk, with_entropy: bool = True, with_sum_squares: bool = False
    ) -> Tensor:
        """As `HeadRows.forward`, of the whole vocabulary: one message to the other ranks."""
        logits = self.sum_own(chunk, with_entropy, with_sum_squares)
        self.combine(chunk)
        return logits

    def sum_own(self, chunk: Chunk, with_entropy: bool, with_sum_squares: bool) -> Tensor:
        """As `HeadRows.forward`, of the rank's own columns."""
        if not self._is_empty:
            return super().forward(chunk, with_entropy, with_sum_squares)
        self.lse[self._part(chunk)[0]] = -torch.inf
        return self.head.like.new_empty(chunk[1] - chunk[0], 0)

    def combine(self, chunk: Chunk) -> None:
        """From what is known of the ranks' own columns to what is true of the whole rows."""
        count = chunk[1] - chunk[0]
        if not count:
            return
        rows, here, (_, position, _) = self._part(chunk)
        tokens = rows if here is None else slice(None)
        own = [self.lse[rows], self.entropy[rows], self.sum_squares[rows], self.logprobs[tokens]]
        # Not added up by an all-reduce: sums of exponentials need a common maximum first, and the
        # order of the summands would be the network's.
        table = ranks.gather(self._op, torch.cat(own), self._shards.group)
        *of_ranks, logprobs_s = table.split([len(x) for x in own], dim=1)
        log_share, self.lse[rows], self.entropy[rows], self.sum_squares[rows] = of_all(*of_ranks)

        owner = self._own.owner[tokens]
        token = torch.arange(len(owner), device=owner.device)
        at = owner.clamp(min=0), token if position is None else position
        logprobs = logprobs_s[at[0], token] + log_share[at]
        # Of a rank whose columns are all -inf nothing is known of each.
        logprobs = torch.where(log_share[at] == -torch.inf, -torch.inf, logprobs)
        logprobs = torch.where(owner < 0, 0.0, logprobs).to(self.logprobs.dtype)
        if here is None:
            self.logprobs[rows] = logprobs
        else:
            self.logprobs = torch.where(here, logprobs, self.logprobs)

    def backward(
        self,
        chunk: Chunk,
        dlogprobs: Tensor,
        dentropy: Tensor | None,
        logits: Tensor | None = None,
        entropy: Tensor | None = None,
    ) -> None:
        """As `HeadRows.backward`, of the rank's own columns: no message."""
        if self._is_empty:
            return
        elsewhere = self.sum_over_rows(torch.where(self._own.elsewhere, dlogprobs, 0.0))
        dentropy, entropy = with_targets_elsewhere(dentropy, self.entropy, elsewhere)
        super().backward(chunk, dlogprobs, dentropy, logits, entropy)


def of_all(
    lse_s: Tensor, entropy_s: Tensor, sum_squares_s: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """From the softmaxes over parts of each row [S, R] to the softmax over all of it [R].

    A part without a column has a log-sum-exp of -inf, and may have anything else.

    Returns:
        log_share: [S, R] fp64, logarithm of the probability that each part has.
        lse: NaN where it is no number, or so large that its digits do not tell probabilities.
        entropy: nats.
        sum_squares: sum of squared probabilities.
    """
    # In fp64, so that shares add up to 1: the rounding of lse_s alone is enough.
    exact = lse_s.double()
    lse = exact.logsumexp(dim=0)
    # Kernels sum such a row again, by its own maximum: over parts that is no part's own.
    lost = lse.abs() * torch.finfo(lse_s.dtype).eps > 2.0**-LEAST_BITS
    lse = torch.where(lse.isfinite() & lost, torch.nan, lse)
    log_share = exact - lse
    share = log_share.exp()

    def total(x: Tensor) -> Tensor:
        return torch.where(share == 0, 0.0, x).sum(dim=0).to(lse_s.dtype)

    entropy = total(share * (entropy_s - log_share))
    return log_share, lse.to(lse_s.dtype), entropy, total(share.square() * sum_squares_s)


def with_targets_elsewhere(
    dentropy: Tensor | None, entropy: Tensor, elsewhere: Tensor
) -> tuple[Tensor, Tensor]:
    """What the row kernel takes for dentropy and entropy [R], so that it knows of other targets.

    It forms p (dentropy (log p + entropy) + total), total being what comes from the targets among
    its own columns. Those of other ranks send `elsewhere` [R] back: that is one more term of the
    bracket that does not depend on the column, as dentropy times entropy is.
    """
    dentropy = torch.zeros_like(elsewhere) if dentropy is None else dentropy
    least = torch.finfo(elsewhere.dtype).eps ** 2
    # Where dentropy is too small to carry it, log p next to 1 / least is less than rounding.
    small = dentropy.abs() < elsewhere.abs() * least
    carrier = torch.where(dentropy == 0, 1.0, dentropy)
    carried = torch.where(small, 1 / least, entropy + elsewhere / carrier)
    return torch.where(small, elsewhere * least, dentropy), carried
