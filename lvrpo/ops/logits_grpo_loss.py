"""The policy loss from logits, whose gradient is formed while a row of them is at hand.

R rows of logits, V vocabulary, T target tokens, B sequences. How and why:
docs/ops/logits_grpo_loss.md.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lvrpo.ops import _backend, _checks, _fused_inputs, _targets
from lvrpo.ops._logits_loss import dtypes_of, fused_loss
from lvrpo.ops._policy_loss import FusedPolicyLoss, LossParams
from lvrpo.reference.logits_grpo_loss import logits_grpo_loss as reference_logits_grpo_loss

OP = "logits_grpo_loss"
_DEFAULT = LossParams()


def logits_grpo_loss(
    logits: Tensor,
    token_ids: Tensor,
    old_logprobs: Tensor | None,
    advantages: Tensor,
    cu_seqlens: Tensor,
    *,
    row_index: Tensor | None = None,
    ref_logprobs: Tensor | None = None,
    token_weights: Tensor | None = None,
    denominator: float | Tensor | None = None,
    params: LossParams = _DEFAULT,
    temperature: float = 1.0,
    softcap: float | None = None,
    vocab_range: Tensor | tuple[int, int] | None = None,
    ignore_index: int = -100,
    inplace_backward: bool = False,
    backend: str | None = None,
) -> FusedPolicyLoss:
    """`grpo_loss` of the log-probs and entropies of `gather_logprobs`, with its gradient.

    Differentiable in `logits`. What a token adds to the loss depends on its own row (or sequence)
    only, so the forward writes the gradient of a row as soon as it knows the row's log-prob, while
    the logits are in a cache. Rows whose gradient is zero whatever their logits (advantage 0, no
    KL, no entropy bonus) are read once; rows without a token of nonzero weight are not read.

    The backward scales the gradient by its upstream gradient, in place, and gives it away. A second
    backward computes it anew.

    Args:
        logits: [R, V] fp32, fp64, bf16 or fp16; any row stride.
        token_ids: [T] int64, packed sequences. A token of `ignore_index` has weight 0.
        old_logprobs: [T] as `grpo_loss` takes them, like everything below up to `params`.
        advantages: [B] or [T].
        cu_seqlens: [B + 1] int64 offsets of the sequences in the tokens.
        row_index: [T] int64, the row that predicts each token; None: token t belongs to row t.
        ref_logprobs: [T].
        token_weights: [T] factors >= 0, or a bool mask.
        denominator: replaces the number that the outer mean divides by.
        params: the loss. The entropy that `entropy_coef` needs is computed here. With a ratio per
            sequence all log-probs come first: the logits are read twice from memory.
        temperature: divides the logits; finite, > 0.
        softcap: as in `gather_logprobs`.
        vocab_range: likewise.
        ignore_index: see `token_ids`.
        inplace_backward: the gradient takes the place of the logits in memory, already in this
            call. Their values are lost: reading them afterwards reads the gradient, autograd raises
            where it needs them, and a second backward is an error. Without a gradient to form
            nothing is overwritten. The torch backend and torch.compile do without.
        backend: "cpp", "triton", "torch", or None for the first that can run.

    Returns:
        FusedPolicyLoss in fp32 (fp64 from fp64).

    Raises:
        ValueError: as `gather_logprobs` and `grpo_loss`; or `inplace_backward` with fp16, which
            cannot hold a gradient before a loss scale has multiplied it.
        RuntimeError: in the backward: a second one after `inplace_backward`, or the gradient was
            changed in the place of the logits.
    """
    _targets.check_logits(OP, logits, inplace_backward)
    _checks.check_same_device(OP, logits=logits, token_ids=token_ids, row_index=row_index)
    dtype, dtype_of_gradient = dtypes_of(logits)
    if inplace_backward and dtype_of_gradient != logits.dtype:
        raise ValueError(
            f"{OP}: logits is {logits.dtype}; inplace_backward=True needs a dtype that holds the "
            "gradient before a loss scale has multiplied it: float32, float64 or bfloat16"
        )
    ranges = _targets.as_row_ranges(vocab_range, logits)
    _checks.check_same_device(OP, logits=logits, vocab_range=ranges)
    _targets.check_scale(OP, temperature, softcap)
    count, vocab = logits.shape
    _targets.check_targets(OP, count, vocab, token_ids, row_index, ranges, ignore_index)
    data = _fused_inputs.loss_inputs(
        OP,
        dtype,
        token_ids,
        {"old_logprobs": old_logprobs, "ref_logprobs": ref_logprobs},
        token_weights,
        advantages,
        cu_seqlens,
        denominator=denominator,
        params=params,
        ignore_index=ignore_index,
    )
    rows = {"logits": logits, "token_ids": token_ids, "row_index": row_index}
    rows["vocab_range"] = ranges
    chosen = _backend.resolve(OP, (*rows.values(), *data.tensors()), backend)
    arguments: dict[str, Any] = {**rows, **data.arguments(), "params": params}
    arguments |= {"temperature": temperature, "softcap": softcap}
    if chosen == "torch":
        with torch.autocast(logits.device.type, enabled=False):
            result = reference_logits_grpo_loss(**arguments, ignore_index=ignore_index)
    else:
        result = fused_loss(**arguments, inplace=inplace_backward, backend=chosen)
    return data.finish(OP, *result)
