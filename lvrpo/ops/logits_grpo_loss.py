"""The policy loss from logits, whose gradient is formed while a row of them is at hand.

R rows of logits, V vocabulary, T target tokens, B sequences. How and why:
docs/ops/logits_grpo_loss.md.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lvrpo import backends, checks
from lvrpo.backends import library
from lvrpo.ops.head.fused import FusedLoss, release_gradients, save_gradients
from lvrpo.ops.head.given import GivenLogits, check_logits, chunks_of, dtypes_of
from lvrpo.ops.head.loss_inputs import Numbers, loss_inputs
from lvrpo.ops.head.rows import OUTSIDE, refuse_rows
from lvrpo.ops.head.targets import Ids, VocabRange, any_of, as_rows, as_targets, check_scale
from lvrpo.params.loss_metrics import STATISTICS
from lvrpo.params.policy_loss import FusedPolicyLoss, LossParams
from lvrpo.reference.logits_grpo_loss import logits_grpo_loss as reference_logits_grpo_loss
from lvrpo.token_layout import Level

OP = "logits_grpo_loss"
_DEFAULT = LossParams()
#: Bytes of logits that are read for nothing rather than call a kernel before them and one after.
SKIPPED_BYTES = 1 << 20


@checks.replaced(token_weights=checks.MASK_AND_WEIGHTS)
def logits_grpo_loss(
    logits: Tensor,
    token_ids: Ids,
    old_logprobs: Tensor | None,
    advantages: Numbers,
    cu_seqlens: Tensor | Sequence[int] | None = None,
    *,
    row_index: Ids | None = None,
    mask: Numbers | None = None,
    policy_weights: Numbers | None = None,
    level: Level | None = None,
    ref_logprobs: Tensor | None = None,
    denominator: float | Tensor | None = None,
    params: LossParams = _DEFAULT,
    temperature: float = 1.0,
    softcap: float | None = None,
    vocab_range: VocabRange = None,
    ignore_index: int = -100,
    inplace_backward: bool = False,
    backend: str | None = None,
) -> FusedPolicyLoss:
    """`grpo_loss` of the log-probs and entropies of `gather_logprobs`, with its gradient.

    Differentiable in `logits`. What a token adds to the loss depends on its own row (or sequence)
    only, so the forward writes the gradient of a row as soon as it knows the row's log-prob, while
    the logits are in a cache. Rows whose gradient is zero whatever their logits (advantage 0, no
    KL, no entropy bonus) are read once; rows without an unmasked token are not read, and may hold
    anything. Under autocast logits are taken as they are, as torch's own losses take them.

    The backward scales the gradient by its upstream gradient, in place, and gives it away. A second
    backward computes it anew.

    Args:
        logits: [R, V], or [B, C, V] for padded tokens; fp32, fp64, bf16 or fp16; any row stride.
        token_ids: [T] packed or [B, C] padded, of any integer dtype. A token of `ignore_index` is
            masked.
        old_logprobs: as `grpo_loss` takes them, like everything below up to `params`.
        advantages: [B] per sequence or in the shape of the tokens.
        cu_seqlens: [B + 1] offsets of packed sequences in the tokens; None for padded ones.
        row_index: the row (of the flattened ones) that predicts each token, in the shape of the
            tokens; None: token t belongs to row t.
        mask: what counts in denominators, KL, entropy and metrics.
        policy_weights: factors >= 0 of the policy term alone.
        level: what the advantages are given for.
        ref_logprobs: in the shape of the tokens.
        denominator: replaces the number that the outer mean divides by.
        params: the loss. The entropy that `entropy_coef` needs is computed here. With a ratio per
            sequence all log-probs come first: the logits are read twice from memory.
        temperature: divides the logits; finite, > 0.
        softcap: as in `gather_logprobs`.
        vocab_range: likewise.
        ignore_index: see `token_ids`.
        inplace_backward: the gradient takes the place of the logits in memory, already in this
            call. Their values are lost: reading them afterwards reads the gradient, autograd raises
            where it needs them, and a second backward is an error. Without a gradient to form
            nothing is overwritten. The torch backend and torch.compile do without.
        backend: a name of `lvrpo.backends.ALL`, or None for the first that can run.

    Returns:
        FusedPolicyLoss in fp32 (fp64 from fp64).

    Raises:
        ValueError: as `gather_logprobs` and `grpo_loss`; or `inplace_backward` with fp16, which
            cannot hold a gradient before a loss scale has multiplied it.
        RuntimeError: in the backward: a second one after `inplace_backward`, or the gradient was
            changed in the place of the logits.
    """
    shaped, logits = logits, as_rows(OP, "logits", logits, "V")
    check_logits(OP, logits, inplace_backward)
    dtype, dtype_of_gradient = dtypes_of(logits)
    if inplace_backward and dtype_of_gradient != logits.dtype:
        raise ValueError(
            f"{OP}: logits is {logits.dtype}; inplace_backward=True needs a dtype that holds the "
            "gradient before a loss scale has multiplied it: float32, float64 or bfloat16"
        )
    check_scale(OP, temperature, softcap)
    targets, strange = as_targets(
        *(OP, "logits", shaped, logits.shape[1]),
        *(token_ids, row_index, vocab_range, ignore_index),
    ).without_strangers(logits.shape[1])
    data = loss_inputs(
        OP,
        ("token_ids", targets.token_ids.reshape(targets.tokens)),
        dtype,
        old_logprobs=old_logprobs,
        advantages=advantages,
        cu_seqlens=cu_seqlens,
        mask=mask,
        policy_weights=policy_weights,
        level=level,
        ref_logprobs=ref_logprobs,
        entropy=None,
        denominator=denominator,
        params=params,
    ).of_targets(targets, strange)
    tensors = (logits, *targets.indices(), *data.tensors())
    chosen = backends.resolve(OP, tensors, backend, choices=params.choices())
    functional = chosen.functional(OP, reference_logits_grpo_loss)
    if functional is not None:
        with checks.without_autocast(logits):
            result = functional(
                logits,
                targets.token_ids,
                row_index=targets.row_index,
                vocab_range=targets.ranges,
                temperature=temperature,
                softcap=softcap,
                ignore_index=ignore_index,
                **data.for_reference(),
            )
    else:
        assert data.mask is not None
        ids = torch.where(data.mask, targets.token_ids, OUTSIDE)
        indices = ids, targets.row_index, targets.ranges
        how = _How(
            needed=torch.is_grad_enabled() and logits.requires_grad,
            inplace=inplace_backward and not torch.compiler.is_compiling(),
            has_softcap=softcap is not None,
            backend=chosen.name,
        )
        fused = FusedLoss.of(indices, data, temperature, softcap)
        *result, lse = _LogitsGrpoLoss.apply(logits, fused, how)  # type: ignore[no-untyped-call]
        refuse_rows(OP, lse, "logits")
    return data.finish_fused(*result)


@dataclasses.dataclass(frozen=True)
class _How:
    """How the fused loss runs: whether and where it writes a gradient, and what a kernel omits."""

    needed: bool
    inplace: bool
    has_softcap: bool
    backend: str


class _LogitsGrpoLoss(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, logits: Tensor, fused: FusedLoss, how: _How
    ) -> tuple[Tensor, ...]:
        tensors = fused.tensors()
        options = fused.flags(), fused.names(), how.has_softcap, how.backend
        dlogits = _gradient_of(logits, how.inplace) if how.needed else logits.new_empty(0, 0)
        results = torch.ops.lvrpo.logits_grpo_loss_fwd(dlogits, logits, tensors, *options)
        ctx.dtype, ctx.inplace, ctx.options = logits.dtype, how.inplace and how.needed, options
        if ctx.inplace:
            torch.autograd.graph.increment_version(logits)
        save_gradients(ctx, (logits, *tensors), [dlogits])
        ctx.mark_non_differentiable(*results[1:])
        return tuple(results)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dloss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.inplace:
            if ctx.gradients is None:
                raise RuntimeError(
                    "logits_grpo_loss: a second backward needs the logits, which "
                    "inplace_backward=True has overwritten with their gradient"
                )
            _ = ctx.saved_tensors  # raises if the gradient was changed in the place of the logits

        def recompute() -> list[Tensor]:
            logits, *tensors = ctx.saved_tensors
            dlogits = _gradient_of(logits, inplace=False)
            torch.ops.lvrpo.logits_grpo_loss_fwd(dlogits, logits, tensors, *ctx.options)
            return [dlogits]

        (dlogits,) = release_gradients(ctx, dloss, ctx.dtype, recompute)
        return dlogits, None, None


def _gradient_of(logits: Tensor, inplace: bool) -> Tensor:
    """Where the gradient is written."""
    if inplace:
        return logits.detach()
    return logits.new_empty(logits.shape, dtype=dtypes_of(logits)[1])


def _fwd_fake(
    dlogits: Tensor, logits: Tensor, tensors: Sequence[Tensor | None], *_: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    like, token_ids = logits.new_empty(0, dtype=dtypes_of(logits)[0]), tensors[0]
    assert token_ids is not None
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
    tensors: Sequence[Tensor | None],
    flags: Sequence[bool],
    names: str,
    has_softcap: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    fused, runs_on = FusedLoss.from_arguments(tensors, flags, names), backends.named(backend)
    gradient, row_index = dlogits.numel() > 0, fused.row_index
    launch = runs_on.fused(OP)
    if launch is not None and gradient and row_index is None and not fused.sequence_level:
        results: tuple[Tensor, Tensor, Tensor, Tensor, Tensor] = launch(
            *(dlogits, logits, fused.token_ids, fused.vocab_range),
            *(fused.old_logprobs, fused.advantages, fused.cu_seqlens, fused.ref_logprobs),
            *(fused.mask, fused.policy_weights, fused.softmax_numbers, fused.loss_numbers),
            *(has_softcap, fused.advantage_per_token, fused.count_empty),
            **fused.choices,
        )
        return results
    rows = fused.rows(GivenLogits(logits.detach(), dlogits), runs_on)
    active = any_of(fused.mask, row_index, len(logits))
    shortest = max(1, SKIPPED_BYTES // max(1, logits.shape[1] * logits.itemsize))
    # On a GPU nothing is read that is there.
    every = [(0, len(logits))] if len(logits) else []
    for chunk in every if logits.is_cuda else chunks_of(active.tolist(), shortest):
        rows.forward(chunk)
    loss, statistics, dlogprobs, dentropy = fused.loss(rows)
    if gradient:
        # All rows at once: those of which nothing is asked are filled with zeros, and not read.
        of_rows = rows.sum_over_rows(dentropy) if fused.entropy_bonus else None
        rows.backward((0, len(logits)), dlogprobs, of_rows)
    # Of a masked row that was read nothing is known.
    lse = torch.where(active, rows.lse, 0.0)
    return loss, statistics, *fused.reported(rows), lse
