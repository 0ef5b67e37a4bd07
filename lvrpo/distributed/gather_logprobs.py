"""`lvrpo.gather_logprobs` of logits whose columns ranks share.

R rows of logits, T target tokens, V columns of the whole vocabulary.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lvrpo import backends, checks
from lvrpo.backends import Backend
from lvrpo.distributed.plain import with_kernels
from lvrpo.distributed.ranks import agreement
from lvrpo.distributed.rows import ShardRows
from lvrpo.distributed.shards import (
    OwnTargets,
    VocabShards,
    check_own_columns,
    local_shard,
    own_targets,
)
from lvrpo.distributed.targets import note_rows, refuse_rows
from lvrpo.dtypes import numbers
from lvrpo.ops.head import logprobs as results
from lvrpo.ops.head.given import GivenLogits
from lvrpo.ops.head.rows import OUTSIDE
from lvrpo.ops.head.targets import Ids, VocabRange, as_rows, as_targets

OP = "distributed.gather_logprobs"


def gather_logprobs(
    logits: Tensor,
    token_ids: Ids,
    row_index: Ids | None = None,
    *,
    shards: VocabShards | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    vocab_range: VocabRange = None,
    ignore_index: int = -100,
    return_entropy: bool = False,
    return_sum_squares: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, ...]:
    """`lvrpo.gather_logprobs` of the logits of all ranks, side by side.

    Every rank has all rows and tokens and some of the columns, and every rank gets all results, of
    the same bits. Forward: one message of three or four numbers a row. Backward: none, each rank
    gets the gradient of its own logits; the loss that is made of the results has to be the same on
    all ranks.

    Args:
        logits: [R, V of this rank] or [B, C, V of this rank]; or a DTensor [.., V] that is split in
            its last dimension.
        token_ids: as `lvrpo.gather_logprobs` takes them; ids count through the whole vocabulary.
        row_index: likewise, as everything below but for `shards`.
        shards: from `VocabShards.of(logits, dim=-1)`; None for a DTensor.
        temperature: divides the logits; finite, > 0.
        softcap: cap of the logits, > 0.
        vocab_range: columns of the whole vocabulary.
        ignore_index: id of a token without a target.
        return_entropy: also return the entropy of every row.
        return_sum_squares: also return the sum of squared probabilities of every row.
        backend: a name of `lvrpo.backends.ALL`, or None for the first that can run.

    Returns:
        As `lvrpo.gather_logprobs`.

    Raises:
        ValueError: as `lvrpo.gather_logprobs`, also where a row's log-sum-exp is beyond 4,096 in
            fp32, of whose digits ranks have too few; a rank refuses what it was given, or what
            ranks need to have alike differs. On a CPU, and with LVRPO_CHECK=1 on a GPU, on all
            ranks.
        RuntimeError: a rank does not answer.
    """
    logits, shards = local_shard(OP, "logits", logits, shards, -1)
    with agreement(OP, shards.group, logits) as facts:
        checks.check_scale(OP, temperature, softcap)
        shaped, logits = logits, as_rows(OP, "logits", logits, "V")
        checks.check_floating(OP, "logits", logits)
        check_own_columns(OP, "logits", logits.shape[1], shards)
        targets = as_targets(
            *(OP, "logits", shaped, shards.vocab_size),
            *(token_ids, row_index, vocab_range, ignore_index),
        )
        targets, _ = targets.without_strangers(shards.vocab_size)
        own = own_targets(OP, shards, targets, vocab_range)
        chosen = backends.resolve("gather_logprobs", (logits, *targets.indices()), backend)
        note_rows(facts, shards, targets, logits, temperature=temperature, softcap=softcap)
        facts |= {"return_entropy": return_entropy, "return_sum_squares": return_sum_squares}
    options = _Options(
        shards,
        own,
        numbers(temperature, softcap or 0.0, OUTSIDE),
        (return_entropy, return_sum_squares),
        with_kernels(chosen, "gather_logprobs"),
    )
    logprobs, entropy, sum_squares, lse = _GatherLogprobs.apply(logits, options)  # type: ignore[no-untyped-call]
    of_rows = [*[entropy] * return_entropy, *[sum_squares] * return_sum_squares]
    of_rows = results.settle(targets, lse, of_rows, lambda bad: refuse_rows(OP, "logits", bad))
    return results.shape_results(targets, logprobs, of_rows)


@dataclasses.dataclass(frozen=True)
class _Options:
    """What the op needs besides logits."""

    shards: VocabShards
    own: OwnTargets
    numbers: Tensor
    wanted: tuple[bool, bool]
    backend: Backend

    def rows(self, logits: Tensor, dlogits: Tensor) -> ShardRows:
        """Of these logits, of which the columns in use count."""
        columns = slice(*self.own.columns)
        head = GivenLogits(logits[:, columns], dlogits[:, columns])
        return ShardRows(OP, head, self.backend, self.numbers, self.own, self.shards)


class _GatherLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, logits: Tensor, options: _Options
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        rows = options.rows(logits, logits)
        whole = 0, len(logits)
        rows.sum_own(whole, *options.wanted)
        rows.combine(whole)
        ctx.save_for_backward(logits, rows.lse, rows.entropy)
        ctx.options = options
        ctx.mark_non_differentiable(rows.sum_squares, rows.lse)
        return rows.logprobs, rows.entropy, rows.sum_squares, rows.lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dlogprobs: Tensor, dentropy: Tensor, *_: Tensor) -> tuple[Tensor, None]:
        logits, lse, entropy = ctx.saved_tensors
        low, high = ctx.options.own.columns
        dlogits = (
            torch.empty_like(logits) if high - low == logits.shape[1] else torch.zeros_like(logits)
        )
        rows = ctx.options.rows(logits, dlogits)
        rows.lse, rows.entropy = lse, entropy
        rows.backward((0, len(logits)), dlogprobs, dentropy if ctx.options.wanted[0] else None)
        return dlogits, None
