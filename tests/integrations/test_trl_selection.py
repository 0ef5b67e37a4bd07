"""The tokens that lose their policy term, and the entropy bonus, by TRL's own functions."""

from __future__ import annotations

import types

import pytest
import torch
from torch import Tensor

import lvrpo

theirs = pytest.importorskip("trl.trainer.grpo_trainer", reason="pip install 'lvrpo[trl]'")

ROWS, COLUMNS = 6, 11


def high_entropy(entropy: Tensor, mask: Tensor, fraction: float) -> Tensor:
    """TRL's choice, of one process."""
    alone = types.SimpleNamespace(
        pad_across_processes=lambda x, **_: x,
        gather=lambda x: x,
    )
    trainer = types.SimpleNamespace(accelerator=alone)
    return theirs.GRPOTrainer.get_high_entropy_mask(trainer, entropy, mask, 1 - fraction)


@pytest.mark.parametrize("off_policy", [None, 0.02, 0.2])
@pytest.mark.parametrize("fraction", [1.0, 0.8, 0.2, 0.03, 0.0])
@pytest.mark.parametrize("seed", range(4))
def test_trl_drops_the_same_tokens(fraction, off_policy, seed):
    made = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=made)

    entropy = (4 * normal(ROWS, COLUMNS).abs()).round() / 4  # with ties
    mask = (torch.arange(COLUMNS) < torch.randint(0, COLUMNS + 1, (ROWS, 1), generator=made)).long()
    mask[:, 3] = 0  # what a tool wrote
    logprobs = (-1 - normal(ROWS, COLUMNS).abs()).requires_grad_()
    sampler = logprobs.detach() + 0.1 * normal(ROWS, 1) + 0.05 * normal(ROWS, COLUMNS)
    sampler[normal(ROWS, COLUMNS) > 1.5] = torch.nan
    advantages = normal(ROWS)

    kept = high_entropy(entropy, mask, fraction) if fraction < 1 else mask.bool()
    count = kept.sum().clamp(min=1)
    bonus = (entropy * kept).sum() / count
    if off_policy is not None:
        near = theirs.GRPOTrainer.get_off_policy_mask(
            advantages[:, None], logprobs, sampler, mask, off_policy
        )
        kept = kept & near.bool()
    # On policy the gradient by a log-prob is minus the advantage of a token that pulls.
    expected = -advantages[:, None] * kept

    entropies = entropy.requires_grad_()
    result = lvrpo.grpo_loss(
        logprobs,
        None,
        advantages,
        mask=mask,
        entropy=entropies,
        top_entropy=fraction,
        off_policy_threshold=off_policy,
        sampler_logprobs=None if off_policy is None else sampler,
        params=lvrpo.LossParams(
            aggregation="token_sum", entropy_coef=0.5, entropy_aggregation="token_mean"
        ),
    )
    found, by_entropy = torch.autograd.grad(result.loss, (logprobs, entropies))
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(by_entropy.sum(), -0.5 * (bonus > 0).float())
    torch.testing.assert_close(result.loss.detach(), expected.sum() - 0.5 * bonus.detach())
