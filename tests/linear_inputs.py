"""Inputs of the ops on a linear head that their test files share, and scales of rounding errors."""

from __future__ import annotations

from typing import Any

import loss_inputs
import torch
from torch import Tensor

from lvrpo.ops.grpo_loss import LossMetrics, LossParams
from lvrpo.ops.linear_grpo_loss import linear_grpo_loss
from lvrpo.reference.linear_grpo_loss import linear_grpo_loss as reference
from lvrpo.reference.linear_logprobs import linear_logprobs as reference_logprobs
from lvrpo.reference.linear_logprobs import project

SOFTMAX = ("temperature", "softcap", "vocab_range")


def make_head(rows: int, width: int, vocab: int, dtype: torch.dtype) -> dict[str, Tensor]:
    torch.manual_seed(rows + width * vocab)
    return {
        "hidden": torch.randn(rows, width).to(dtype),
        "weight": (torch.randn(vocab, width) * 2 / width**0.5).to(dtype),
        "bias": torch.randn(vocab).to(dtype),
    }


def make_loss_inputs(
    lengths: list[int],
    dtype: torch.dtype = torch.float32,
    *,
    width: int = 12,
    vocab: int = 61,
    shared_prompts: bool = False,
    **softmax: Any,
) -> dict[str, Any]:
    """With `shared_prompts` all sequences begin after one and the same row, and rows are mixed."""
    tokens = sum(lengths)
    row_index = None
    if shared_prompts:
        first = [sum(lengths[:i]) for i in range(len(lengths)) if lengths[i]]
        row_index = torch.randperm(tokens, generator=torch.Generator().manual_seed(1))
        row_index = row_index.to(torch.empty(0).device)
        row_index[first] = row_index[first[0]].clone()
    inputs: dict[str, Any] = make_head(tokens, width, vocab, dtype)
    inputs["token_ids"] = torch.randint(0, vocab, (tokens,))
    inputs |= softmax
    wide = {k: inputs[k].double() for k in ("hidden", "weight", "bias")}
    logprobs = reference_logprobs(
        token_ids=inputs["token_ids"], row_index=row_index, **wide, **ranges(softmax, tokens)
    )
    made = {k: x.to(logprobs.device) for k, x in loss_inputs.make_inputs(lengths).items()}
    precision = torch.float64 if dtype == torch.float64 else torch.float32
    for name in ("old_logprobs", "ref_logprobs"):
        inputs[name] = (logprobs + made[name] - made["logprobs"]).to(precision)
    for name in ("advantages", "policy_weights"):
        inputs[name] = made[name].to(precision)
    inputs |= {name: made[name] for name in ("mask", "cu_seqlens")}
    if row_index is not None:
        inputs["row_index"] = row_index
    return inputs


def ranges(softmax: dict[str, Any], rows: int) -> dict[str, Any]:
    """The reference takes [R, 2]."""
    pair = softmax.get("vocab_range")
    if not isinstance(pair, tuple):
        return softmax
    return softmax | {"vocab_range": torch.tensor(pair).expand(rows, 2)}


def run_op(**inputs: Any) -> tuple[Tensor, ...]:
    return with_statistics(*linear_grpo_loss(**inputs))


def run_reference(**inputs: Any) -> tuple[Tensor, ...]:
    for name in ("memory_budget", "backend"):
        inputs.pop(name, None)
    return rounded(*reference(**ranges(inputs, len(inputs["hidden"]))))


def with_statistics(loss: Tensor, metrics: LossMetrics, *others: Tensor) -> tuple[Tensor, ...]:
    return rounded(loss, torch.cat([metrics.sums, metrics.extremes]), *others)


def rounded(loss: Tensor, statistics: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
    """Statistics rounded as the loss is: they are no more exact than it."""
    return loss, statistics.to(loss.dtype), *others


def logit_scale(inputs: dict[str, Any]) -> tuple[Tensor, float]:
    """Logits [R, V] in fp64, and the size of the largest with its summands made positive."""
    wide = {k: inputs[k].detach().double() for k in ("hidden", "weight", "bias") if k in inputs}
    bias = wide.get("bias")
    logits = project(wide["hidden"], wide["weight"], bias)
    size = project(wide["hidden"].abs(), wide["weight"].abs(), None if bias is None else bias.abs())
    return logits, (1 + float(size.max())) / inputs.get("temperature", 1.0)


def dlogits_scale(
    inputs: dict[str, Any],
    logits: Tensor,
    largest: float,
    by_logprob: Tensor,  # [T] size of the gradients by each
    by_entropy: Tensor,  # [R]
) -> Tensor:
    """Size of what adds up to the gradient of the logits, times a probability's relative error."""
    rows = inputs.get("row_index")
    rows = torch.arange(len(logits), device=logits.device) if rows is None else rows
    cap = inputs.get("softcap") or torch.inf
    z = logits if cap == torch.inf else cap * torch.tanh(logits / cap)
    p = (z / inputs.get("temperature", 1.0)).softmax(dim=1)
    per_row = torch.zeros_like(p[:, 0]).index_add(0, rows, by_logprob.double())
    size = p * (per_row + by_entropy.double() * largest)[:, None]
    size.index_put_((rows, inputs["token_ids"].clamp(0)), by_logprob.double(), accumulate=True)
    return size * largest / min(1.0, inputs.get("temperature", 1.0))


def gradient_scales(
    inputs: dict[str, Any],
    by_logprob: Tensor,  # [T]
    by_entropy: Tensor,  # [R]
) -> dict[str, Tensor]:
    """The same for the gradients of a head."""
    size = dlogits_scale(inputs, *logit_scale(inputs), by_logprob, by_entropy)
    scales = {
        "dhidden": size @ inputs["weight"].double().abs(),
        "dweight": size.T @ inputs["hidden"].double().abs(),
    }
    return scales | ({"dbias": size.sum(0)} if "bias" in inputs else {})


def loss_scales(inputs: dict[str, Any]) -> dict[str, Any]:
    """The scales of `loss_inputs`, whose log-probs have here the error of a projection."""
    logits, largest = logit_scale(inputs)
    scales, *sizes = output_scales(inputs, run_reference, len(logits), largest)
    return scales | gradient_scales(inputs, *sizes)


def output_scales(
    inputs: dict[str, Any], run: Any, row_count: int, largest: float
) -> tuple[dict[str, Any], Tensor, Tensor]:
    """Of loss, metrics, log-probs and entropy; and the sizes of the gradients by the last two."""
    params: LossParams = inputs["params"]
    wide = {
        k: x.double() if torch.is_tensor(x) and x.is_floating_point() else x
        for k, x in inputs.items()
    }
    _, _, logprobs, entropy = run(**wide)
    names = ("old_logprobs", "ref_logprobs", "mask", "policy_weights", "advantages", "cu_seqlens")
    given = {name: wide[name] for name in (*names, "params")}
    scales = loss_inputs.scales(given | {"logprobs": logprobs, "entropy": entropy})
    lengths = inputs["cu_seqlens"].diff()
    worst = largest * (float(lengths.max()) if params.ratio == "seq_sum" else 1.0)
    by_logprob = scales["dlogprobs"].abs() * worst
    by_entropy = torch.full_like(by_logprob, abs(params.entropy_coef) / max(len(lengths), 1))
    rows = inputs.get("row_index")
    if rows is not None:
        by_entropy = torch.zeros(row_count).double().index_add(0, rows, by_entropy)
    of_outputs = {
        "out0": scales["out0"] * worst,
        "out1": scales["out1"] * worst,
        "out2": largest,
        "out3": largest,
    }
    return of_outputs, by_logprob, by_entropy
