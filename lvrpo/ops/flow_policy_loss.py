"""The policy objective of flow-matching steps: ratio, clip, KL and metrics in one pass.

N pairs of (image, trained step), D elements in each. Derivation: docs/ops/flow_policy_loss.md.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lvrpo import backends, checks
from lvrpo.backends import Backend, library
from lvrpo.dtypes import numbers_by_name
from lvrpo.ops._flow_inputs import FlowInputs, as_denominator, per_sample
from lvrpo.ops.flow_step import check_latents, check_noise
from lvrpo.params.flow import (
    FLOW_NUMBERS,
    FlowLossMetrics,
    FlowLossParams,
    FlowPolicyLoss,
    StepCoefficients,
)
from lvrpo.reference.flow_policy_loss import flow_policy_loss as reference_flow_policy_loss

OP = "flow_policy_loss"
_DEFAULT = FlowLossParams()
library.check_table(OP, "numbers", FLOW_NUMBERS)
library.check_table(OP, "sums", FlowLossMetrics.SUMS)
library.check_table(OP, "extremes", FlowLossMetrics.EXTREMES)


@checks.replaced(sample_weights=checks.MASK_AND_WEIGHTS)
def flow_policy_loss(
    velocity: Tensor,
    velocity_old: Tensor,
    noise: Tensor,
    coeffs: StepCoefficients,
    advantages: Tensor | Sequence[float],
    *,
    velocity_ref: Tensor | None = None,
    mask: Tensor | Sequence[bool] | None = None,
    policy_weights: Tensor | Sequence[float] | None = None,
    denominator: Tensor | float | None = None,
    params: FlowLossParams = _DEFAULT,
    backend: str | None = None,
) -> FlowPolicyLoss:
    """sum_n (w_n policy_n + beta KL_n) / denominator over N (image, trained step) pairs.

    log rho = mean(z dmu / std - dmu^2 / (2 std^2)), dmu = c_v (velocity - velocity_old): the exact
    difference of the two log-densities of the step that was drawn with `noise`, without ever
    forming either. At equal velocities rho is exactly 1. The gradient reaches `velocity` only.
    Under autocast everything is taken as it is, as torch does with losses.

    Args:
        velocity: [N, ...] fp32, fp64, bf16 or fp16; of the policy, at the stored latents.
        velocity_old: [N, ...] any floating dtype; of the policy that sampled.
        noise: [N, ...] the standard normal draws z of the sampling steps; or int64 [N, 2], the
            seeds and subsequences that `flow_step` drew them from.
        coeffs: [N], or [1] for one step shared by all; those that the latents were sampled with.
        advantages: [N] or [N, 1], any real dtype, or a list.
        velocity_ref: [N, ...] of the reference policy, for the KL term and its metrics.
        mask: [N] or [N, 1], any dtype, or a list; above 0 counts: in the denominator, the KL term
            and the metrics. None for all. A sample that does not count is ignored whatever it
            holds, a deterministic step or NaN included.
        policy_weights: [N] or [N, 1], >= 0, or a list; multiply the policy term alone. None for
            ones. At 0 the advantage is not looked at.
        denominator: what the sum is divided by, a number or a tensor that holds one: give the
            global count when the batch is split over micro-batches or ranks. None for the number of
            samples that count. Where it is 0, as a count of nothing is, the loss is 0.
        params: the objective.
        backend: a name of `lvrpo.backends.ALL`, or None for the first that can run.

    Returns:
        loss: [] fp32 (fp64 from an fp64 velocity).
        metrics: see `FlowLossMetrics`.

    Raises:
        TypeError: `sample_weights` is given, which `mask` and `policy_weights` replaced.
        ValueError: shapes, dtypes or devices do not match, or beta > 0 without `velocity_ref`; on a
            CPU also when a sample that counts is of a deterministic step or holds NaN or inf, a
            weight or the mask is negative or not finite, the denominator is negative or not finite,
            or it is 0 though a sample counts. Where values are not read, a deterministic step does
            not count, a weight or an advantage that is not finite takes the policy term away, and
            such a denominator the loss.
    """
    check_latents(OP, velocity, velocity_old=velocity_old, velocity_ref=velocity_ref)
    check_noise(OP, noise, velocity)
    masked = None if mask is None else per_sample(OP, "mask", mask, velocity)
    weights = policy_weights
    if weights is not None:
        weights = checks.as_saved(per_sample(OP, "policy_weights", weights, velocity))
    inputs = FlowInputs(
        velocity,
        velocity_old,
        noise,
        coeffs,
        per_sample(OP, "advantages", advantages, velocity),
        velocity_ref,
        None if masked is None else checks.as_mask(OP, "mask", masked),
        weights,
        as_denominator(OP, denominator),
    )
    if params.beta > 0 and velocity_ref is None:
        raise ValueError(f"{OP}: velocity_ref is None, but params.beta is {params.beta}")
    inputs.check(OP, divides_by_dt=params.variant == "guard")
    tensors = *inputs.latents().values(), *inputs.samples().values(), coeffs.std
    chosen = backends.resolve(OP, tensors, backend, choices=params.choices())
    functional = chosen.functional(OP, reference_flow_policy_loss)
    if functional is not None:
        loss, named = functional(**inputs.arguments(), params=params)
        metrics = FlowLossMetrics.of(named)
    else:
        numbers = numbers_by_name(FLOW_NUMBERS, params.numbers())
        options = _Options(inputs.as_data(), params, numbers, chosen)
        loss, sums, extremes = _FlowPolicyLoss.apply(velocity, options)  # type: ignore[no-untyped-call]
        metrics = FlowLossMetrics(sums, extremes)
    # Saturation makes a finite loss of an infinite velocity, but not a finite distance.
    if checks.check_values(loss) and not bool(torch.isfinite(metrics.sums.sum() + loss.detach())):
        inputs.refuse_non_finite(OP)
    return FlowPolicyLoss(loss, metrics)


@dataclasses.dataclass(frozen=True)
class _Options:
    """What `lvrpo::flow_policy_loss_fwd` takes besides the velocity, from whom.

    Attributes:
        inputs: in the dtype of the result.
        params: the objective.
        numbers: those of `params`.
        backend: one with kernels.
    """

    inputs: FlowInputs
    params: FlowLossParams
    numbers: Tensor
    backend: Backend


class _FlowPolicyLoss(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, velocity: Tensor, options: _Options
    ) -> tuple[Tensor, Tensor, Tensor]:
        inputs, params, ctx.backend = options.inputs, options.params, options.backend
        loss, sums, extremes, directions = ctx.backend.op("flow_policy_loss_fwd")(
            velocity,
            inputs.velocity_old,
            inputs.noise,
            inputs.velocity_ref,
            inputs.coeffs.c_v,
            inputs.coeffs.std,
            inputs.coeffs.dt,
            inputs.advantages,
            inputs.mask,
            inputs.policy_weights,
            inputs.denominator,
            options.numbers,
            **params.choices(),
        )
        reference = inputs.velocity_ref if params.beta > 0 else None
        latents = velocity, inputs.velocity_old, inputs.noise, reference
        ctx.save_for_backward(*latents, directions)
        ctx.mark_non_differentiable(sums, extremes)
        return loss, sums, extremes

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dloss: Tensor, *_: Tensor) -> tuple[Tensor, None]:
        dvelocity: Tensor = ctx.backend.op("flow_policy_loss_bwd")(dloss, *ctx.saved_tensors)
        return dvelocity, None


@library.register("flow_policy_loss_fwd", kernels=OP)
def _fwd_fake(
    velocity: Tensor,
    velocity_old: Tensor,
    noise: Tensor,
    velocity_ref: Tensor | None,
    c_v: Tensor,
    std: Tensor,
    dt: Tensor,
    advantages: Tensor,
    mask: Tensor | None,
    policy_weights: Tensor | None,
    denominator: Tensor | None,
    numbers: Tensor,
    variant: str,
    kl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return (
        velocity_old.new_empty(()),
        velocity_old.new_empty(len(FlowLossMetrics.SUMS), dtype=torch.float64),
        velocity_old.new_empty(len(FlowLossMetrics.EXTREMES), dtype=torch.float64),
        velocity_old.new_empty((velocity.shape[0], 3), dtype=torch.float64),
    )


@library.register("flow_policy_loss_bwd", kernels=OP)
def _bwd_fake(
    dloss: Tensor,
    velocity: Tensor,
    velocity_old: Tensor,
    noise: Tensor,
    velocity_ref: Tensor | None,
    directions: Tensor,
) -> Tensor:
    return velocity.new_empty(velocity.shape)
