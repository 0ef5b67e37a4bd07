"""Attention over a packed buffer of texts, images, documents and shared prompts, from a SpanMask.

L tokens of the buffer, Lq query rows (L unless selected), Hq / Hkv query / key heads, D / Dv head
widths. Derivation: docs/ops/packed_attention.md.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal, overload

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lvrpo import backends, checks
from lvrpo.backends import Backend, library
from lvrpo.dtypes import numbers
from lvrpo.masks import SpanMask
from lvrpo.masks.schedule import schedule
from lvrpo.masks.tables import Schedule, SpanColumn
from lvrpo.reference.packed_attention import packed_attention as reference_packed_attention

OP = "packed_attention"
library.check_table(OP, "spans", [column.name.lower() for column in SpanColumn])


@overload
def packed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: SpanMask,
    *,
    scale: float | None = ...,
    softcap: float = ...,
    return_lse: Literal[False] = ...,
    dropout_p: float = ...,
    window_size: tuple[int, int] | None = ...,
    backend: str | None = ...,
) -> Tensor: ...


@overload
def packed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: SpanMask,
    *,
    scale: float | None = ...,
    softcap: float = ...,
    return_lse: Literal[True],
    dropout_p: float = ...,
    window_size: tuple[int, int] | None = ...,
    backend: str | None = ...,
) -> tuple[Tensor, Tensor]: ...


def packed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: SpanMask,
    *,
    scale: float | None = None,
    softcap: float = 0.0,
    return_lse: bool = False,
    dropout_p: float = 0.0,
    window_size: tuple[int, int] | None = None,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """softmax(scale * q k^T) v over the keys that the mask lets each query see.

    Query head h reads key head h // (Hq / Hkv). The work is that of the visible pairs; no [Lq, L]
    tensor is formed. Differentiable in q, k and v, through both results. Deterministic. What a row
    does not see, and rows without an upstream gradient, may hold anything, NaN included. Autocast
    lowers q, k and v, as for torch's own attention; without it their dtypes must be one.

    Args:
        q: [Lq, Hq, D] fp32, fp64, bf16 or fp16; row i is buffer row mask.rows[i].
        k: [L, Hkv, D], same dtype; Hq is a multiple of Hkv.
        v: [L, Hkv, Dv], same dtype.
        mask: a `SpanMask` of length L, on the device of q.
        scale: multiplies the scores; None means D^-0.5.
        softcap: scores become softcap * tanh(score / softcap) before the softmax; 0 means none.
        return_lse: also return the log-sum-exp of every row's scores.
        dropout_p: 0; a prompt that is shared would be dropped out alike for all its completions.
        window_size: None or (-1, -1), for a sliding window is the mask's: `mask.with_window`.
        backend: a name of `lvrpo.backends.ALL`, or None for the first but "flash" that can run.
            "triton" takes heads up to 256 wide (128 in fp64), "flash" (flash attention) 16 bits.

    Returns:
        out: [Lq, Hq, Dv] in q's dtype; 0 in a row that sees no key, which gets no gradient.
        lse: [Lq, Hq] fp32 (fp64 from fp64 inputs), nats, only with `return_lse`; -inf in a row that
            sees no key.

    Raises:
        ValueError: shapes, dtypes or devices do not match each other or the mask; scale is not
            finite; softcap is negative or not finite; dropout or a sliding window is asked for.
    """
    scale = q.shape[-1] ** -0.5 if scale is None and q.dim() and q.shape[-1] else scale
    scale = 1.0 if scale is None else scale + 0.0
    q, k, v = (checks.as_factor(x) for x in (q, k, v))
    _check(q, k, v, mask, scale, softcap)
    if dropout_p != 0:
        raise ValueError(f"{OP}: dropout_p is {dropout_p}, expected 0: there is no dropout")
    if window_size not in (None, (-1, -1)):
        raise ValueError(
            f"{OP}: window_size is {window_size}, expected None: a sliding window counts positions "
            "along the mask's tree, mask.with_window(window)"
        )
    how = {"scale": scale, "softcap": softcap, "return_lse": return_lse}
    arguments = {"q": q, "k": k, "v": v, "mask": mask, **how}
    chosen = backends.resolve(OP, (q, k, v), backend, arguments=arguments)
    if torch.is_grad_enabled():
        # A cache that a rollout filled is a constant like any other.
        q, k, v = (checks.as_saved(x) for x in (q, k, v))
    functional = chosen.functional(OP, reference_packed_attention)
    if functional is not None:
        with checks.without_autocast(q):
            result: Tensor | tuple[Tensor, Tensor] = functional(q, k, v, mask, **how)
        return result
    order: Schedule | tuple[None, ...] = (None,) * len(Schedule._fields)
    if chosen.reads_schedule:
        # Only the interpreter's masks are on the host, where they have none.
        order = mask.schedule or schedule(mask)
    options = _Options(mask, order, numbers(scale, softcap, mask.window or 0), chosen)
    out, lse = _PackedAttention.apply(q, k, v, options)
    return (out, lse) if return_lse else out


@dataclasses.dataclass(frozen=True)
class _Options:
    """What `lvrpo::packed_attention_fwd` takes besides q, k and v, from whom."""

    mask: SpanMask
    schedule: Schedule | tuple[None, ...]
    numbers: Tensor
    backend: Backend

    def tables(self) -> tuple[Tensor | None, ...]:
        """Those of the mask and of its schedule, in the order of the op."""
        mask = self.mask
        of_mask = mask.q_lo, mask.q_hi, mask.rows, mask.spans, mask.runs, mask.positions
        return (*of_mask, *self.schedule)


class _PackedAttention(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, options: _Options
    ) -> tuple[Tensor, Tensor]:
        tables, ctx.backend = options.tables(), options.backend
        *of_forward, _, _, _ = tables  # the backward alone goes by keys
        run = options.backend.op("packed_attention_fwd")
        out, lse = run(q, k, v, *of_forward, options.numbers)
        ctx.save_for_backward(q, k, v, out, lse, options.numbers, *tables)
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, dout: Tensor | None, dlse: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, None]:
        # Once: activation checkpointing unpacks what was saved a single time.
        q, k, v, out, lse, values, *tables = ctx.saved_tensors
        dout = torch.zeros_like(out) if dout is None else dout
        if not any(ctx.needs_input_grad[1:3]):
            tables = _with_constant_keys(*tables)
        dq, dk, dv = ctx.backend.op("packed_attention_bwd")(
            dout, dlse, q, k, v, out, lse, *tables, values
        )
        return dq, dk, dv, None


def _with_constant_keys(*tables: Tensor | None) -> tuple[Tensor | None, ...]:
    """The tables of a mask all of whose spans are frozen, as far as a backward pass reads them."""
    *head, spans, runs, positions, query_tiles, key_work, key_rows, key_parts = tables
    assert spans is not None
    spans = spans.clone()
    spans[:, SpanColumn.FROZEN] = 1
    key_work, key_parts = (None if x is None else x[:0] for x in (key_work, key_parts))
    return (*head, spans, runs, positions, query_tiles, key_work, key_rows, key_parts)


@library.register("packed_attention_fwd", kernels=OP)
def _fwd_fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_lo: Tensor,
    q_hi: Tensor,
    rows: Tensor,
    spans: Tensor,
    runs: Tensor,
    positions: Tensor | None,
    query_tiles: Tensor | None,
    numbers: Tensor,
) -> tuple[Tensor, Tensor]:
    lse_dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    out = q.new_empty(q.shape[0], q.shape[1], v.shape[2])
    return out, q.new_empty(q.shape[:2], dtype=lse_dtype)


@library.register("packed_attention_bwd", kernels=OP)
def _bwd_fake(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    q_lo: Tensor,
    q_hi: Tensor,
    rows: Tensor,
    spans: Tensor,
    runs: Tensor,
    positions: Tensor | None,
    query_tiles: Tensor | None,
    key_work: Tensor | None,
    key_rows: Tensor | None,
    key_parts: Tensor | None,
    numbers: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _check(q: Tensor, k: Tensor, v: Tensor, mask: SpanMask, scale: float, softcap: float) -> None:
    for name, tensor, shape in (
        ("q", q, ("Lq", "Hq", "D")),
        ("k", k, ("L", "Hkv", "D")),
        ("v", v, ("L", "Hkv", "Dv")),
    ):
        checks.check_shape(OP, name, tensor, shape)
        if tensor.dtype not in backends.FLOATING:
            raise ValueError(f"{OP}: {name} is {tensor.dtype}, expected fp32, fp64, bf16 or fp16")
        if tensor.dtype != q.dtype:
            raise ValueError(f"{OP}: {name} is {tensor.dtype}, q is {q.dtype}")
    if not isinstance(mask, SpanMask):
        raise ValueError(f"{OP}: mask is a {type(mask).__name__}, expected a SpanMask")
    checks.check_same_device(OP, q=q, k=k, v=v, mask=mask.q_lo)
    if q.shape[0] != mask.num_queries:
        raise ValueError(f"{OP}: q has {q.shape[0]} rows, the mask {mask.num_queries} queries")
    for name, tensor in (("k", k), ("v", v)):
        if tensor.shape[0] != mask.length:
            raise ValueError(f"{OP}: {name} has {tensor.shape[0]} rows, the mask {mask.length}")
    if k.shape[1] != v.shape[1]:
        raise ValueError(f"{OP}: k has {k.shape[1]} heads, v has {v.shape[1]}")
    if k.shape[2] != q.shape[2]:
        raise ValueError(f"{OP}: k has head width {k.shape[2]}, q has {q.shape[2]}")
    if k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise ValueError(f"{OP}: q has {q.shape[1]} heads, not a multiple of k's {k.shape[1]}")
    if not -math.inf < scale < math.inf:
        raise ValueError(f"{OP}: scale is {scale}, expected a finite number")
    if not 0 <= softcap < math.inf:
        raise ValueError(f"{OP}: softcap is {softcap}, expected >= 0; 0 means no cap")
