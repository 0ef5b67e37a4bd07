"""`lvrpo.linear_logprobs` of a weight whose rows ranks share.

R rows of hidden states, H hidden width, V rows of the whole weight, T target tokens.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lvrpo import backends, checks
from lvrpo.backends import Backend
from lvrpo.distributed import ranks
from lvrpo.distributed.linear import LOGITS, ShardProjection, project_shard
from lvrpo.distributed.plain import with_kernels
from lvrpo.distributed.rows import ShardRows
from lvrpo.distributed.shards import VocabShards, local_shard, replicated
from lvrpo.distributed.targets import refuse_rows
from lvrpo.dtypes import numbers
from lvrpo.ops.head import logprobs as results
from lvrpo.ops.head.linear import LinearHead, split
from lvrpo.ops.head.rows import OUTSIDE
from lvrpo.ops.head.targets import Ids, VocabRange

OP = "distributed.linear_logprobs"


def linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    token_ids: Ids,
    row_index: Ids | None = None,
    *,
    shards: VocabShards | None = None,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    vocab_range: VocabRange = None,
    ignore_index: int = -100,
    return_entropy: bool = False,
    return_sum_squares: bool = False,
    memory_budget: int | None = None,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, ...]:
    """`lvrpo.linear_logprobs` of the whole weight, of which each rank has some rows.

    Every rank has all hidden states and tokens, and gets all results, of the same bits. Forward:
    one message of three or four numbers a row. Backward: the gradient of the hidden states is added
    up over ranks, in fp32; that of weight and bias is the rank's own. The loss that is made of the
    results has to be the same on all ranks.

    Args:
        hidden: as `lvrpo.linear_logprobs` takes it, the same on all ranks; a DTensor is to be
            replicated.
        weight: [V of this rank, H]; or a DTensor [V, H] that is split in its first dimension.
        token_ids: as `lvrpo.linear_logprobs` takes them; ids count through the whole vocabulary.
        row_index: likewise, as everything below but for `shards` and `bias`.
        shards: from `VocabShards.of(weight)`; None for a DTensor.
        bias: [V of this rank], or a DTensor like the weight.
        temperature: divides the logits; finite, > 0.
        softcap: cap of the logits, > 0.
        vocab_range: columns of the whole vocabulary.
        ignore_index: id of a token without a target.
        return_entropy: also return the entropy of every row.
        return_sum_squares: also return the sum of squared probabilities of every row.
        memory_budget: bytes of a rank's logits that exist at a time.
        backend: a name of `lvrpo.backends.ALL`, or None for the first that can run.

    Returns:
        As `lvrpo.linear_logprobs`.

    Raises:
        ValueError: as `lvrpo.linear_logprobs`, and as `lvrpo.distributed.gather_logprobs`.
        RuntimeError: a rank does not answer.
    """
    weight, shards = local_shard(OP, "weight", weight, shards, 0)
    with ranks.agreement(OP, shards.group, weight) as facts:
        checks.check_scale(OP, temperature, softcap)
        head = project_shard(
            *(OP, facts, replicated(OP, "hidden", hidden), weight, bias, token_ids, row_index),
            *(shards, vocab_range, ignore_index, memory_budget),
            temperature=temperature,
            softcap=softcap,
        )
        facts |= {"return_entropy": return_entropy, "return_sum_squares": return_sum_squares}
        tensors = (*head.factors(), *head.targets.indices())
        chosen = backends.resolve("linear_logprobs", tensors, backend)
    options = _Options(
        head,
        numbers(temperature, softcap or 0.0, OUTSIDE),
        (return_entropy, return_sum_squares),
        with_kernels(chosen, "linear_logprobs"),
    )
    logprobs, entropy, sum_squares, lse = _LinearLogprobs.apply(*head.factors(), options)  # type: ignore[no-untyped-call]
    of_rows = [*[entropy] * return_entropy, *[sum_squares] * return_sum_squares]
    of_rows = results.settle(head.targets, lse, of_rows, lambda bad: refuse_rows(OP, LOGITS, bad))
    return results.shape_results(head.targets, logprobs, of_rows)


@dataclasses.dataclass(frozen=True)
class _Options:
    """What the op needs besides factors."""

    head: ShardProjection
    numbers: Tensor
    wanted: tuple[bool, bool]
    backend: Backend

    def rows(
        self, factors: Sequence[Tensor | None], needs: Sequence[bool] = (False, False, False)
    ) -> tuple[ShardRows, LinearHead, list[tuple[int, int]]]:
        """Rows of which nothing is known yet, their head, and the chunks to take them in."""
        hidden, weight, bias = factors
        assert hidden is not None
        assert weight is not None
        own = self.head.own
        chunks = split(0, len(hidden), self.head.most)
        head = LinearHead(hidden, weight, bias, own.columns, chunks, needs)
        return (
            ShardRows(OP, head, self.backend, self.numbers, own, self.head.shards),
            head,
            chunks,
        )


class _LinearLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, options: _Options
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        rows, _, chunks = options.rows((hidden, weight, bias))
        for chunk in chunks:
            rows.sum_own(chunk, *options.wanted)
        rows.combine((0, len(hidden)))
        ctx.save_for_backward(hidden, weight, bias, rows.lse, rows.entropy)
        ctx.options = options
        ctx.mark_non_differentiable(rows.sum_squares, rows.lse)
        return rows.logprobs, rows.entropy, rows.sum_squares, rows.lse

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, dlogprobs: Tensor, dentropy: Tensor, *_: Tensor
    ) -> tuple[Tensor | None, ...]:
        options: _Options = ctx.options
        *factors, lse, entropy = ctx.saved_tensors
        needs = ctx.needs_input_grad[:3]
        rows, head, chunks = options.rows(factors, needs)
        rows.lse, rows.entropy = lse, entropy
        for chunk in chunks:
            rows.backward(chunk, dlogprobs, dentropy if options.wanted[0] else None)
        gradients = head.finish()
        if needs[0]:
            ranks.add_up(OP, gradients[0], options.head.shards.group)
        dtype = factors[0].dtype
        wanted = (x.to(dtype) if need else None for x, need in zip(gradients, needs, strict=True))
        return *wanted, None
