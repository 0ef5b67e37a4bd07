"""torch's scaled_dot_product_attention, in the form that is fastest for each purpose."""

from __future__ import annotations

import functools

import torch
from harness.providers import DEVICE
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from lvrpo.masks import SpanMask


def given(q: Tensor, k: Tensor, v: Tensor, mask: SpanMask) -> Tensor:
    """With a dense additive mask, the form that it need not convert."""
    return _packed(q, k, v, _additive_mask(mask, q.dtype))


def built(q: Tensor, k: Tensor, v: Tensor, mask: SpanMask) -> Tensor:
    return _packed(q, k, v, mask.to_dense())


def plain_text(q: Tensor, k: Tensor, v: Tensor, mask: SpanMask) -> Tensor:
    """For a buffer of one causal document."""
    return causal(*(x.transpose(0, 1)[None] for x in (q, k, v)))[0].transpose(0, 1)


def _packed(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor) -> Tensor:
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    return masked(q, k, v, attn_mask)[0].transpose(0, 1)


def masked(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor) -> Tensor:
    # With a mask its fused kernels want as many heads of keys as of queries.
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    return scaled_dot_product_attention(q, k, v, attn_mask=attn_mask)


def causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    if DEVICE == "cpu":  # whose backward has a thread per head of keys, and waits for one
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    shared = q.shape[1] != k.shape[1]
    return scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=shared)


@functools.lru_cache(maxsize=1)
def _additive_mask(mask: SpanMask, dtype: torch.dtype) -> Tensor:
    dense = mask.to_dense()
    return torch.zeros_like(dense, dtype=dtype).masked_fill_(~dense, -torch.inf)
