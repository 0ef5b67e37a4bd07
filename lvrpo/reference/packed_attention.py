"""softmax(scale * q k^T) v where the mask lets a query see a key, document by document."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lvrpo.reference._precision import widen

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
        # Keys beyond the selected queries may be memory that nobody wrote yet.
        unseen = ~visible.any(dim=0)[:, None, None]
        q_rows = widen(q[rows])
        k_rows = widen(k[keys]).masked_fill(unseen, 0.0).repeat_interleave(heads_per_kv, dim=1)
        v_rows = widen(v[keys]).masked_fill(unseen, 0.0).repeat_interleave(heads_per_kv, dim=1)

        z = scale * torch.einsum("qhd,khd->hqk", q_rows, k_rows)
        if softcap > 0:
            z = softcap * torch.tanh(z / softcap)
        blind = ~visible.any(dim=1)
        z = z.masked_fill(~(visible | blind[:, None]), -torch.inf)
        p = torch.softmax(z, dim=-1).masked_fill(blind[:, None], 0.0)
        outs.append(torch.einsum("hqk,khd->qhd", p, v_rows))
        lses.append(torch.logsumexp(z, dim=-1).masked_fill(blind, -torch.inf).T)
    out = torch.cat(outs).to(q.dtype)
    return (out, torch.cat(lses)) if return_lse else out
