"""softmax(scale * q k^T) v where the mask lets a query see a key, document by document."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lvrpo.dtypes import widen

if TYPE_CHECKING:
    from lvrpo.masks import SpanMask


def packed_attention(
    q: Tensor,  # [Lq, Hq, D]
    k: Tensor,  # [L, Hkv, D]
    v: Tensor,  # [L, Hkv, Dv]
    mask: SpanMask,
    *,
    scale: float | None = None,
    softcap: float = 0.0,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """See `lvrpo.packed_attention`."""
    heads_per_kv = q.shape[1] // k.shape[1]
    scale = q.shape[2] ** -0.5 if scale is None else scale
    if mask.frozen:
        constant = mask.frozen_keys()[:, None, None]
        k, v = (torch.where(constant, x.detach(), x) for x in (k, v))
    outs, lses = [], []
    for document in range(len(mask.documents) - 1):
        rows = slice(mask.document_rows[document], mask.document_rows[document + 1])
        keys = slice(mask.documents[document], mask.documents[document + 1])
        visible = mask.visible(rows, keys)
        q_rows = widen(q[rows])
        k_rows, v_rows = (widen(x[keys]).repeat_interleave(heads_per_kv, dim=1) for x in (k, v))
        # 0 * NaN is NaN: what is not finite reaches those that see it by itself, as `lost`.
        q_finite, k_finite, v_finite = (
            x.isfinite().all(dim=-1).T for x in (q_rows, k_rows, v_rows)
        )
        q_rows, k_rows, v_rows = (_Finite.apply(x) for x in (q_rows, k_rows, v_rows))

        z = scale * torch.einsum("qhd,khd->hqk", q_rows, k_rows)
        beyond = z.isnan() | z.isposinf() & (softcap == 0)
        # Logits that are all -inf have no softmax either.
        sunk = (z.isneginf() | ~visible).all(dim=-1, keepdim=True) & (softcap == 0)
        beyond |= sunk & visible
        lost = (visible & (beyond | ~(k_finite & v_finite)[:, None])).any(dim=-1)
        lost |= ~q_finite & visible.any(dim=1)
        z = z.masked_fill(~visible | beyond, 0.0)
        if softcap > 0:
            z = softcap * torch.tanh(z / softcap)
        blind = ~visible.any(dim=1)
        z = z.masked_fill(~(visible | blind[:, None]), -torch.inf)
        p = torch.softmax(z, dim=-1).masked_fill(~visible, 0.0)
        out = torch.einsum("hqk,khd->qhd", p, v_rows)
        lse = torch.logsumexp(z, dim=-1).masked_fill(blind, -torch.inf).T
        outs.append(_Lose.apply(out, lost.T[:, :, None]))
        lses.append(_Lose.apply(lse, lost.T))
    out = torch.cat(outs).to(q.dtype)
    return (out, torch.cat(lses)) if return_lse else out


class _Finite(torch.autograd.Function):
    """0 in place of what is not finite, for products; the gradient is that of the product."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return torch.where(x.isfinite(), x, 0.0)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


class _Lose(torch.autograd.Function):
    """NaN in the lost rows. Their gradient is NaN, too, but for those whose result nobody uses."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, lost: Tensor) -> Tensor:
        ctx.save_for_backward(lost)
        return x.masked_fill(lost, torch.nan)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (lost,) = ctx.saved_tensors
        return gradient.masked_fill(lost & (gradient != 0), torch.nan), None
