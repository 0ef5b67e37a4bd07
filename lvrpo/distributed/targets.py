"""What the ops on a shared vocabulary check, and tell each other before they begin."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lvrpo import checks
from lvrpo.distributed.shards import VocabShards
from lvrpo.ops.head.targets import Targets


def note_rows(
    facts: dict[str, Any], shards: VocabShards, targets: Targets, rows: Tensor, **others: Any
) -> None:
    """Note what ranks have to have alike of tokens and rows, where values may be read.

    Sums of the ids tell ranks that were given batches of their own.
    """
    if not checks.check_values(rows):
        return
    facts |= {
        "shards": shards.ranges,
        "rows": targets.rows,
        "tokens": targets.tokens,
        "dtype": rows.dtype,
    } | others
    facts["needs a gradient"] = torch.is_grad_enabled() and rows.requires_grad
    for name, tensor in zip(
        ("token_ids", "row_index", "vocab_range"), targets.indices(), strict=True
    ):
        facts[f"the sum of {name}"] = None if tensor is None else tensor.sum().item()


def refuse_rows(op: str, logits: str, bad: Tensor) -> None:
    """Name the first row that is true."""
    if bool(bad.any()):
        raise ValueError(
            f"{op}: row {int(bad.nonzero()[0])} of {logits} has no finite log-sum-exp over all "
            "ranks, or one beyond 4,096 in fp32, where a shared softmax loses its digits; expected "
            "finite values of less, or -inf beside them"
        )
