"""What the ops that return log-probs tell of rows, some of which no token uses.

R rows, T tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lvrpo import checks
from lvrpo.ops.head.targets import Targets, any_of


def used_rows(targets: Targets) -> Tensor:
    """[R] whether a token uses the row."""
    asking = targets.token_ids != targets.ignore_index
    if targets.row_index is None:
        return asking
    rows = math.prod(targets.rows)
    inside = (targets.row_index >= 0) & (targets.row_index < rows)
    return any_of(asking & inside, torch.where(inside, targets.row_index, 0), rows)


def unusable(targets: Targets, finite: Tensor) -> Tensor:
    """[R] whether a token uses a row that is not `finite`; to be asked on the host alone."""
    return ~finite if bool(finite.all()) else ~finite & used_rows(targets)


def settle(
    targets: Targets, lse: Tensor, of_rows: list[Tensor], refuse: Callable[[Tensor], None]
) -> list[Tensor]:
    """`of_rows` [R], and 0 without a gradient where no token uses a row with this `lse`.

    Args:
        targets: whose tokens use rows.
        lse: [R], perhaps not finite.
        of_rows: what is known of every row.
        refuse: raises for the first row [R] that is true; not called where no value is read.
    """
    finite = lse.isfinite()
    if checks.check_values(lse):
        if bool(finite.all()):
            return of_rows
        refuse(unusable(targets, finite))
    if not of_rows:
        return of_rows
    known = finite | used_rows(targets)
    return [torch.where(known, x, 0.0) for x in of_rows]


def shape_results(
    targets: Targets, logprobs: Tensor, of_rows: Sequence[Tensor]
) -> Tensor | tuple[Tensor, ...]:
    """Results in the shapes that the caller has; log-probs alone if there is nothing else."""
    logprobs = logprobs.reshape(targets.tokens)
    if not of_rows:
        return logprobs
    return logprobs, *(x.reshape(targets.rows) for x in of_rows)
