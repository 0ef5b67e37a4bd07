"""log p(token) under a softmax over hidden @ weight.T + bias, and the entropy of that softmax."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lvrpo.dtypes import widen
from lvrpo.reference.gather_logprobs import gather_logprobs


def linear_logprobs(
    hidden: Tensor,  # [R, H]
    weight: Tensor,  # [V, H]
    token_ids: Tensor,  # [T]
    row_index: Tensor | None = None,  # [T] into R
    *,
    bias: Tensor | None = None,  # [V]
    **softmax: Any,
) -> Tensor | tuple[Tensor, ...]:
    """See `lvrpo.linear_logprobs`."""
    return gather_logprobs(project(hidden, weight, bias), token_ids, row_index, **softmax)


def project(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """[R, V] logits; a row of hidden states that is not finite is NaN and adds to no gradient."""
    broken = ~hidden.isfinite().all(dim=1, keepdim=True)
    logits = widen(hidden).masked_fill(broken, 0.0) @ widen(weight).T
    logits = logits if bias is None else logits + widen(bias)
    return logits.masked_fill(broken, torch.nan)
