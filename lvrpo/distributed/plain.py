"""The kernels that `ShardRows` runs, as plain PyTorch: for where a backend has none.

Arguments and results are those of `torch.ops.lvrpo.<name>`.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from lvrpo.backends import Backend
from lvrpo.backends.backend import Function
from lvrpo.backends.torch import TorchBackend
from lvrpo.dtypes import widen
from lvrpo.ops.head.fused import FusedLoss
from lvrpo.ops.head.loss_inputs import LossInputs
from lvrpo.ops.head.rows import HeadRows
from lvrpo.reference.gather_logprobs import allowed_columns, gather_logprobs, scaled
from lvrpo.reference.grpo_loss import grpo_loss


class PlainKernels(TorchBackend):
    """The backend "torch", with the two passes of `gather_logprobs` apart."""

    def op(self, name: str) -> Function:
        """The pass of this name."""
        passes: dict[str, Function] = {"gather_logprobs_fwd": _fwd, "gather_logprobs_bwd": _bwd}
        return passes[name]


def with_kernels(backend: Backend, op: str) -> Backend:
    """The backend that was chosen for an op, or one with kernels in place of its reference."""
    return backend if backend.functional(op, len) is None else PlainKernels()


@dataclasses.dataclass(frozen=True)
class PlainLoss(FusedLoss):
    """`FusedLoss` whose loss and derivatives are the reference's.

    Attributes:
        data: what it takes besides log-probs and entropies.
    """

    data: LossInputs = dataclasses.field(kw_only=True)

    def loss(self, rows: HeadRows) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """As `FusedLoss.loss`."""
        leaves = rows.logprobs.detach(), rows.entropy_of_tokens().detach()
        with torch.enable_grad():
            logprobs, entropy = (x.clone().requires_grad_() for x in leaves)
            loss, statistics = grpo_loss(logprobs, entropy=entropy, **self.data.for_reference())
            zero = 0.0 * (logprobs.sum() + entropy.sum())  # of a loss that has no gradient
            found = torch.autograd.grad(loss + zero.nan_to_num(), (logprobs, entropy))
        return loss.detach(), statistics, found[0], found[1]


def _fwd(
    logits: Tensor,
    token_ids: Tensor,
    row_index: Tensor | None,
    vocab_range: Tensor | None,
    numbers: Tensor,
    *_: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    temperature, softcap, ignore_index = numbers.tolist()
    with torch.no_grad():
        logprobs, entropy, sum_squares = gather_logprobs(
            *(logits, token_ids, row_index),
            temperature=temperature,
            softcap=softcap or None,
            vocab_range=vocab_range,
            ignore_index=int(ignore_index),
            return_entropy=True,
            return_sum_squares=True,
        )
        x = widen(logits)
        z = scaled(x, allowed_columns(x, vocab_range), temperature, softcap or None)
        lse = z.logsumexp(dim=1)
    return logprobs, lse, entropy, sum_squares


def _bwd(
    dlogits: Tensor,
    dlogprobs: Tensor,
    dentropy: Tensor | None,
    logits: Tensor,
    token_ids: Tensor,
    row_index: Tensor | None,
    vocab_range: Tensor | None,
    lse: Tensor,
    entropy: Tensor | None,
    numbers: Tensor,
) -> None:
    temperature, softcap, ignore_index = numbers.tolist()
    x = widen(logits.detach())
    row = torch.arange(len(x), device=x.device) if row_index is None else row_index
    asking = token_ids != int(ignore_index)
    sent = torch.where(asking, dlogprobs, 0.0)
    hits = torch.zeros_like(x)
    hits.index_put_((row, torch.where(asking, token_ids, 0)), sent, accumulate=True)
    total = torch.zeros_like(lse).index_add(0, row, sent)
    allowed = allowed_columns(x, vocab_range)
    with torch.enable_grad():
        leaf = x.clone().requires_grad_()
        z = scaled(leaf, allowed, temperature, softcap or None)
    log_p = z.detach() - lse[:, None]
    slope = total[:, None]
    if dentropy is not None and entropy is not None:
        slope = dentropy[:, None] * (log_p + entropy[:, None]) + slope
    p = log_p.exp()
    dz = hits - torch.where(p > 0, p * slope, 0.0)
    asked = (hits != 0).any(dim=1)
    if dentropy is not None:
        asked |= dentropy != 0
    kept = allowed & asked[:, None]
    (gradient,) = torch.autograd.grad(z, leaf, torch.where(kept, dz, 0.0))
    dlogits.copy_(torch.where(kept, gradient, 0.0))


def loss_of(arguments: tuple[Any, ...], data: LossInputs, backend: Backend) -> FusedLoss:
    """The loss of `fused.loss_arguments` that a backend runs."""
    call = FusedLoss.from_arguments(*arguments)
    if not isinstance(backend, PlainKernels):
        return call
    fields = {field.name: getattr(call, field.name) for field in dataclasses.fields(FusedLoss)}
    return PlainLoss(**fields, data=data)
