"""The policy loss from logits, whose gradient is formed while a row of them is at hand.

R rows of logits, V vocabulary, T target tokens, B sequences. How and why:
docs/ops/logits_grpo_loss.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lvrpo import backends, checks
from lvrpo.backends import library
from lvrpo.ops.head import fused
from lvrpo.ops.head.given import GivenLogits, check_logits, chunks_of, dtypes_of
from lvrpo.ops.head.loss_inputs import Numbers, loss_inputs
from lvrpo.ops.head.rows import OUTSIDE, refuse_rows
from lvrpo.ops.head.targets import Ids, VocabRange, any_of, as_rows, as_targets
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
    top_entropy: float | None = None,
    entropy_threshold: float | Tensor | None = None,
    off_policy_threshold: float | None = None,
    sampler_logprobs: Numbers | None = None,
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
        top_entropy: the fraction of tokens that keeps its policy term, by the entropies of this
            pass. With this or one of the next two all log-probs and entropies come first: the
            logits are read twice from memory.
        entropy_threshold: instead of it, nats.
        off_policy_threshold: nats per token, as `grpo_loss` takes it.
        sampler_logprobs: for that, in the shape of the tokens; None: `old_logprobs`.
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
    checks.check_scale(OP, temperature, softcap)
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
        denominator=denominator,
        top_entropy=top_entropy,
        entropy_threshold=entropy_threshold,
        off_policy_threshold=off_policy_threshold,
        sampler_logprobs=sampler_logprobs,
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
        needed = torch.is_grad_enabled() and logits.requires_grad
        inplace = inplace_backward and not torch.compiler.is_compiling()
        tensors_of_loss, *loss = fused.loss_arguments(indices, data, temperature, softcap)
        options = (*loss, chosen.name)
        *result, lse = _LogitsGrpoLoss.apply(  # type: ignore[no-untyped-call]
            *(logits, tensors_of_loss, options, needed, inplace and needed)
        )
        result[:2] = data.divided(*result[:2])
        refuse_rows(OP, lse, "logits")
    return data.finish_fused(*result)


class _LogitsGrpoLoss(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        logits: Tensor,
        tensors: list[Tensor | None],
        options: tuple[Any, ...],  # what else the op takes
        needed: bool,  # whether there is a gradient to form
        inplace: bool,  # and whether in the place of the logits
    ) -> tuple[Tensor, ...]:
        dlogits = _gradient_of(logits, inplace) if needed else logits.new_empty(0, 0)
        results = torch.ops.lvrpo.logits_grpo_loss_fwd(dlogits, logits, tensors, *options)
        ctx.dtype, ctx.inplace, ctx.options = logits.dtype, inplace, options
        if ctx.inplace:
            torch.autograd.graph.increment_version(logits)
        fused.save_gradients(ctx, (logits, *tensors), [dlogits])
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

        backend = backends.named(ctx.options[-1])
        (dlogits,) = fused.release_gradients(ctx, dloss, ctx.dtype, backend, recompute)
        return dlogits, None, None, None, None


def _gradient_of(logits: Tensor, inplace: bool) -> Tensor:
    """Where the gradient is written."""
    if inplace:
        return logits.detach()
    return logits.new_empty(logits.shape, dtype=dtypes_of(logits)[1])


def _fwd_fake(
    dlogits: Tensor, logits: Tensor, tensors: Sequence[Tensor | None], *_: Any
) -> tuple[Tensor, ...]:
    like = logits.new_empty(0, dtype=dtypes_of(logits)[0])
    return fused.empty_results(like, tensors[0], logits.shape[0])


@library.composite(
    "logits_grpo_loss_fwd", _fwd_fake, of=["gather_logprobs", "grpo_loss"], mutates=["dlogits"]
)
def _fwd(
    dlogits: Tensor,  # [R, V], may be the logits; or [0, 0], for no gradient
    logits: Tensor,
    tensors: Sequence[Tensor | None],
    flags: Sequence[bool],
    names: str,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    call, runs_on = fused.FusedLoss.from_arguments(tensors, flags, names), backends.named(backend)
    gradient, row_index = dlogits.numel() > 0, call.row_index
    launch, terms = runs_on.fused(OP), call.terms
    # A row's kernel knows of its own row alone.
    by_row = row_index is None and not call.sequence_level and terms.is_plain
    if launch is not None and gradient and by_row:
        results: tuple[Tensor, Tensor, Tensor, Tensor, Tensor] = launch(
            *(dlogits, logits, call.token_ids, call.vocab_range),
            *(terms.old_logprobs, terms.advantages, terms.cu_seqlens, terms.ref_logprobs),
            *(call.mask, terms.policy_weights, call.softmax_numbers, terms.loss_numbers),
            *(terms.advantage_per_token, terms.count_empty),
            **terms.choices,
        )
        return results
    rows = call.rows(GivenLogits(logits.detach(), dlogits), runs_on)
    active = any_of(call.mask, row_index, len(logits))
    shortest = max(1, SKIPPED_BYTES // max(1, logits.shape[1] * logits.itemsize))
    # On a GPU nothing is read that is there.
    every = [(0, len(logits))] if len(logits) else []
    for chunk in every if logits.is_cuda else chunks_of(active.tolist(), shortest):
        rows.forward(chunk)
    loss, statistics, dlogprobs, dentropy = call.loss(rows)
    if gradient:
        # All rows at once: those of which nothing is asked are filled with zeros, and not read.
        of_rows = rows.sum_over_rows(dentropy) if call.entropy_bonus else None
        rows.backward((0, len(logits)), dlogprobs, of_rows)
    # Of a masked row that was read nothing is known.
    lse = torch.where(active, rows.lse, 0.0)
    return loss, statistics, *call.reported(rows), lse


@library.register("logits_grpo_loss_rows", kernels=OP, mutates=["dlogits"], choices_of="grpo_loss")
def _rows_fake(
    dlogits: Tensor,  # [R, V], may be the logits
    logits: Tensor,
    token_ids: Tensor,
    vocab_range: Tensor | None,
    old_logprobs: Tensor | None,
    advantages: Tensor,
    cu_seqlens: Tensor,
    ref_logprobs: Tensor | None,
    mask: Tensor,
    policy_weights: Tensor | None,
    factors: Tensor,
    softmax_numbers: Tensor,
    loss_numbers: Tensor,
    ratio: str,
    surrogate: str,
    kl: str,
    kl_factor: str,
    kl_gradient: str,
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        factors.new_empty(token_ids.shape),
        factors.new_empty(logits.shape[0]),
        factors.new_empty(logits.shape[0]),
    )
