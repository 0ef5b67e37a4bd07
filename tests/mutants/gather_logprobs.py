"""Deliberately broken versions of gather_logprobs; the tolerance rule must reject every one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lvrpo.reference.gather_logprobs import gather_logprobs as reference


def in_output_dtype(
    change_logits: Callable[[Tensor], Tensor] = lambda x: x,
    change_gradient: Callable[[Tensor], Tensor] = lambda g: g,
    **replaced: Any,
) -> Callable[..., Any]:
    """The reference with its logits, its gradient or an argument tampered with."""

    def mutant(logits: Tensor, token_ids: Tensor, **options: Any) -> Any:
        if logits.requires_grad:
            kept = logits
            logits = kept * 1.0
            logits.register_hook(change_gradient)
        return reference(change_logits(logits), token_ids, **(options | replaced))

    return mutant


def drop_columns(count: int) -> Callable[[Tensor], Tensor]:
    def change(x: Tensor) -> Tensor:
        keep = torch.arange(x.shape[1]) < x.shape[1] - count
        return torch.where(keep, x, torch.full_like(x, -1e4))

    return change


def zero_last_columns(g: Tensor) -> Tensor:
    return torch.cat([g[:, :-8], torch.zeros_like(g[:, -8:])], dim=1)


def zero_last_row(g: Tensor) -> Tensor:
    return torch.cat([g[:-1], torch.zeros_like(g[-1:])], dim=0)


def off_by_one(logits: Tensor, token_ids: Tensor, **options: Any) -> Any:
    return reference(logits, (token_ids + 1) % logits.shape[1], **options)


def neighbour_row(logits: Tensor, token_ids: Tensor, row_index: Tensor, **options: Any) -> Any:
    return reference(logits, token_ids, row_index.roll(1), **options)


def entropy_in_bits(logits: Tensor, token_ids: Tensor, **options: Any) -> Any:
    logprobs, entropy, squares = reference(logits, token_ids, **options)
    return logprobs, entropy / 0.6931471805599453, squares


def entropy_detached(logits: Tensor, token_ids: Tensor, **options: Any) -> Any:
    logprobs, entropy, squares = reference(logits, token_ids, **options)
    return logprobs, entropy.detach() + 0.0 * logits.sum(), squares


def squares_relative_to_the_largest(logits: Tensor, token_ids: Tensor, **options: Any) -> Any:
    logprobs, entropy, squares = reference(logits, token_ids, **options)
    z = logits.detach().float() / options["temperature"]
    return logprobs, entropy, squares / z.softmax(dim=1).amax(dim=1) ** 2


def shared_row_counts_once(logits: Tensor, token_ids: Tensor, row_index: Tensor, **o: Any) -> Any:
    logprobs, *others = reference(logits, token_ids, row_index, **o)
    repeated = (row_index[:, None] == row_index).tril(-1).any(dim=1)
    return torch.where(repeated, logprobs.detach(), logprobs), *others


MUTANTS: dict[str, Callable[..., Any]] = {
    "gradient all zeros": in_output_dtype(change_gradient=torch.zeros_like),
    "gradient sign flipped": in_output_dtype(change_gradient=torch.neg),
    "gradient scaled by 2 %": in_output_dtype(change_gradient=lambda g: g * 1.02),
    "gradient misses the last row": in_output_dtype(change_gradient=zero_last_row),
    "gradient misses the last 8 columns": in_output_dtype(change_gradient=zero_last_columns),
    "log-sum-exp misses one column": in_output_dtype(drop_columns(1)),
    "log-sum-exp misses 1/16 of the vocabulary": in_output_dtype(drop_columns(63)),
    "temperature ignored": in_output_dtype(temperature=1.0),
    "targets shifted by one": off_by_one,
    "row of the neighbour": neighbour_row,
    "entropy in bits": entropy_in_bits,
    "entropy without a gradient": entropy_detached,
    "sum of squares of e instead of p": squares_relative_to_the_largest,
    "gradient of a shared row from its first token only": shared_row_counts_once,
}


def multiplied_by_0(
    logits: Tensor, token_ids: Tensor, row_index: Any = None, **options: Any
) -> Any:
    """The formula taken of every row, those that no token uses too."""
    log_p = logits.float().log_softmax(dim=1)
    ignored = token_ids == -100
    logprobs = log_p.gather(1, token_ids.masked_fill(ignored, 0)[:, None])[:, 0]
    entropy = -(log_p.exp() * log_p).sum(dim=1)
    squares = log_p.detach().exp().square().sum(dim=1)
    return logprobs * ~ignored, entropy, squares


def masked_afterwards(logits: Tensor, token_ids: Tensor, **options: Any) -> Any:
    """Masked, but only where the gradient has been a NaN already."""
    logprobs, entropy, squares = multiplied_by_0(logits, token_ids)
    ignored = token_ids == -100
    return (*(x.masked_fill(ignored, 0.0) for x in (logprobs, entropy, squares)),)


#: What is wrong only with a row that no token uses.
UNGUARDED: dict[str, Callable[..., Any]] = {
    "rows that no token uses are multiplied by 0": multiplied_by_0,
    "rows that no token uses are masked in the forward alone": masked_afterwards,
}
