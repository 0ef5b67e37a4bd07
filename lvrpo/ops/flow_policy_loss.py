"""The policy objective of flow-matching steps: ratio, clip, KL and metrics in one pass.

N pairs of (image, trained step), D elements in each. Derivation: docs/ops/flow_policy_loss.md.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lvrpo.ops import _backend, _checks, _library
from lvrpo.ops._flow_inputs import FlowInputs, as_denominator, per_sample
from lvrpo.ops._metrics import Maximum, Mean, Metrics, Minimum, Total
from lvrpo.ops._numbers import numbers
from lvrpo.ops.flow_step import StepCoefficients, check_latents
from lvrpo.reference._log_ratio import LOG_RATIO_LIMIT
from lvrpo.reference._precision import widen
from lvrpo.reference.flow_policy_loss import flow_policy_loss as reference_flow_policy_loss

OP = "flow_policy_loss"
Variant = Literal["ppo", "guard", "dppo"]
KlForm = Literal["velocity_mse", "gaussian", "no_dt", "dmu2"]
# The position of a name is its number in csrc/cpu/flow_policy_loss.cpp.
VARIANTS: tuple[str, ...] = get_args(Variant)
KL_FORMS: tuple[str, ...] = get_args(KlForm)


@dataclass(frozen=True)
class FlowLossParams:
    """The objective; element means over an image unless said otherwise.

    Attributes:
        variant: how the update is kept near the old policy.
            "ppo": max(-A rho, -A clip(rho, 1 - clip_low, 1 + clip_high)).
            "guard": the same with log rho = mean(z dmu), which has no bias and does not grow as the
            std shrinks, divided by |dt| (GRPO-Guard).
            "dppo": -A rho, dropped when KL(new, old) >= tau and rho has already moved in the
            direction of the advantage (Flow-DPPO).
        clip_low: clip range below 1. Compare it with `lvrpo.models.flow.noise_floor`.
        clip_high: clip range above 1.
        adv_clip: advantages are clamped to +- this; None for no clamp.
        log_ratio_scale: "mean" takes log rho as an element mean, the D-th root of the true ratio;
            a number kappa takes kappa times the true log-ratio of the image, so 1.0 is the sum over
            elements and 1 / D is "mean".
        log_ratio_limit: |log rho| saturates at this, with gradient 0 beyond; None for no limit,
            where a ratio may overflow.
        tau: KL threshold of "dppo", in nats per element (not scaled by `log_ratio_scale`).
        kl: which distance to the reference `beta` weighs, dv = velocity - velocity_ref.
            "velocity_mse": dv^2. "gaussian": (c_v dv)^2 / (2 std^2), the exact KL of the step.
            "no_dt": the exact KL times |dt|. "dmu2": (c_v dv)^2.
        beta: weight of that distance; > 0 needs `velocity_ref`.
    """

    variant: Variant = "ppo"
    clip_low: float = 1e-4
    clip_high: float = 1e-4
    adv_clip: float | None = 5.0
    log_ratio_scale: float | Literal["mean"] = "mean"
    log_ratio_limit: float | None = LOG_RATIO_LIMIT
    tau: float = 1e-5
    kl: KlForm = "velocity_mse"
    beta: float = 0.0

    def __post_init__(self) -> None:
        scale = self.log_ratio_scale
        scaled = scale == "mean" or (isinstance(scale, (int, float)) and 0 < scale < math.inf)
        limit = self.log_ratio_limit
        for name, fits, expected in (
            ("variant", self.variant in VARIANTS, f"one of {', '.join(VARIANTS)}"),
            ("kl", self.kl in KL_FORMS, f"one of {', '.join(KL_FORMS)}"),
            ("clip_low", 0 <= self.clip_low <= 1, "[0, 1]"),
            *((name, getattr(self, name) >= 0, ">= 0") for name in ("clip_high", "tau")),
            ("beta", 0 <= self.beta < math.inf, "finite and >= 0"),
            ("adv_clip", self.adv_clip is None or self.adv_clip > 0, "> 0, or None for no clamp"),
            ("log_ratio_scale", scaled, "'mean' or a finite number > 0"),
            ("log_ratio_limit", limit is None or limit > 0, "> 0, or None for no limit"),
        ):
            if not fits:
                value = getattr(self, name)
                raise ValueError(f"FlowLossParams: {name} is {value!r}, expected {expected}")


_DEFAULT = FlowLossParams()


class FlowLossMetrics(Metrics):
    """Detached fp32 scalars over the active samples, whatever weights and denominator are.

    Those of micro-batches or ranks become those of the whole by `FlowLossMetrics.merge(parts)` and
    `metrics.all_reduce()`. Each is finite where the inputs are. With no active sample means are 0
    and the ratio extremes 1.

    Attributes:
        policy_loss: mean of the policy term times its weight.
        kl_velocity_mse, kl_gaussian, kl_no_dt, kl_dmu2: mean distances to the reference, that
            `FlowLossParams.kl` names; 0 without one.
        kl_old: exact KL to the sampling policy, mean (c_v (v - v_old))^2 / (2 std^2).
        ratio_mean: of rho.
        abs_log_ratio: mean |log rho|, before it saturates.
        clip_fraction_low: share with A < 0 whose ratio is where the policy gradient is cut.
        clip_fraction_high: share with A > 0 whose ratio is where the policy gradient is cut.
        active_samples: how many samples count.
        ratio_min, ratio_max: over the active samples.
    """

    policy_loss = Mean("active_samples")
    kl_velocity_mse = Mean("active_samples")
    kl_gaussian = Mean("active_samples")
    kl_no_dt = Mean("active_samples")
    kl_dmu2 = Mean("active_samples")
    kl_old = Mean("active_samples")
    ratio_mean = Mean("active_samples")
    abs_log_ratio = Mean("active_samples")
    clip_fraction_low = Mean("active_samples")
    clip_fraction_high = Mean("active_samples")
    active_samples = Total()
    ratio_min = Minimum(otherwise=1.0)
    ratio_max = Maximum(otherwise=1.0)


class FlowPolicyLoss(NamedTuple):
    """Result of `flow_policy_loss`: a scalar to call backward on, and what the pass measured."""

    loss: Tensor
    metrics: FlowLossMetrics


@_checks.replaced(sample_weights=_checks.MASK_AND_WEIGHTS)
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
        noise: [N, ...] the standard normal draws z of the sampling steps.
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
        backend: "cpp", "torch", or None for the first that can run.

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
    check_latents(OP, velocity, velocity_old=velocity_old, noise=noise, velocity_ref=velocity_ref)
    masked = None if mask is None else per_sample(OP, "mask", mask, velocity)
    weights = policy_weights
    if weights is not None:
        weights = _checks.as_saved(per_sample(OP, "policy_weights", weights, velocity))
    inputs = FlowInputs(
        velocity,
        velocity_old,
        noise,
        coeffs,
        per_sample(OP, "advantages", advantages, velocity),
        velocity_ref,
        None if masked is None else _checks.as_mask(OP, "mask", masked),
        weights,
        as_denominator(OP, denominator),
    )
    if params.beta > 0 and velocity_ref is None:
        raise ValueError(f"{OP}: velocity_ref is None, but params.beta is {params.beta}")
    inputs.check(OP, divides_by_dt=params.variant == "guard")
    tensors = *inputs.latents().values(), *inputs.samples().values(), coeffs.std
    chosen = _backend.resolve(OP, tensors, backend)
    if chosen == "torch":
        loss, named = reference_flow_policy_loss(**inputs.arguments(), params=params)
        metrics = FlowLossMetrics.of(named)
    else:
        loss, sums, extremes = _apply(inputs, params)
        metrics = FlowLossMetrics(sums, extremes)
    # Saturation makes a finite loss of an infinite velocity, but not a finite distance.
    if _checks.check_values(loss) and not bool(torch.isfinite(metrics.sums.sum() + loss.detach())):
        inputs.refuse_non_finite(OP)
    return FlowPolicyLoss(loss, metrics)


def _apply(inputs: FlowInputs, params: FlowLossParams) -> tuple[Tensor, Tensor, Tensor]:
    dtype = widen(inputs.velocity).dtype

    def data(x: Tensor | None) -> Tensor | None:
        return None if x is None else x.detach().to(dtype)

    coeffs = inputs.coeffs
    return _FlowPolicyLoss.apply(  # type: ignore[no-untyped-call,no-any-return]
        inputs.velocity,
        *(
            _checks.as_saved(data(x))
            for x in (inputs.velocity_old, inputs.noise, inputs.velocity_ref)
        ),
        *(data(x) for x in (coeffs.c_v, coeffs.std, coeffs.dt, inputs.advantages)),
        inputs.mask,
        data(inputs.policy_weights),
        data(inputs.denominator),
        _numbers(params),
        VARIANTS.index(params.variant),
        KL_FORMS.index(params.kl),
        params.beta > 0,
    )


class _FlowPolicyLoss(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
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
        variant: int,
        kl: int,
        pulls: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        loss, sums, extremes, directions = torch.ops.lvrpo.flow_policy_loss_fwd(
            velocity,
            velocity_old,
            noise,
            velocity_ref,
            c_v,
            std,
            dt,
            advantages,
            mask,
            policy_weights,
            denominator,
            numbers,
            variant,
            kl,
        )
        reference = velocity_ref if pulls else None
        ctx.save_for_backward(velocity, velocity_old, noise, reference, directions)
        ctx.mark_non_differentiable(sums, extremes)
        return loss, sums, extremes

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dloss: Tensor, *_: Tensor) -> tuple[Any, ...]:
        velocity, velocity_old, noise, velocity_ref, directions = ctx.saved_tensors
        dvelocity = torch.ops.lvrpo.flow_policy_loss_bwd(
            dloss, velocity, velocity_old, noise, velocity_ref, directions
        )
        return dvelocity, *[None] * 14


@_library.register("flow_policy_loss_fwd")
def _fwd_fake(velocity: Tensor, velocity_old: Tensor, *_: Any) -> tuple[Tensor, ...]:
    return (
        velocity_old.new_empty(()),
        velocity_old.new_empty(len(FlowLossMetrics.SUMS), dtype=torch.float64),
        velocity_old.new_empty(len(FlowLossMetrics.EXTREMES), dtype=torch.float64),
        velocity_old.new_empty((velocity.shape[0], 3), dtype=torch.float64),
    )


@_library.register("flow_policy_loss_bwd")
def _bwd_fake(dloss: Tensor, velocity: Tensor, *_: Any) -> Tensor:
    return velocity.new_empty(velocity.shape)


def _numbers(params: FlowLossParams) -> Tensor:
    """As the C++ op takes them: no clamp and no limit as inf, "mean" as 0."""
    return numbers(
        params.clip_low,
        params.clip_high,
        math.inf if params.adv_clip is None else params.adv_clip,
        0.0 if params.log_ratio_scale == "mean" else params.log_ratio_scale,
        math.inf if params.log_ratio_limit is None else params.log_ratio_limit,
        params.tau,
        params.beta,
    )
