"""The fused pass behind logits_grpo_loss: what runs when, and when its gradient is handed over.

R rows, V vocabulary, T tokens, B sequences.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lvrpo import backends
from lvrpo.backends import library
from lvrpo.ops._loss_inputs import LossInputs
from lvrpo.ops._numbers import numbers
from lvrpo.ops.grpo_loss import numbers_of
from lvrpo.ops.head import budget as _linear_inputs
from lvrpo.ops.head import loss as _fused_loss
from lvrpo.ops.head.gemm import Chunk, Rows
from lvrpo.ops.head.loss import LossCall, choices_by_name
from lvrpo.ops.head.rows import OUTSIDE, HeadRows, Softmax
from lvrpo.ops.head.targets import Targets, any_of
from lvrpo.params.loss_metrics import STATISTICS

#: Bytes of logits that are read for nothing rather than call a kernel before them and one after.
SKIPPED_BYTES = 1 << 20


def dtypes_of(logits: Tensor) -> tuple[torch.dtype, torch.dtype]:
    """The dtypes of the results, and of the gradient until it is scaled.

    fp16 cannot hold the gradient of a mean over many tokens before a loss scale multiplies it.
    """
    sums = torch.float64 if logits.dtype == torch.float64 else torch.float32
    return sums, sums if logits.dtype == torch.float16 else logits.dtype


def fused_loss(
    logits: Tensor,  # [R, V]
    targets: Targets,
    data: LossInputs,
    *,
    temperature: float,
    softcap: float | None,
    inplace: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Loss, statistics, log-probs and entropy [T], from arguments that were checked."""
    params, mask = data.params, data.mask
    assert mask is not None
    loss, statistics, logprobs, entropy, lse = _LogitsGrpoLoss.apply(  # type: ignore[no-untyped-call]
        logits,
        torch.where(mask, targets.token_ids, OUTSIDE),
        *(targets.row_index, targets.ranges),
        *(data.old_logprobs, data.advantages, data.layout.offsets, data.ref_logprobs),
        *(mask, data.policy_weights),
        numbers(temperature, softcap or 0.0, OUTSIDE),
        numbers_of(params, data.denominator),
        torch.is_grad_enabled() and logits.requires_grad,
        inplace and not torch.compiler.is_compiling(),
        (
            softcap is not None,
            data.per_token,
            params.count_empty,
            params.sequence_level,
            params.entropy_coef != 0,
            backend,
        ),
        params.choices(),
    )
    _linear_inputs.refuse_rows("logits_grpo_loss", lse, "logits")
    return loss, statistics, logprobs, entropy


class _LogitsGrpoLoss(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        logits: Tensor,
        token_ids: Tensor,
        row_index: Tensor | None,
        vocab_range: Tensor | None,
        old_logprobs: Tensor | None,
        advantages: Tensor,
        cu_seqlens: Tensor,
        ref_logprobs: Tensor | None,
        mask: Tensor,
        policy_weights: Tensor | None,
        head_numbers: Tensor,
        loss_numbers: Tensor,
        needed: bool,
        inplace: bool,
        how: tuple[Any, ...],
        choices: dict[str, str],
    ) -> tuple[Tensor, ...]:
        inputs = (
            *(logits, token_ids, row_index, vocab_range),
            *(old_logprobs, advantages, cu_seqlens, ref_logprobs, mask, policy_weights),
            *(head_numbers, loss_numbers),
        )
        dlogits = _gradient_of(logits, inplace) if needed else logits.new_empty(0, 0)
        results = torch.ops.lvrpo.logits_grpo_loss_fwd(dlogits, *inputs, *how, **choices)
        ctx.dtype, ctx.inplace = logits.dtype, inplace and needed
        ctx.how, ctx.choices = how, choices
        if ctx.inplace:
            torch.autograd.graph.increment_version(logits)
        _fused_loss.keep(ctx, inputs, [dlogits])
        ctx.mark_non_differentiable(*results[1:])
        return tuple(results)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dloss: Tensor, *_: Tensor) -> tuple[Any, ...]:
        if ctx.inplace:
            if ctx.kept is None:
                raise RuntimeError(
                    "logits_grpo_loss: a second backward needs the logits, which "
                    "inplace_backward=True has overwritten with their gradient"
                )
            _ = ctx.saved_tensors  # raises if the gradient was changed in the place of the logits

        def again() -> list[Tensor]:
            logits, *others = ctx.saved_tensors
            dlogits = _gradient_of(logits, inplace=False)
            torch.ops.lvrpo.logits_grpo_loss_fwd(dlogits, logits, *others, *ctx.how, **ctx.choices)
            return [dlogits]

        return *_fused_loss.hand_over(ctx, dloss, again), *[None] * 15


def _gradient_of(logits: Tensor, inplace: bool) -> Tensor:
    """Where the gradient is written."""
    if inplace:
        return logits.detach()
    return logits.new_empty(logits.shape, dtype=dtypes_of(logits)[1])


def _fwd_fake(
    dlogits: Tensor, logits: Tensor, token_ids: Tensor, *_: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    like = logits.new_empty(0, dtype=dtypes_of(logits)[0])
    return (
        like.new_empty(()),
        like.new_empty(len(STATISTICS), dtype=torch.float64),
        like.new_empty(token_ids.shape),
        like.new_empty(token_ids.shape),
        like.new_empty(logits.shape[0]),
    )


@library.composite(
    "logits_grpo_loss_fwd", _fwd_fake, of=["gather_logprobs", "grpo_loss"], mutates=["dlogits"]
)
def _fwd(
    dlogits: Tensor,  # [R, V], may be the logits; or [0, 0], for no gradient
    logits: Tensor,
    token_ids: Tensor,
    row_index: Tensor | None,
    vocab_range: Tensor | None,
    old_logprobs: Tensor | None,
    advantages: Tensor,
    cu_seqlens: Tensor,
    ref_logprobs: Tensor | None,
    mask: Tensor,
    policy_weights: Tensor | None,
    head_numbers: Tensor,
    loss_numbers: Tensor,
    has_softcap: bool,
    advantage_per_token: bool,
    count_empty: bool,
    per_sequence: bool,
    entropy_bonus: bool,
    backend: str,
    ratio: str,
    surrogate: str,
    kl: str,
    kl_factor: str,
    kl_gradient: str,
    aggregation: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    data = old_logprobs, advantages, cu_seqlens, ref_logprobs, mask, policy_weights
    choices = choices_by_name(ratio, surrogate, kl, kl_factor, kl_gradient, aggregation)
    gradient = dlogits.numel() > 0
    runs_on = backends.named(backend)
    fused = runs_on.fused("logits_grpo_loss")
    if fused is not None and gradient and row_index is None and not per_sequence:
        results: tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
        results = fused(
            *(dlogits, logits, token_ids, vocab_range, *data),
            *(head_numbers, loss_numbers, has_softcap, advantage_per_token, count_empty),
            **choices,
        )
        return results
    loss_call = LossCall(*data, loss_numbers, advantage_per_token, count_empty, choices)
    head = GivenLogits(logits.detach(), dlogits)
    rows = HeadRows(head, Softmax(head_numbers, runs_on), token_ids, row_index, vocab_range)
    seen = any_of(mask, row_index, len(logits))
    shortest = max(1, SKIPPED_BYTES // max(1, logits.shape[1] * logits.itemsize))
    # On a GPU nothing is read that is there.
    every = [(0, len(logits))] if len(logits) else []
    for run in every if logits.is_cuda else runs_of(seen.tolist(), shortest):
        rows.forward(run)
    loss, statistics, dlogprobs, dentropy = loss_call(rows)
    if gradient:
        # All rows at once: those of which nothing is asked are filled with zeros, and not read.
        of_rows = rows.sum_over_rows(dentropy) if entropy_bonus else None
        rows.backward((0, len(logits)), dlogprobs, of_rows)
    # Of a masked row that was read nothing is known.
    lse = torch.where(seen, rows.lse, 0.0)
    return loss, statistics, *loss_call.reported(rows), lse


class GivenLogits:
    """Logits that are there, in the place of the GEMMs of `LinearHead`."""

    def __init__(self, logits: Tensor, dlogits: Tensor) -> None:
        self._logits, self._dlogits = logits, dlogits
        self.rows = len(logits)
        #: Empty, of the dtype and device of the results.
        self.like = logits.new_empty(0, dtype=dtypes_of(logits)[0])

    def project(self, rows: Rows, count: int) -> Tensor:
        """[count, V] logits of these rows."""
        return self._logits[rows]

    def gradient_buffer(self, rows: Rows, count: int) -> Tensor:
        """[count, V] for their gradient."""
        return self._dlogits[rows]

    def backward(self, rows: Rows, dlogits: Tensor, asked: Tensor) -> None:
        """Nothing to add: the gradient of the logits is the result."""


def runs_of(seen: Sequence[bool], shortest: int) -> list[Chunk]:
    """Runs of rows that are seen, together with gaps of fewer than `shortest` between them."""
    runs: list[Chunk] = []
    for row, is_seen in enumerate(seen):
        if is_seen:
            near = runs and row - runs[-1][1] < shortest
            runs.append((runs.pop()[0] if near or (runs and runs[-1][1] == row) else row, row + 1))
    return runs
