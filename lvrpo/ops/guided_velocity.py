"""Classifier-free guidance of a flow model's velocity, and the renormalisation that follows it.

N images. Derivation: docs/ops/guided_velocity.md.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lvrpo import backends, checks
from lvrpo.backends import Backend, library
from lvrpo.dtypes import numbers_by_name
from lvrpo.ops._flow_inputs import per_sample
from lvrpo.ops.flow_step import check_latents
from lvrpo.params.flow import GUIDANCE_NUMBERS, GuidanceParams
from lvrpo.reference.guided_velocity import guided_velocity as reference_guided_velocity

OP = "guided_velocity"
_DEFAULT = GuidanceParams()
library.check_table(OP, "numbers", GUIDANCE_NUMBERS)


def guided_velocity(
    velocity: Tensor,
    without_text: Tensor,
    without_image: Tensor | None = None,
    *,
    guided: Tensor | Sequence[bool] | None = None,
    params: GuidanceParams = _DEFAULT,
    backend: str | None = None,
) -> Tensor:
    """The velocity pushed away from what the model says without its conditions, and shrunk again.

    by_text = without_text + text_scale (velocity - without_text), then
    without_image + image_scale (by_text - without_image), and a factor that brings the norm back to
    that of `velocity`, within [renorm_min, 1]. Differentiable in all three; detach the branches
    that are to be data. Under autocast everything is taken as it is.

    Args:
        velocity: [N, ..., C] fp32, fp64, bf16 or fp16; of the model with all conditions.
        without_text: [N, ..., C] any floating dtype; without the text.
        without_image: [N, ..., C] any floating dtype; without the image. None for a model that has
            no such condition: `image_scale` says nothing then.
        guided: [N] or [N, 1], any dtype, or a list; above 0: the sample is guided, as BAGEL does in
            an interval of times. None for all. The others keep their velocity, and their branches
            are ignored whatever they hold.
        params: scales and renormalisation.
        backend: a name of `lvrpo.backends.ALL`, or None for the first that can run.

    Returns:
        [N, ..., C] fp32 (fp64 from an fp64 velocity).

    Raises:
        ValueError: shapes, dtypes or devices do not match; on a CPU also when `guided` is negative
            or not finite. Where values are not read, such a sample is not guided.
    """
    check_latents(OP, velocity, without_text=without_text, without_image=without_image)
    if guided is not None:
        guided = checks.as_mask(OP, "guided", per_sample(OP, "guided", guided, velocity))
    tensors = velocity, without_text, without_image, guided
    names = "velocity", "without_text", "without_image", "guided"
    checks.check_same_device(OP, **dict(zip(names, tensors, strict=True)))
    chosen = backends.resolve(OP, tensors, backend, choices=params.choices())
    functional = chosen.functional(OP, reference_guided_velocity)
    if functional is not None:
        result: Tensor = functional(*tensors[:3], guided=guided, params=params)
        return result
    branches = [x for x in tensors[:3] if x is not None]
    dtype = functools.reduce(torch.promote_types, (x.dtype for x in branches))
    options = _Options(
        checks.as_saved(guided), params, numbers_by_name(GUIDANCE_NUMBERS, params.numbers()), chosen
    )
    converted = (None if x is None else checks.as_saved(x.to(dtype)) for x in tensors[:3])
    result = _GuidedVelocity.apply(*converted, options)  # type: ignore[no-untyped-call]
    return result if velocity.dtype == torch.float64 else result.float()


@dataclasses.dataclass(frozen=True)
class _Options:
    """What `lvrpo::guided_velocity_fwd` takes besides the velocities, from whom.

    Attributes:
        guided: [N] bool, or None for all.
        params: scales and renormalisation.
        numbers: those of `params`.
        backend: one with kernels.
    """

    guided: Tensor | None
    params: GuidanceParams
    numbers: Tensor
    backend: Backend


class _GuidedVelocity(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        velocity: Tensor,
        without_text: Tensor,
        without_image: Tensor | None,
        options: _Options,
    ) -> Tensor:
        saved = velocity, without_text, without_image, options.guided, options.numbers
        ctx.save_for_backward(*saved)
        ctx.choices, ctx.backend = options.params.choices(), options.backend
        result: Tensor = ctx.backend.op("guided_velocity_fwd")(*saved, **ctx.choices)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        with_branches = any(ctx.needs_input_grad[1:3])
        run = ctx.backend.op("guided_velocity_bwd")
        dvelocity, no_text, no_image = run(dout, *ctx.saved_tensors, with_branches, **ctx.choices)
        wanted = ctx.needs_input_grad
        return dvelocity, no_text if wanted[1] else None, no_image if wanted[2] else None, None


@library.register("guided_velocity_fwd", kernels=OP)
def _fwd_fake(
    velocity: Tensor,
    without_text: Tensor,
    without_image: Tensor | None,
    guided: Tensor | None,
    numbers: Tensor,
    renorm: str,
) -> Tensor:
    wide = torch.float64 if velocity.dtype == torch.float64 else torch.float32
    return velocity.new_empty(velocity.shape, dtype=wide)


@library.register("guided_velocity_bwd", kernels=OP)
def _bwd_fake(
    dout: Tensor,
    velocity: Tensor,
    without_text: Tensor,
    without_image: Tensor | None,
    guided: Tensor | None,
    numbers: Tensor,
    with_branches: bool,
    renorm: str,
) -> tuple[Tensor, Tensor, Tensor]:
    def like_velocity(is_wanted: bool) -> Tensor:
        return velocity.new_empty(velocity.shape if is_wanted else (0,))

    with_image = with_branches and without_image is not None
    return like_velocity(True), like_velocity(with_branches), like_velocity(with_image)
