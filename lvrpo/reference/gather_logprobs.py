"""log p(token) under a softmax over logits, the entropy and the sum of squares of that softmax."""

from __future__ import annotations

import torch
from torch import Tensor

from lvrpo.reference._precision import widen


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
    z = widen(logits)
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    z = z / temperature
    if vocab_range is not None:
        column = torch.arange(z.shape[1], device=z.device)
        allowed = (column >= vocab_range[:, :1]) & (column < vocab_range[:, 1:])
        z = z.masked_fill(~allowed, -torch.inf)
    log_p = torch.log_softmax(z, dim=-1)

    ignored = token_ids == ignore_index
    rows = torch.arange(len(token_ids), device=z.device) if row_index is None else row_index
    logprobs = log_p[rows, token_ids.masked_fill(ignored, 0)].masked_fill(ignored, 0.0)
    if not (return_entropy or return_sum_squares):
        return logprobs
    p = log_p.exp()
    entropy = -(p * log_p.masked_fill(log_p == -torch.inf, 0.0)).sum(dim=-1)
    sum_squares = p.detach().square().sum(dim=-1)
    return logprobs, *[entropy] * return_entropy, *[sum_squares] * return_sum_squares
