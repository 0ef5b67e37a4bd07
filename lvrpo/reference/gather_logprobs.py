"""log p(token) under a softmax over logits, the entropy and the sum of squares of that softmax."""

from __future__ import annotations

import torch
from torch import Tensor

from lvrpo.dtypes import widen


def gather_logprobs(
    logits: Tensor,  # [R, V]
    token_ids: Tensor,  # [T]
    row_index: Tensor | None = None,  # [T] into R
    *,
    temperature: float = 1.0,
    softcap: float | None = None,
    vocab_range: Tensor | None = None,  # [R, 2]
    ignore_index: int = -100,
    return_entropy: bool = False,
    return_sum_squares: bool = False,
) -> Tensor | tuple[Tensor, ...]:
    """See `lvrpo.gather_logprobs`."""
    x = widen(logits)
    allowed = allowed_columns(x, vocab_range)

    # A token whose row or column is not there counts as ignored.
    token = torch.arange(len(token_ids), device=x.device)
    wanted = token if row_index is None else row_index
    row, target = wanted.clamp(0, len(x) - 1), token_ids.clamp(0, x.shape[1] - 1)
    asking = (token_ids != ignore_index) & (row == wanted) & (target == token_ids)
    asking = asking & allowed[row, target]

    # A row that no token uses may hold anything, and one that is no distribution has no gradient:
    # multiplying by 0 would not keep a NaN away.
    used = row.new_zeros(len(x)).index_add(0, row, asking.long()) > 0
    lse = scaled(x.detach(), allowed, temperature, softcap).logsumexp(dim=-1)
    broken = ~lse.isfinite()
    dropped = broken & ~used
    x = x.masked_fill(~allowed | broken[:, None], 0.0)
    log_p = scaled(x, allowed, temperature, softcap).log_softmax(dim=-1)
    log_p = log_p.masked_fill(broken[:, None], torch.nan)

    logprobs = log_p[row, target].masked_fill(~asking, 0.0)
    if not (return_entropy or return_sum_squares):
        return logprobs
    p = log_p.exp()
    entropy = -(p * log_p.masked_fill(log_p == -torch.inf, 0.0)).sum(dim=-1)
    entropy = entropy.masked_fill(dropped, 0.0)
    sum_squares = p.detach().square().sum(dim=-1).masked_fill(dropped, 0.0)
    return logprobs, *[entropy] * return_entropy, *[sum_squares] * return_sum_squares


def allowed_columns(x: Tensor, vocab_range: Tensor | None) -> Tensor:
    """[R, V] which columns of logits the softmax of a row runs over."""
    low, high = (0, x.shape[1]) if vocab_range is None else vocab_range.T[:, :, None]
    column = torch.arange(x.shape[1], device=x.device)
    return ((column >= low) & (column < high)).expand(x.shape)


def scaled(x: Tensor, allowed: Tensor, temperature: float, softcap: float | None) -> Tensor:
    """[R, V] what the softmax is taken of; -inf where it does not run."""
    z = x if softcap is None else softcap * torch.tanh(x / softcap)
    return (z / temperature).masked_fill(~allowed, -torch.inf)
