"""The policy loss from logits, whose gradient is formed while a row of them is at hand.

R rows of logits, V vocabulary, T target tokens, B sequences. How and why:
docs/ops/logits_grpo_loss.md.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from lvrpo import backends, checks
from lvrpo.ops._logits_loss import dtypes_of, fused_loss
from lvrpo.ops._loss_inputs import Level, Numbers, loss_inputs
from lvrpo.ops.head import targets as _targets
from lvrpo.ops.head.targets import Ids, VocabRange
from lvrpo.params.policy_loss import FusedPolicyLoss, LossParams
from lvrpo.reference.logits_grpo_loss import logits_grpo_loss as reference_logits_grpo_loss

OP = "logits_grpo_loss"
_DEFAULT = LossParams()


@checks.replaced(token_weights=checks.MASK_AND_WEIGHTS)
def logits_grpo_loss(
    logits: Tensor,
    token_ids: Ids,
    old_logprobs: Tensor | None,
    advantages: Numbers,
    cu_seqlens: Tensor | Sequence[int] | None = None,
    *,
    row_index: Ids | None = None,
    mask: Numbers | None = None,
    policy_weights: Numbers | None = None,
    level: Level | None = None,
    ref_logprobs: Tensor | None = None,
    denominator: float | Tensor | None = None,
    params: LossParams = _DEFAULT,
    temperature: float = 1.0,
    softcap: float | None = None,
    vocab_range: VocabRange = None,
    ignore_index: int = -100,
    inplace_backward: bool = False,
    backend: str | None = None,
) -> FusedPolicyLoss:
    """`grpo_loss` of the log-probs and entropies of `gather_logprobs`, with its gradient.

    Differentiable in `logits`. What a token adds to the loss depends on its own row (or sequence)
    only, so the forward writes the gradient of a row as soon as it knows the row's log-prob, while
    the logits are in a cache. Rows whose gradient is zero whatever their logits (advantage 0, no
    KL, no entropy bonus) are read once; rows without an unmasked token are not read, and may hold
    anything. Under autocast logits are taken as they are, as torch's own losses take them.

    The backward scales the gradient by its upstream gradient, in place, and gives it away. A second
    backward computes it anew.

    Args:
        logits: [R, V], or [B, C, V] for padded tokens; fp32, fp64, bf16 or fp16; any row stride.
        token_ids: [T] packed or [B, C] padded, of any integer dtype. A token of `ignore_index` is
            masked.
        old_logprobs: as `grpo_loss` takes them, like everything below up to `params`.
        advantages: [B] per sequence or in the shape of the tokens.
        cu_seqlens: [B + 1] offsets of packed sequences in the tokens; None for padded ones.
        row_index: the row (of the flattened ones) that predicts each token, in the shape of the
            tokens; None: token t belongs to row t.
        mask: what counts in denominators, KL, entropy and metrics.
        policy_weights: factors >= 0 of the policy term alone.
        level: what the advantages are given for.
        ref_logprobs: in the shape of the tokens.
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
    shaped, logits = logits, _targets.as_rows(OP, "logits", logits, "V")
    _targets.check_logits(OP, logits, inplace_backward)
    dtype, dtype_of_gradient = dtypes_of(logits)
    if inplace_backward and dtype_of_gradient != logits.dtype:
        raise ValueError(
            f"{OP}: logits is {logits.dtype}; inplace_backward=True needs a dtype that holds the "
            "gradient before a loss scale has multiplied it: float32, float64 or bfloat16"
        )
    _targets.check_scale(OP, temperature, softcap)
    targets, strange = _targets.as_targets(
        *(OP, "logits", shaped, logits.shape[1]),
        *(token_ids, row_index, vocab_range, ignore_index),
    ).without_strangers(logits.shape[1])
    data = loss_inputs(
        OP,
        ("token_ids", targets.token_ids.reshape(targets.tokens)),
        dtype,
        old_logprobs=old_logprobs,
        advantages=advantages,
        cu_seqlens=cu_seqlens,
        mask=mask,
        policy_weights=policy_weights,
        level=level,
        ref_logprobs=ref_logprobs,
        entropy=None,
        denominator=denominator,
        params=params,
    ).of_targets(targets, strange)
    indices = targets.token_ids, targets.row_index, targets.ranges
    tensors = (logits, *indices, *data.tensors())
    chosen = backends.resolve(OP, tensors, backend, choices=params.choices())
    functional = chosen.functional(OP, reference_logits_grpo_loss)
    if functional is not None:
        with checks.without_autocast(logits):
            result = functional(
                logits,
                targets.token_ids,
                row_index=targets.row_index,
                vocab_range=targets.ranges,
                temperature=temperature,
                softcap=softcap,
                ignore_index=ignore_index,
                **data.for_reference(),
            )
    else:
        result = fused_loss(
            logits,
            targets,
            data,
            temperature=temperature,
            softcap=softcap,
            inplace=inplace_backward,
            backend=chosen.name,
        )
    return data.finish_fused(*result)
