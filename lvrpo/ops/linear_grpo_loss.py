"""The policy loss from hidden states: projection, log-probs, loss and gradient at three GEMMs.

R rows of hidden states, H hidden width, V vocabulary, T target tokens, B sequences. How and why:
docs/ops/linear_grpo_loss.md.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lvrpo.ops import _backend, _checks, _fused_inputs, _targets
from lvrpo.ops import _linear_inputs as _inputs
from lvrpo.ops._linear_head import dtypes_of
from lvrpo.ops._linear_loss import fused_loss
from lvrpo.ops._policy_loss import FusedPolicyLoss, LossParams
from lvrpo.reference.linear_grpo_loss import linear_grpo_loss as reference_linear_grpo_loss

OP = "linear_grpo_loss"
_DEFAULT = LossParams()


def linear_grpo_loss(
    hidden: Tensor,
    weight: Tensor,
    token_ids: Tensor,
    old_logprobs: Tensor | None,
    advantages: Tensor,
    cu_seqlens: Tensor,
    *,
    row_index: Tensor | None = None,
    bias: Tensor | None = None,
    ref_logprobs: Tensor | None = None,
    token_weights: Tensor | None = None,
    denominator: float | Tensor | None = None,
    params: LossParams = _DEFAULT,
    temperature: float = 1.0,
    softcap: float | None = None,
    vocab_range: Tensor | tuple[int, int] | None = None,
    ignore_index: int = -100,
    memory_budget: int | None = None,
    backend: str | None = None,
) -> FusedPolicyLoss:
    """`grpo_loss` of the log-probs and entropies of `linear_logprobs`, with its gradient.

    Differentiable in `hidden`, `weight` and `bias`. What a token adds to the loss depends on its
    own row (or sequence) only, so the forward forms the gradient of each chunk of logits while they
    are there: none are kept and none computed twice. Rows whose gradient is zero whatever their
    logits (advantage 0, no KL, no entropy bonus) are projected for the metrics and no more; rows
    without a token of nonzero weight are left out.

    The gradients wait, unscaled and in fp32, for the backward, which scales them by its upstream
    gradient and gives them away; a second backward computes them anew. On a GPU one small read
    before the first GEMM says how many rows have a gradient (for ratios per sequence also where
    chunks may end). While a CUDA graph is captured nothing is read and every row counts as such.

    Args:
        hidden: [R, H] fp32, fp64, bf16 or fp16.
        weight: [V, H] of the same dtype; may be shared with the embedding. Frozen
            (`requires_grad=False`) it costs no gradient GEMM and no buffer, and so does `hidden`.
        token_ids: [T] int64, packed sequences. A token of `ignore_index` has weight 0.
        old_logprobs: [T] as `grpo_loss` takes them, like everything below up to `params`.
        advantages: [B] or [T].
        cu_seqlens: [B + 1] int64 offsets of the sequences in the tokens.
        row_index: [T] int64, the row that predicts each token; None: token t belongs to row t.
        bias: [V] of the same dtype.
        ref_logprobs: [T].
        token_weights: [T] factors >= 0, or a bool mask.
        denominator: replaces the number that the outer mean divides by.
        params: the loss. The entropy that `entropy_coef` needs is computed here. A ratio per
            sequence costs a fourth GEMM where a sequence does not fit the budget.
        temperature: divides the logits; finite, > 0.
        softcap: as in `linear_logprobs`.
        vocab_range: likewise; a pair multiplies that slice of the weight only.
        ignore_index: see `token_ids`.
        memory_budget: likewise; the one thing to tune. Larger chunks touch the weight and its
            gradient less often.
        backend: "cpp", "triton", "torch" (all logits at once), or None for the first that can run.

    Returns:
        FusedPolicyLoss in fp32 (fp64 from fp64).

    Raises:
        ValueError: as `linear_logprobs` and `grpo_loss`.
    """
    hidden, weight, bias = _inputs.as_factors(OP, hidden, weight, bias)
    vocab = _inputs.vocab_slice(OP, vocab_range, weight.shape[0])
    ranges = vocab.ranges
    if _checks.check_values(token_ids):  # elsewhere a pair would be copied to the device
        ranges = _targets.as_row_ranges(vocab_range, hidden)
    _targets.check_scale(OP, temperature, softcap)
    rows, columns = hidden.shape[0], weight.shape[0]
    _targets.check_targets(OP, rows, columns, token_ids, row_index, ranges, ignore_index)
    most = _inputs.rows_at_once(OP, hidden, vocab.high - vocab.low, memory_budget)
    data = _fused_inputs.loss_inputs(
        OP,
        dtypes_of(hidden)[1],
        token_ids,
        {"old_logprobs": old_logprobs, "ref_logprobs": ref_logprobs},
        token_weights,
        advantages,
        cu_seqlens,
        denominator=denominator,
        params=params,
        ignore_index=ignore_index,
    )
    head = {
        "hidden": hidden,
        "weight": weight,
        "bias": bias,
        "token_ids": token_ids,
        "row_index": row_index,
    }
    chosen = _backend.resolve(OP, (*head.values(), ranges, *data.tensors()), backend)
    arguments: dict[str, Any] = {**head, **data.arguments(), "params": params}
    arguments |= {"temperature": temperature, "softcap": softcap, "ignore_index": ignore_index}
    if chosen == "torch":
        with torch.autocast(hidden.device.type, enabled=False):
            result = reference_linear_grpo_loss(
                **arguments, vocab_range=_targets.as_row_ranges(vocab_range, hidden)
            )
    else:
        result = fused_loss(**arguments, vocab=vocab, most=most, backend=chosen)
    return data.finish(OP, *result)
