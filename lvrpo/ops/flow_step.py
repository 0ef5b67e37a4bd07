"""One reverse step of a flow-matching sampler and its log-probability: one pass over the latents.

N images, D elements in each. Flow-SDE, Dance-SDE, CPS and ODE steps are all affine in the velocity,
so one op serves every dynamics. Derivation: docs/ops/flow_step.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lvrpo import backends, checks
from lvrpo.backends import Backend, library
from lvrpo.dtypes import widen
from lvrpo.params.flow import StepCoefficients
from lvrpo.reference.flow_step import flow_step as reference_flow_step

OP = "flow_step"


def flow_step(
    velocity: Tensor,
    x_t: Tensor,
    coeffs: StepCoefficients,
    noise: Tensor | None = None,
    *,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """x_next = c_x x_t + c_v velocity + std noise, and log N(x_next; mean, std^2) per element.

    The log-probability is the mean over the D elements of an image, as every flow RL system uses
    it; multiply by D for the log-density of the image. A deterministic step (std 0) has no density:
    its log-probability is 0 by convention, its noise is not read and its gradient is 0. Autocast
    changes nothing: the latents are taken as they are.

    Gradients: `x_next` is differentiable in `velocity` and `x_t`. `logprob` treats the drawn
    `x_next` as data: its gradient reaches `velocity` and `x_t` through the mean only. None to
    `noise` or `coeffs`.

    Args:
        velocity: [N, ...] fp32, fp64, bf16 or fp16; dx/dt, from data to noise.
        x_t: [N, ...] any floating dtype; the latents at time `coeffs.t`.
        coeffs: [N], or [1] for one step shared by all images.
        noise: [N, ...] standard normal; or int64 [N, 2], the seed and the subsequence of the stream
            that a sample's is drawn from (docs/ops/flow_step.md). None when every std is 0.
        backend: a name of `lvrpo.backends.ALL`, or None for the first that can run.

    Returns:
        x_next: [N, ...] fp32 (fp64 from an fp64 velocity).
        logprob: [N] same dtype, nats per element.

    Raises:
        ValueError: shapes, dtypes or devices do not match; on a CPU also when noise is missing
            for a stochastic step or a std is negative or not finite.
    """
    _check(velocity, x_t, coeffs, noise)
    chosen = backends.resolve(OP, (velocity, x_t, noise, coeffs.std), backend)
    functional = chosen.functional(OP, reference_flow_step)
    if functional is not None:
        kept = StepCoefficients(*map(checks.as_saved, coeffs._tensors()))
        stepped: tuple[Tensor, Tensor] = functional(velocity, x_t, kept, checks.as_saved(noise))
        return stepped
    dtype = widen(velocity).dtype
    steps = (coeffs.c_x, coeffs.c_v, coeffs.std)
    data = [as_noise(noise, dtype), *(checks.as_saved(x.detach().to(dtype)) for x in steps)]
    return _FlowStep.apply(velocity, x_t.to(dtype), data, chosen)  # type: ignore[no-untyped-call,no-any-return]


class _FlowStep(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        velocity: Tensor,
        x_t: Tensor,
        data: Sequence[Tensor | None],  # noise, c_x, c_v, std
        backend: Backend,
    ) -> tuple[Tensor, Tensor]:
        x_next, logprob = backend.op("flow_step_fwd")(velocity, x_t, *data)
        ctx.save_for_backward(*data)
        ctx.velocity_dtype, ctx.backend = velocity.dtype, backend
        return x_next, logprob

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dx_next: Tensor, dlogprob: Tensor) -> tuple[Tensor, Tensor, None, None]:
        run = ctx.backend.op("flow_step_bwd")
        dvelocity, dx_t = run(dx_next, dlogprob, *ctx.saved_tensors)
        return dvelocity.to(ctx.velocity_dtype), dx_t, None, None


@library.register("flow_step_fwd", kernels=OP)
def _fwd_fake(
    velocity: Tensor, x_t: Tensor, noise: Tensor | None, c_x: Tensor, c_v: Tensor, std: Tensor
) -> tuple[Tensor, Tensor]:
    return x_t.new_empty(x_t.shape), x_t.new_empty(x_t.shape[0])


@library.register("flow_step_bwd", kernels=OP)
def _bwd_fake(
    dx_next: Tensor, dlogprob: Tensor, noise: Tensor | None, c_x: Tensor, c_v: Tensor, std: Tensor
) -> tuple[Tensor, Tensor]:
    return dx_next.new_empty(dx_next.shape), dx_next.new_empty(dx_next.shape)


def check_coefficients(
    op: str, coeffs: StepCoefficients, samples: int, mask: Tensor | None = None
) -> None:
    """Fields [samples] or [1], fp32 or fp64; std finite and not negative where `mask` counts."""
    for field in fields(coeffs):
        values = getattr(coeffs, field.name)
        name = f"coeffs.{field.name}"
        if values.dtype not in (torch.float32, torch.float64):
            raise ValueError(f"{op}: {name} is {values.dtype}, expected torch.float32 or float64")
        if values.shape != (1,):
            checks.check_shape(op, name, values, (samples,))
    if len({getattr(coeffs, field.name).shape for field in fields(coeffs)}) > 1:
        lengths = ", ".join(f"{f.name} {len(getattr(coeffs, f.name))}" for f in fields(coeffs))
        raise ValueError(f"{op}: coeffs fields have different lengths: {lengths}")
    if checks.check_values(coeffs.std):
        bad = ~(torch.isfinite(coeffs.std) & (coeffs.std >= 0))
        bad = bad if mask is None else bad & mask
        std = coeffs.std.expand(bad.shape)
        checks.refuse_first(op, "coeffs.std", std, bad, "a finite number >= 0")


def check_latents(op: str, velocity: Tensor, **others: Tensor | None) -> None:
    """[N, ...] floating latents of one shape, with at least one element per sample."""
    checks.check_floating(op, "velocity", velocity)
    if velocity.dim() < 2 or (velocity.shape[0] > 0 and velocity.numel() == 0):
        raise ValueError(
            f"{op}: velocity has shape {tuple(velocity.shape)}, expected [N, ...] with at least "
            "one element per sample"
        )
    for name, tensor in others.items():
        if tensor is not None:
            checks.check_floating(op, name, tensor)
            checks.check_shape(op, name, tensor, tuple(velocity.shape))


def check_noise(op: str, noise: Tensor | None, velocity: Tensor) -> None:
    """[N, ...] floating as the velocity, int64 [N, 2], or None."""
    if noise is None:
        return
    if noise.is_floating_point():
        checks.check_shape(op, "noise", noise, tuple(velocity.shape))
    elif noise.dtype != torch.int64 or not checks.is_shape(noise.shape, (len(velocity), 2)):
        raise ValueError(
            f"{op}: noise is {noise.dtype} of shape {tuple(noise.shape)}, expected a floating "
            f"dtype and the shape of velocity, or streams, torch.int64 of shape "
            f"({len(velocity)}, 2)"
        )


def as_noise(noise: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """As kernels take it: without a graph, in the dtype of the result or as streams."""
    if noise is None or not noise.is_floating_point():
        return checks.as_saved(noise)
    return checks.as_saved(noise.detach().to(dtype))


def _check(velocity: Tensor, x_t: Tensor, coeffs: StepCoefficients, noise: Tensor | None) -> None:
    check_latents(OP, velocity, x_t=x_t)
    check_noise(OP, noise, velocity)
    check_coefficients(OP, coeffs, len(velocity))
    checks.check_same_device(OP, velocity=velocity, x_t=x_t, noise=noise, coeffs=coeffs.std)
    if noise is None and len(velocity) and checks.check_values(coeffs.std):
        stochastic = coeffs.std > 0
        if bool(stochastic.any()):
            at = int(stochastic.nonzero()[0])
            raise ValueError(
                f"{OP}: noise is None, but coeffs.std[{at}] is {float(coeffs.std[at]):.4g}; only a "
                "deterministic step needs no noise"
            )
