"""What an op on a vocabulary that ranks share can get wrong, as patches of its parts."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from lvrpo.distributed import ranks, rows

of_all, gather = rows.of_all, ranks.gather


def combined(change: Callable[..., Any]) -> Callable[[], AbstractContextManager[Any]]:
    """With the softmax over all ranks changed."""
    return lambda: mock.patch.object(rows, "of_all", change)


def entropies_averaged(lse: Tensor, entropy: Tensor, squares: Tensor) -> Any:
    log_share, whole, _, whole_squares = of_all(lse, entropy, squares)
    share = log_share.exp()
    return log_share, whole, (share * entropy).nansum(dim=0), whole_squares


def squares_averaged(lse: Tensor, entropy: Tensor, squares: Tensor) -> Any:
    log_share, whole, whole_entropy, _ = of_all(lse, entropy, squares)
    return log_share, whole, whole_entropy, (log_share.exp() * squares).nansum(dim=0)


def largest_part(lse: Tensor, entropy: Tensor, squares: Tensor) -> Any:
    log_share, _, *others = of_all(lse, entropy, squares)
    return log_share, lse.amax(dim=0), *others


def equal_parts(lse: Tensor, entropy: Tensor, squares: Tensor) -> Any:
    log_share, *others = of_all(lse, entropy, squares)
    return torch.full_like(log_share, -float(torch.tensor(len(lse)).log())), *others


def last_rank_left_out(lse: Tensor, entropy: Tensor, squares: Tensor) -> Any:
    lse = torch.cat([lse[:-1], torch.full_like(lse[-1:], -torch.inf)])
    return of_all(lse, entropy, squares)


MUTANTS: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "entropies are averaged": combined(entropies_averaged),
    "sums of squares are averaged": combined(squares_averaged),
    "the log-sum-exp is that of the largest part": combined(largest_part),
    "parts have equal shares": combined(equal_parts),
    "the last rank is left out": combined(last_rank_left_out),
    "targets on other ranks send nothing back": lambda: mock.patch.object(
        rows, "with_targets_elsewhere", lambda dentropy, entropy, _: (dentropy, entropy)
    ),
    "the gradient of hidden states is a rank's own": lambda: mock.patch.object(
        ranks, "add_up", return_value=None
    ),
    "ranks are taken for their neighbours": lambda: mock.patch.object(
        ranks, "gather", lambda *given: gather(*given).roll(1, dims=0)
    ),
}
