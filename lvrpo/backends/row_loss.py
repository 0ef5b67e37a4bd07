"""The policy loss from logits by a kernel that has a whole row: what comes before and after it.

R rows, each with its own token, B sequences. Why: docs/ops/logits_grpo_loss.md.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lvrpo.backends.backend import Backend, Function
from lvrpo.params.policy_loss import LOSS_NUMBERS
from lvrpo.token_layout import sequences_of


def run(
    backend: Backend,
    dlogits: Tensor,  # [R, V], may be the logits
    logits: Tensor,
    token_ids: Tensor,
    vocab_range: Tensor | None,
    old_logprobs: Tensor | None,
    advantages: Tensor,
    cu_seqlens: Tensor,
    ref_logprobs: Tensor | None,
    mask: Tensor,
    policy_weights: Tensor | None,
    softmax_numbers: Tensor,
    loss_numbers: Tensor,
    advantage_per_token: bool,
    count_empty: bool,
    **choices: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Loss, statistics, log-probs, entropy and log-sum-exp [R]; writes the gradient."""
    grpo_loss = backend.op("grpo_loss_fwd")
    of_tokens = advantages
    if not advantage_per_token:
        of_tokens = advantages[sequences_of(cu_seqlens, len(mask))]
    if policy_weights is not None:  # nobody asks for the advantage that a weight of 0 leaves out
        of_tokens = torch.where(policy_weights == 0, 0.0, of_tokens)
    data = old_logprobs, of_tokens, ref_logprobs, policy_weights
    tokens = mask, cu_seqlens, _zero_or_nan(data, policy_weights)
    factors = _factors(grpo_loss, tokens, loss_numbers, count_empty, choices["aggregation"])
    logprobs, lse, entropy = backend.op("logits_grpo_loss_rows")(
        *(dlogits, logits, token_ids, vocab_range, old_logprobs, of_tokens, cu_seqlens),
        *(ref_logprobs, mask, policy_weights, factors, softmax_numbers, loss_numbers),
        **{kind: name for kind, name in choices.items() if kind != "aggregation"},
    )
    loss, statistics, _, _ = grpo_loss(
        *(logprobs, old_logprobs, advantages, cu_seqlens, ref_logprobs, entropy, mask),
        *(policy_weights, loss_numbers, advantage_per_token, count_empty),
        **choices,
    )
    return loss, statistics, logprobs, entropy, lse


def _zero_or_nan(data: Sequence[Tensor | None], policy_weights: Tensor | None) -> Tensor:
    """[R] 0, and NaN for a token that `grpo_loss_fwd` drops because of these."""
    zero = sum(tensor - tensor for tensor in data if tensor is not None)
    assert isinstance(zero, Tensor)
    return zero if policy_weights is None else torch.where(policy_weights < 0, torch.nan, zero)


def _factors(
    grpo_loss: Function,
    tokens: tuple[Tensor, Tensor, Tensor],
    loss_numbers: Tensor,
    count_empty: bool,
    aggregation: str,
) -> Tensor:
    """[R] the slopes of a plain sum of log-probs, aggregated as this loss is: its own factors."""
    mask, cu_seqlens, zero = tokens
    numbers = loss_numbers.clone()
    numbers[[LOSS_NUMBERS.index("beta"), LOSS_NUMBERS.index("entropy_coef")]] = 0.0
    _, _, factors, _ = grpo_loss(
        *(zero, None, torch.full_like(zero, -1.0), cu_seqlens, None, None, mask, None, numbers),
        *(True, count_empty),
        ratio="none",
        surrogate="clip",
        kl="k1",
        kl_factor="none",
        kl_gradient="own",
        aggregation=aggregation,
    )
    found: Tensor = factors
    return found
