"""The policy loss of GRPO and its relatives: loss, metrics and gradient in one pass.

T packed tokens, B sequences. Derivation: docs/ops/grpo_loss.md.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lvrpo.ops import _backend, _checks, _library
from lvrpo.ops._policy_loss import (
    LOSS_PRESETS,
    LossMetrics,
    LossParams,
    PolicyLoss,
    scalars_of,
)
from lvrpo.reference._precision import widen
from lvrpo.reference.grpo_loss import grpo_loss as reference_grpo_loss

OP = "grpo_loss"
__all__ = [
    "LOSS_PRESETS",
    "LossMetrics",
    "LossParams",
    "PolicyLoss",
    "grpo_loss",
    "loss_op",
    "scalars_of",
]

_DEFAULT = LossParams()


def grpo_loss(
    logprobs: Tensor,
    old_logprobs: Tensor | None,
    advantages: Tensor,
    cu_seqlens: Tensor,
    *,
    ref_logprobs: Tensor | None = None,
    entropy: Tensor | None = None,
    token_weights: Tensor | None = None,
    denominator: float | Tensor | None = None,
    params: LossParams = _DEFAULT,
    backend: str | None = None,
) -> PolicyLoss:
    """Surrogate(ratio, A) + beta KL - entropy_coef H of every token, aggregated.

    Differentiable in `logprobs` and `entropy`; everything else is data.

    Args:
        logprobs: [T] log-probs of the sampled tokens under the policy, nats, any floating dtype.
        old_logprobs: [T] the same under the policy that sampled them. None: that is this policy,
            the ratio is exactly 1 and its gradient is that of the log-prob.
        advantages: [B] per sequence, or [T] per token; read as per sequence when B equals T. The
            ratios "seq_mean" and "seq_sum" take one per sequence only.
        cu_seqlens: [B + 1] int64 offsets of the sequences; a sequence may be empty.
        ref_logprobs: [T] log-probs under the reference policy; needed when beta > 0, and otherwise
            only for the KL metric.
        entropy: [T] entropy at each token, nats; needed when entropy_coef is not 0.
        token_weights: [T] factors >= 0 of the policy term, or a bool mask: a mask and any sampler
            correction in one. A weight of 0 leaves the token out altogether: no KL, no entropy, not
            counted, and its log-probs may hold anything.
        denominator: replaces the number that the outer mean divides by: the active tokens for
            "token_mean", 1 for "token_sum", the sequences for the others. Give the count of the
            whole optimiser step when a call sees a part of it (gradient accumulation, ranks,
            modalities); a sum of such losses is then the loss of the whole. A tensor is not read on
            the host.
        params: the loss.
        backend: "cpp", "triton", "torch", or None for the first that can run.

    Returns:
        PolicyLoss in fp32 (fp64 from fp64 log-probs).

    Raises:
        ValueError: shapes or dtypes do not match, or `params` asks for an input that is not given;
            on a CPU also when an advantage is not finite, a weight is negative, offsets do not fit,
            or a log-prob or entropy of an active token makes the loss infinite or NaN.
    """
    optional = {
        "old_logprobs": old_logprobs,
        "ref_logprobs": ref_logprobs,
        "entropy": entropy,
        "token_weights": token_weights,
    }
    check_inputs(OP, logprobs, advantages, cu_seqlens, optional, denominator, params)
    logp = widen(logprobs)
    as_logp = {name: x if x is None else x.to(logp.dtype) for name, x in optional.items()}
    # Dividing by a tensor afterwards keeps the op free of a read from the device.
    host = 1.0 if isinstance(denominator, Tensor) else denominator
    chosen = _backend.resolve(OP, (logprobs, *optional.values(), advantages, cu_seqlens), backend)
    as_data = advantages.detach().to(logp.dtype)
    if chosen == "torch":
        loss, metrics = reference_grpo_loss(
            logp,
            advantages=as_data,
            cu_seqlens=cu_seqlens,
            denominator=host,
            params=params,
            **as_logp,
        )
    else:
        result = _GrpoLoss.apply(  # type: ignore[no-untyped-call]
            logp,
            as_logp["entropy"],
            as_logp["old_logprobs"],
            as_data,
            cu_seqlens,
            as_logp["ref_logprobs"],
            as_logp["token_weights"],
            scalars_of(params, host),
            chosen,
        )
        loss, metrics = result
    if _checks.check_values(loss) and not bool(loss.detach().isfinite()):
        refuse_tokens(OP, logprobs, optional)
    fields = list(metrics.unbind())
    if isinstance(denominator, Tensor):
        divisor = denominator.detach().to(loss.dtype).reshape(())
        loss, fields[0] = loss / divisor, fields[0] / divisor
    return PolicyLoss(loss, LossMetrics(*fields))


def loss_op(backend: str) -> Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]]:
    """`grpo_loss_fwd` of "cpp" or "triton", for ops that form this loss inside.

    Called with (logprobs, old_logprobs, advantages, cu_seqlens, ref_logprobs, entropy,
    token_weights, *scalars_of(params, denominator)), all floating tensors in the dtype of
    `logprobs`. Returns loss, the fields of `LossMetrics` as a vector, and the derivatives of the
    loss by `logprobs` and `entropy`; nothing is checked and nothing is differentiable.
    """
    return _library.op("grpo_loss_fwd", backend)


class _GrpoLoss(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        logprobs: Tensor,
        entropy: Tensor | None,
        old_logprobs: Tensor | None,
        advantages: Tensor,
        cu_seqlens: Tensor,
        ref_logprobs: Tensor | None,
        token_weights: Tensor | None,
        scalars: tuple[int | float, ...],
        backend: str,
    ) -> tuple[Tensor, Tensor]:
        loss, metrics, dlogprobs, dentropy = loss_op(backend)(
            logprobs,
            old_logprobs,
            advantages,
            cu_seqlens,
            ref_logprobs,
            entropy,
            token_weights,
            *scalars,
        )
        ctx.save_for_backward(dlogprobs, dentropy)
        ctx.mark_non_differentiable(metrics)
        return loss, metrics

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dloss: Tensor, _: Tensor) -> tuple[Any, ...]:
        dlogprobs, dentropy = ctx.saved_tensors
        to_entropy = dloss * dentropy if ctx.needs_input_grad[1] else None
        return dloss * dlogprobs, to_entropy, *[None] * 7


@_library.register("grpo_loss_fwd", triton=OP)
def _fwd_fake(
    logprobs: Tensor,
    old_logprobs: Tensor | None,
    advantages: Tensor,
    cu_seqlens: Tensor,
    ref_logprobs: Tensor | None,
    entropy: Tensor | None,
    token_weights: Tensor | None,
    ratio: int,
    surrogate: int,
    clip_low: float,
    clip_high: float,
    ratio_cap: float,
    own_pos_0: float,
    own_pos_1: float,
    own_neg_0: float,
    own_neg_1: float,
    beta: float,
    kl: int,
    kl_factor: int,
    kl_gradient: int,
    kl_log_ratio_limit: float,
    kl_limit: float,
    entropy_coef: float,
    aggregation: int,
    max_length: float,
    count_empty: bool,
    denominator: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return (
        logprobs.new_empty(()),
        logprobs.new_empty(len(dataclasses.fields(LossMetrics))),
        logprobs.new_empty(logprobs.shape),
        logprobs.new_empty(0 if entropy is None else entropy.shape[0]),
    )


def check_inputs(
    op: str,
    logprobs: Tensor,
    advantages: Tensor,
    cu_seqlens: Tensor,
    optional: dict[str, Tensor | None],
    denominator: float | Tensor | None,
    params: LossParams,
) -> None:
    """The arguments of a policy loss fit each other; `op` is who asks."""
    _checks.check_shape(op, "logprobs", logprobs, ("T",))
    _checks.check_floating(op, "logprobs", logprobs)
    tokens = logprobs.shape[0]
    for name, tensor in optional.items():
        if tensor is not None:
            _checks.check_shape(op, name, tensor, (tokens,))
            if name != "token_weights" or tensor.dtype != torch.bool:
                _checks.check_floating(op, name, tensor)
    _checks.check_same_device(
        op, logprobs=logprobs, advantages=advantages, cu_seqlens=cu_seqlens, **optional
    )
    _checks.check_offsets(op, "cu_seqlens", cu_seqlens, tokens)
    sequences = cu_seqlens.shape[0] - 1
    _checks.check_floating(op, "advantages", advantages)
    if advantages.dim() != 1 or advantages.shape[0] not in (sequences, tokens):
        raise ValueError(
            f"{op}: advantages has shape {tuple(advantages.shape)}, expected [B] = [{sequences}] "
            f"or [T] = [{tokens}]"
        )
    if params.needs_sequence_advantages and advantages.shape[0] != sequences:
        raise ValueError(
            f"{op}: advantages has shape {tuple(advantages.shape)}, but ratio {params.ratio!r} "
            f"takes one per sequence, [{sequences}]"
        )
    if params.beta > 0 and optional["ref_logprobs"] is None:
        raise ValueError(f"{op}: ref_logprobs is None, but beta is {params.beta}")
    if params.entropy_coef != 0 and optional["entropy"] is None:
        raise ValueError(f"{op}: entropy is None, but entropy_coef is {params.entropy_coef}")
    _check_denominator(op, denominator)
    if _checks.check_values(advantages):
        _refuse_first(op, advantages, ~advantages.isfinite(), "advantages", "a finite number")
    weights = optional["token_weights"]
    if weights is not None and weights.is_floating_point() and _checks.check_values(weights):
        bad = ~((weights >= 0) & weights.isfinite())
        _refuse_first(op, weights, bad, "token_weights", "finite and >= 0")


def _check_denominator(op: str, denominator: float | Tensor | None) -> None:
    if isinstance(denominator, Tensor):
        if denominator.numel() != 1:
            shape = tuple(denominator.shape)
            raise ValueError(f"{op}: denominator has shape {shape}, expected one number")
        if not _checks.check_values(denominator):
            return
        denominator = float(denominator)
    if denominator is not None and not 0 < denominator < math.inf:
        raise ValueError(f"{op}: denominator is {denominator}, expected finite and > 0, or None")


def refuse_tokens(op: str, logprobs: Tensor, optional: dict[str, Tensor | None]) -> None:
    """Name the active token that made the loss infinite or NaN."""
    weights = optional["token_weights"]
    active = torch.ones_like(logprobs, dtype=torch.bool) if weights is None else weights != 0
    for name, tensor in ({"logprobs": logprobs} | optional).items():
        if tensor is not None:
            bad = active & ~tensor.isfinite()
            _refuse_first(op, tensor, bad, name, "a finite number where token_weights is not 0")


def _refuse_first(op: str, values: Tensor, bad: Tensor, name: str, expected: str) -> None:
    if bool(bad.any()):
        at = int(bad.nonzero()[0])
        raise ValueError(f"{op}: {name}[{at}] is {values[at].tolist()}, expected {expected}")
