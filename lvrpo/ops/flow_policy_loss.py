"""The policy objective of flow-matching steps: ratio, clip, KL and metrics in one pass.

N pairs of (image, trained step), D elements in each. Derivation: docs/ops/flow_policy_loss.md.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lvrpo.ops import _backend, _checks, _library
from lvrpo.ops.flow_step import StepCoefficients, check_coefficients, check_latents
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
    tau: float = 1e-5
    kl: KlForm = "velocity_mse"
    beta: float = 0.0

    def __post_init__(self) -> None:
        scale = self.log_ratio_scale
        scaled = scale == "mean" or (isinstance(scale, (int, float)) and 0 < scale < math.inf)
        for name, fits, expected in (
            ("variant", self.variant in VARIANTS, f"one of {', '.join(VARIANTS)}"),
            ("kl", self.kl in KL_FORMS, f"one of {', '.join(KL_FORMS)}"),
            ("clip_low", 0 <= self.clip_low <= 1, "[0, 1]"),
            *((name, getattr(self, name) >= 0, ">= 0") for name in ("clip_high", "tau")),
            ("beta", 0 <= self.beta < math.inf, "finite and >= 0"),
            ("adv_clip", self.adv_clip is None or self.adv_clip > 0, "> 0, or None for no clamp"),
            ("log_ratio_scale", scaled, "'mean' or a finite number > 0"),
        ):
            if not fits:
                value = getattr(self, name)
                raise ValueError(f"FlowLossParams: {name} is {value!r}, expected {expected}")


_DEFAULT = FlowLossParams()


@dataclass(frozen=True)
class FlowLossMetrics:
    """Detached fp32 scalars.

    Means are sum(weight x) / denominator, as the loss is: those of micro-batches that share a
    denominator add up. With no active sample they are 0 and the ratio extremes 1.

    Attributes:
        policy_loss: the loss without its KL term.
        kl_velocity_mse, kl_gaussian, kl_no_dt, kl_dmu2: the distances to the reference that
            `FlowLossParams.kl` names; 0 without one.
        kl_old: exact KL to the sampling policy, mean (c_v (v - v_old))^2 / (2 std^2).
        ratio_mean: of rho.
        ratio_min, ratio_max: over the active samples.
        abs_log_ratio: mean |log rho|.
        clip_fraction_low: share with A < 0 whose policy gradient was cut.
        clip_fraction_high: share with A > 0 whose policy gradient was cut.
        active_samples: how many samples have a weight above 0.
    """

    policy_loss: Tensor
    kl_velocity_mse: Tensor
    kl_gaussian: Tensor
    kl_no_dt: Tensor
    kl_dmu2: Tensor
    kl_old: Tensor
    ratio_mean: Tensor
    ratio_min: Tensor
    ratio_max: Tensor
    abs_log_ratio: Tensor
    clip_fraction_low: Tensor
    clip_fraction_high: Tensor
    active_samples: Tensor


class FlowPolicyLoss(NamedTuple):
    """Result of `flow_policy_loss`: a scalar to call backward on, and what the pass measured."""

    loss: Tensor
    metrics: FlowLossMetrics


def flow_policy_loss(
    velocity: Tensor,
    velocity_old: Tensor,
    noise: Tensor,
    coeffs: StepCoefficients,
    advantages: Tensor,
    *,
    velocity_ref: Tensor | None = None,
    sample_weights: Tensor | None = None,
    denominator: Tensor | float | None = None,
    params: FlowLossParams = _DEFAULT,
    backend: str | None = None,
) -> FlowPolicyLoss:
    """sum_n w_n (policy_n + beta KL_n) / denominator over N (image, trained step) pairs.

    log rho = mean(z dmu / std - dmu^2 / (2 std^2)), dmu = c_v (velocity - velocity_old): the exact
    difference of the two log-densities of the step that was drawn with `noise`, without ever
    forming either. At equal velocities rho is exactly 1. |log rho| saturates at 20. The gradient
    reaches `velocity` only.

    Args:
        velocity: [N, ...] fp32, fp64, bf16 or fp16; of the policy, at the stored latents.
        velocity_old: [N, ...] any floating dtype; of the policy that sampled.
        noise: [N, ...] the standard normal draws z of the sampling steps.
        coeffs: [N], or [1] for one step shared by all; those that the latents were sampled with.
        advantages: [N].
        velocity_ref: [N, ...] of the reference policy, for the KL term and its metrics.
        sample_weights: [N], >= 0; None for ones. A sample of weight 0 is ignored whatever it holds,
            a deterministic step or NaN included.
        denominator: what the weighted sum is divided by, > 0: give the global weight when the batch
            is split over micro-batches or ranks. None for the sum of the weights.
        params: the objective.
        backend: "cpp", "torch", or None for the first that can run.

    Returns:
        loss: [] fp32 (fp64 from an fp64 velocity).
        metrics: see `FlowLossMetrics`.

    Raises:
        ValueError: shapes, dtypes or devices do not match, or beta > 0 without `velocity_ref`; on a
            CPU also when a sample with weight is of a deterministic step or holds NaN or inf, a
            weight is negative or not finite, or the denominator is not > 0. Where values are not
            read, a deterministic step or a NaN weight counts as weight 0.
    """
    if denominator is not None and not isinstance(denominator, Tensor):
        denominator = torch.tensor(float(denominator), device=velocity.device, dtype=torch.float64)
    tensors = {
        "velocity": velocity,
        "velocity_old": velocity_old,
        "noise": noise,
        "velocity_ref": velocity_ref,
        "advantages": advantages,
        "sample_weights": sample_weights,
    }
    _check(tensors, coeffs, denominator, params)
    chosen = _backend.resolve(OP, (*tensors.values(), coeffs.std), backend)
    if chosen == "torch":
        loss, named = reference_flow_policy_loss(
            velocity,
            velocity_old,
            noise,
            coeffs,
            advantages,
            velocity_ref=velocity_ref,
            sample_weights=sample_weights,
            denominator=denominator,
            params=params,
        )
        metrics = FlowLossMetrics(**named)
    else:
        loss, values = _apply(tensors, coeffs, denominator, params)
        metrics = FlowLossMetrics(*values.unbind())
    if _checks.check_values(loss) and not bool(torch.isfinite(loss)):
        _refuse_non_finite(tensors)
    return FlowPolicyLoss(loss, metrics)


def _apply(
    tensors: dict[str, Tensor | None],
    coeffs: StepCoefficients,
    denominator: Tensor | None,
    params: FlowLossParams,
) -> tuple[Tensor, Tensor]:
    """The compiled op on `tensors`, which are in the order of its arguments but for `coeffs`."""
    velocity, *latents_and_samples = tensors.values()
    assert velocity is not None
    latents, samples = latents_and_samples[:3], latents_and_samples[3:]
    others = (*latents, coeffs.c_v, coeffs.std, coeffs.dt, *samples, denominator)
    dtype = widen(velocity).dtype
    return _FlowPolicyLoss.apply(  # type: ignore[no-untyped-call,no-any-return]
        velocity,
        *(None if x is None else x.detach().to(dtype) for x in others),
        _scalars(params),
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
        sample_weights: Tensor | None,
        denominator: Tensor | None,
        scalars: tuple[Any, ...],
    ) -> tuple[Tensor, Tensor]:
        loss, metrics, directions = torch.ops.lvrpo.flow_policy_loss_fwd(
            velocity,
            velocity_old,
            noise,
            velocity_ref,
            c_v,
            std,
            dt,
            advantages,
            sample_weights,
            denominator,
            *scalars,
        )
        beta = scalars[-1]
        reference = velocity_ref if beta > 0 else None
        ctx.save_for_backward(velocity, velocity_old, noise, reference, directions)
        ctx.mark_non_differentiable(metrics)
        return loss, metrics

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dloss: Tensor, _: Tensor) -> tuple[Any, ...]:
        velocity, velocity_old, noise, velocity_ref, directions = ctx.saved_tensors
        dvelocity = torch.ops.lvrpo.flow_policy_loss_bwd(
            dloss, velocity, velocity_old, noise, velocity_ref, directions
        )
        return dvelocity, *[None] * 10


@_library.register("flow_policy_loss_fwd")
def _fwd_fake(velocity: Tensor, velocity_old: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return (
        velocity_old.new_empty(()),
        velocity_old.new_empty(len(fields(FlowLossMetrics)), dtype=torch.float32),
        velocity_old.new_empty((velocity.shape[0], 3)),
    )


@_library.register("flow_policy_loss_bwd")
def _bwd_fake(dloss: Tensor, velocity: Tensor, *_: Any) -> Tensor:
    return velocity.new_empty(velocity.shape)


def _scalars(params: FlowLossParams) -> tuple[int, int, float, float, float, float, float, float]:
    """As the C++ op takes them: names by number, no clamp as inf, "mean" as 0."""
    return (
        VARIANTS.index(params.variant),
        KL_FORMS.index(params.kl),
        float(params.clip_low),
        float(params.clip_high),
        math.inf if params.adv_clip is None else float(params.adv_clip),
        0.0 if params.log_ratio_scale == "mean" else float(params.log_ratio_scale),
        float(params.tau),
        float(params.beta),
    )


def _check(
    tensors: dict[str, Tensor | None],
    coeffs: StepCoefficients,
    denominator: Tensor | None,
    params: FlowLossParams,
) -> None:
    velocity, weights = tensors["velocity"], tensors["sample_weights"]
    assert velocity is not None
    check_latents(
        OP, velocity, **{name: tensors[name] for name in ("velocity_old", "noise", "velocity_ref")}
    )
    samples = len(velocity)
    for name in ("advantages", "sample_weights"):
        if (tensor := tensors[name]) is not None:
            _checks.check_floating(OP, name, tensor)
            _checks.check_shape(OP, name, tensor, (samples,))
    check_coefficients(OP, coeffs, samples)
    _checks.check_same_device(OP, **tensors, coeffs=coeffs.std, denominator=denominator)
    if params.beta > 0 and tensors["velocity_ref"] is None:
        raise ValueError(f"{OP}: velocity_ref is None, but params.beta is {params.beta}")
    if denominator is not None:
        _checks.check_shape(OP, "denominator", denominator, ())
        if _checks.check_values(denominator) and not 0 < float(denominator) < math.inf:
            raise ValueError(f"{OP}: denominator is {float(denominator)}, expected > 0")
    if _checks.check_values(coeffs.std):
        _check_weights(weights, coeffs, samples)
        _refuse_non_finite({name: tensors[name] for name in ("advantages", "sample_weights")})


def _check_weights(weights: Tensor | None, coeffs: StepCoefficients, samples: int) -> None:
    deterministic = (coeffs.std == 0).expand(samples)
    if weights is not None:
        bad = ~(torch.isfinite(weights) & (weights >= 0))
        if bool(bad.any()):
            at = int(bad.nonzero()[0])
            given = f"sample_weights[{at}] is {float(weights[at])}"
            raise ValueError(f"{OP}: {given}, expected a finite number >= 0")
        deterministic = deterministic & (weights > 0)
    if bool(deterministic.any()):
        at = int(deterministic.nonzero()[0])
        t = float(coeffs.t.expand(samples)[at])
        raise ValueError(
            f"{OP}: sample {at} is of a deterministic step (coeffs.std is 0 at t = {t:.4g}), which "
            "has no log-probability; leave it out or give it sample_weights 0"
        )


def _refuse_non_finite(tensors: dict[str, Tensor | None]) -> None:
    """Name the first sample with weight that holds NaN or inf, if there is one."""
    weights = tensors["sample_weights"]
    for name, tensor in tensors.items():
        if tensor is None or tensor.numel() == 0:
            continue
        bad = ~torch.isfinite(tensor.detach()).flatten(1 if tensor.dim() > 1 else 0)
        bad = bad.any(dim=1) if bad.dim() > 1 else bad
        bad = bad if weights is None else bad & (weights > 0)
        if bool(bad.any()):
            raise ValueError(f"{OP}: sample {int(bad.nonzero()[0])} of {name} holds NaN or inf")
