"""packed_attention over flash attention, which knows packed sequences but no ancestors.

The keys of every span's ancestors are copied in front of its own, so that each span is a sequence
like any other: causal spans in one call, full ones in another. No row's keys are split between
calls, hence nothing is merged afterwards.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lvrpo.backends.flash import varlen
from lvrpo.backends.flash.plan import Gather, plan_of
from lvrpo.backends.flash.varlen import Varlen
from lvrpo.masks import SpanMask

#: Elements that the copies of the keys may have: 4 GiB in 16 bits, as much again for the values,
#: and both again for their gradients.
LARGEST = 1 << 31


def flash_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: SpanMask,
    *,
    scale: float,
    softcap: float,
    return_lse: bool,
) -> Tensor:
    """`lvrpo.packed_attention` for inputs that `why_not` has nothing against."""
    assert not return_lse, "why_not refuses it"
    implementation, reason = _choose(q, k, v, softcap)
    assert implementation is not None, reason
    varlen = implementation.load()
    return gather_attention(q, k, v, mask, varlen=varlen, scale=scale, softcap=softcap)


def why_not(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: SpanMask,
    scale: float,
    softcap: float,
    return_lse: bool,
) -> str:
    """Why flash attention does not take these inputs; empty when it does."""
    width, v_width = q.shape[2], v.shape[2]
    reasons = []
    if q.dtype not in (torch.float16, torch.bfloat16):
        reasons.append(f"it takes fp16 and bf16, got {q.dtype}")
    if return_lse:
        reasons.append("its log-sum-exp has no gradient")
    if width != v_width:
        reasons.append(f"its values are as wide as its keys, got {v_width} and {width}")
    if width == 0 or width % 8:
        reasons.append(f"its heads are multiples of 8 wide, got {width}")
    if scale <= 0:
        reasons.append(f"it takes scale > 0, got {scale}")
    if mask.invariant:
        reasons.append("it does not promise bits that are independent of the packing")
    if mask.window is not None and not plan_of(mask).aligned:
        reasons.append("under a window it takes the rows of a full span from some row to its last")
    if not reasons and q.is_cuda:
        reasons += filter(None, [_choose(q, k, v, softcap)[1]])
    if not reasons and (expanded := plan_of(mask).expanded) * k[0:1].numel() > LARGEST:
        size = f"{expanded} x {k.shape[1]} x {width}"
        reasons.append(f"it would copy the {mask.length} keys to {size} elements, beyond 2^31")
    return "; ".join(reasons)


def gather_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: SpanMask,
    *,
    varlen: Varlen,
    scale: float,
    softcap: float,
) -> Tensor:
    """packed_attention with at most two calls of `varlen`.

    Memory above the results: the keys and values that every span sees, copied once per span.
    Deterministic where `varlen` is. It rounds the gradient of each copy to the dtype of k; the
    copies are summed in fp32 and rounded once.
    """
    tables = plan_of(mask).tables
    if not tables.calls or q.numel() == 0:
        # Nobody to attend; the sums make zeros of the gradients.
        return q.new_zeros(*q.shape[:2], v.shape[2]) + (q[:0].sum() + k[:0].sum() + v[:0].sum())
    rows = [call.rows for call in tables.calls]
    keys = [call.keys for call in tables.calls]
    parts = (
        _gather(q, tables.queries).split(rows),
        _gather(k, tables.keys).split(keys),
        _gather(v, tables.keys).split(keys),
    )
    outs = [
        varlen(
            *part,
            call.cu_q,
            call.cu_k,
            call.max_q,
            call.max_k,
            call.causal,
            scale,
            softcap,
            mask.window,
        )
        for call, part in zip(tables.calls, zip(*parts, strict=True), strict=True)
    ]
    out = outs[0] if len(outs) == 1 else torch.cat(outs)
    if tables.queries is None:
        return out
    return q.new_zeros(*q.shape[:2], v.shape[2]).index_copy(0, tables.queries.sources, out)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, *gather: Tensor) -> Tensor:
        sources, *readers = gather
        ctx.save_for_backward(*readers)
        return x.index_select(0, sources)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        copies, offsets = ctx.saved_tensors
        # Unlike index_add, a bag adds in fp32 and in the order of its rows.
        summed = torch.nn.functional.embedding_bag(
            copies, gradient.flatten(1), offsets, mode="sum", include_last_offset=True
        )
        return summed.view(-1, *gradient.shape[1:]), None, None, None


def _gather(x: Tensor, gather: Gather | None) -> Tensor:
    if gather is None:
        return x.contiguous()
    copied: Tensor = _Gather.apply(x, *gather)
    return copied


def _choose(
    q: Tensor, k: Tensor, v: Tensor, softcap: float
) -> tuple[varlen.Implementation | None, str]:
    backward = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    major, _ = torch.cuda.get_device_capability(q.device)
    return varlen.choose(major, q.shape[2], softcap, backward)
