"""A linear head whose rows of the weight ranks share, and what is asked of it, checked.

R rows of hidden states, H hidden width, V rows of the whole weight.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from lvrpo import checks
from lvrpo.distributed.shards import (
    OwnTargets,
    VocabShards,
    check_own_columns,
    is_dtensor,
    own_targets,
)
from lvrpo.distributed.targets import note_rows
from lvrpo.ops.head.linear import check_factors, rows_at_once
from lvrpo.ops.head.targets import Ids, Targets, VocabRange, as_rows, as_targets

#: What no row of which has a finite log-sum-exp is called.
LOGITS = "hidden @ weight.T + bias"


@dataclasses.dataclass(frozen=True)
class ShardProjection:
    """The factors of this rank.

    Attributes:
        hidden: [R, H], that of all ranks.
        weight: [V of this rank, H].
        bias: [V of this rank], or None.
        shards: how the weight is split.
        targets: of the rows, through the whole vocabulary.
        strange: [T] which tokens nobody's vocabulary or rows have; None where that was an error.
        own: those of this rank.
        most: rows whose logits fit the budget, of the rank that has most columns.
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    shards: VocabShards
    targets: Targets
    strange: Tensor | None
    own: OwnTargets
    most: int

    def factors(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """hidden, weight and bias."""
        return self.hidden, self.weight, self.bias

    def needs(self) -> list[bool]:
        """Which of the factors are differentiated."""
        enabled = torch.is_grad_enabled()
        return [enabled and x is not None and x.requires_grad for x in self.factors()]


def project_shard(
    op: str,
    facts: dict[str, Any],
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    token_ids: Ids,
    row_index: Ids | None,
    shards: VocabShards,
    vocab_range: VocabRange,
    ignore_index: int,
    memory_budget: int | None,
    **scale: float | None,
) -> ShardProjection:
    """The arguments of an op, as `lvrpo.ops.head.linear.project` checks them.

    Notes what ranks have to have alike, `scale` among it.

    Raises:
        ValueError: they do not fit each other or the shards, or the budget does not hold one row.
    """
    shaped, hidden = hidden, checks.as_factor(as_rows(op, "hidden", hidden, "H"))
    weight = checks.as_factor(weight)
    if bias is not None:
        bias = checks.as_factor(bias.to_local() if is_dtensor(bias) else bias)  # type: ignore[attr-defined]
    check_factors(op, hidden, weight, bias)
    check_own_columns(op, "weight", len(weight), shards)
    vocab = shards.vocab_size
    targets = as_targets(
        op, "hidden", shaped, vocab, token_ids, row_index, vocab_range, ignore_index
    )
    targets, strange = targets.without_strangers(vocab)
    own = own_targets(op, shards, targets, vocab_range)
    most = rows_at_once(op, hidden, own.widest, memory_budget)
    save = checks.as_saved
    factors = save(hidden), save(weight), save(bias)
    found = ShardProjection(*factors, shards, targets, strange, own, most)
    note_rows(facts, shards, targets, hidden, rows_at_once=most, **scale)
    return found
