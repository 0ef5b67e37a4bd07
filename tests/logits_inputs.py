"""Inputs of logits_grpo_loss that its test files share, and the scales of its rounding errors."""

from __future__ import annotations

from typing import Any

import linear_inputs
import torch
from torch import Tensor

from lvrpo.ops.logits_grpo_loss import logits_grpo_loss
from lvrpo.reference.linear_logprobs import project
from lvrpo.reference.logits_grpo_loss import logits_grpo_loss as reference


def make_inputs(
    lengths: list[int], dtype: torch.dtype = torch.float32, **options: Any
) -> dict[str, Any]:
    """Those of a linear head, after its projection."""
    inputs = linear_inputs.make_loss_inputs(lengths, dtype, **options)
    head = [inputs.pop(name).double() for name in ("hidden", "weight", "bias")]
    return {"logits": project(*head).to(dtype), **inputs}


def run_op(**inputs: Any) -> tuple[Tensor, ...]:
    return linear_inputs.with_statistics(*logits_grpo_loss(**inputs))


def run_reference(**inputs: Any) -> tuple[Tensor, ...]:
    for name in ("backend", "inplace_backward"):
        inputs.pop(name, None)
    return linear_inputs.rounded(*reference(**linear_inputs.ranges(inputs, len(inputs["logits"]))))


def loss_scales(inputs: dict[str, Any]) -> dict[str, Any]:
    logits = inputs["logits"].detach().double()
    largest = (1 + float(logits.abs().max())) / inputs.get("temperature", 1.0)
    scales, *sizes = linear_inputs.output_scales(inputs, run_reference, len(logits), largest)
    return scales | {"dlogits": linear_inputs.dlogits_scale(inputs, logits, largest, *sizes)}
