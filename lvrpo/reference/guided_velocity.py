"""Classifier-free guidance of a flow model's velocity, with the renormalisation of BAGEL."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lvrpo.dtypes import number, widen

if TYPE_CHECKING:
    from lvrpo.params.flow import GuidanceParams


def guided_velocity(
    velocity: Tensor,  # [N, ..., C]
    without_text: Tensor,  # [N, ..., C]
    without_image: Tensor | None = None,  # [N, ..., C]
    *,
    guided: Tensor | None = None,  # [N] bool
    params: GuidanceParams,
) -> Tensor:
    """See `lvrpo.guided_velocity`."""
    v = widen(velocity)
    on = torch.ones(len(v), dtype=torch.bool, device=v.device) if guided is None else guided
    on = on.reshape(-1, *[1] * (v.dim() - 1))

    def branch(x: Tensor) -> Tensor:  # that of a sample that is not guided may hold NaN
        return torch.where(on, x.to(v.dtype), v.detach())

    def renormalized(x: Tensor) -> Tensor:
        if params.renorm == "none":
            return x
        dims = tuple(range(1, v.dim())) if params.renorm == "global" else (-1,)
        given, pushed = (
            torch.linalg.vector_norm(y, dim=dims, keepdim=True, dtype=torch.float64) for y in (v, x)
        )
        factor = (given / (pushed + 1e-8)).clamp(number(params.renorm_min, v), number(1.0, v))
        shortened: Tensor = x * factor.to(v.dtype)
        return shortened

    pushed = v + (params.text_scale - 1) * (v - branch(without_text))
    if params.renorm == "text_channel":
        pushed = renormalized(pushed)
    if without_image is not None:
        pushed = pushed + (params.image_scale - 1) * (pushed - branch(without_image))
    if params.renorm != "text_channel":
        pushed = renormalized(pushed)
    return torch.where(on, pushed, v)
