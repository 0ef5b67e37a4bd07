"""Words and discrete image tokens of one vocabulary, each sampled from a range of its own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from runnable import ON_HOST
from torch import Tensor

from lvrpo.ops.grpo_loss import LossParams
from lvrpo.ops.linear_grpo_loss import linear_grpo_loss

WORDS, IMAGES, VOCAB = (0, 23), (23, 40), 43  # and three special tokens, which nothing samples
PARAMS = LossParams(clip_low=0.1, clip_high=0.3, beta=0.2, entropy_coef=0.01)
NAMES = "hidden", "weight", "bias"


def mixed_pack(lengths: list[int], is_image: list[bool]) -> dict[str, Any]:
    """Sequences of words or of image tokens; row t predicts token t."""
    generator = torch.Generator().manual_seed(len(lengths))
    tokens, width = sum(lengths), 12

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    ranges = torch.tensor([IMAGES if image else WORDS for image in is_image])
    ranges = ranges.repeat_interleave(torch.tensor(lengths), dim=0)
    spread = torch.rand(tokens, generator=generator)
    low, high = ranges.unbind(1)
    token_ids = low + (spread * (high - low)).long()
    hidden, weight, bias = randn(tokens, width), randn(VOCAB, width), randn(VOCAB)
    column, logits = torch.arange(VOCAB), hidden @ weight.T + bias
    allowed = (column >= low[:, None]) & (column < high[:, None])
    logprobs = logits.masked_fill(~allowed, -torch.inf).log_softmax(dim=1)
    logprobs = logprobs[torch.arange(tokens), token_ids]
    return {
        "hidden": hidden,
        "weight": weight,
        "bias": bias,
        "token_ids": token_ids,
        # Some ratios are cut, and most are not.
        "old_logprobs": logprobs + 0.1 * randn(tokens),
        "ref_logprobs": logprobs + 0.3 * randn(tokens),
        "advantages": randn(len(lengths)),
        "cu_seqlens": torch.tensor([0, *lengths]).cumsum(0),
        "vocab_range": ranges,
    }


def loss_and_gradients(inputs: dict[str, Any], **options: Any) -> list[Tensor]:
    leaves = {name: inputs[name].clone().requires_grad_() for name in NAMES}
    found = linear_grpo_loss(**inputs | leaves | options)
    return [found.loss.detach(), *torch.autograd.grad(found.loss, list(leaves.values()))]


def of_kind(inputs: dict[str, Any], is_image: list[bool], kind: bool) -> dict[str, Any]:
    """The sequences of one kind alone, with their range as a pair."""
    lengths = inputs["cu_seqlens"].diff()
    sequences = torch.tensor(is_image) == kind
    rows = sequences.repeat_interleave(lengths)
    chosen = {
        name: inputs[name][rows] for name in ("hidden", "token_ids", "old_logprobs", "ref_logprobs")
    }
    return (
        inputs
        | chosen
        | {
            "advantages": inputs["advantages"][sequences],
            "cu_seqlens": torch.cat(
                [torch.zeros(1, dtype=torch.int64), lengths[sequences].cumsum(0)]
            ),
            "vocab_range": IMAGES if kind else WORDS,
        }
    )


@pytest.mark.parametrize("memory_budget", [None, 2000])
def test_a_mixed_pack_is_one_call_with_ranges_or_two_with_a_pair(backend, memory_budget):
    is_image = [True, False, False, True, False, True]
    inputs = mixed_pack([5, 3, 7, 2, 4, 6], is_image)
    options = {
        "denominator": 6.0,
        "params": PARAMS,
        "backend": backend,
        "memory_budget": memory_budget,
    }
    whole = loss_and_gradients(inputs, **options)
    texts, images = (
        loss_and_gradients(of_kind(inputs, is_image, kind), **options) for kind in (False, True)
    )
    rows = torch.tensor(is_image).repeat_interleave(inputs["cu_seqlens"].diff())
    dhidden = torch.zeros_like(whole[1])
    dhidden[~rows], dhidden[rows] = texts[1], images[1]
    expected = [texts[0] + images[0], dhidden, texts[2] + images[2], texts[3] + images[3]]
    for ours, theirs in zip(whole, expected, strict=True):
        assert (ours - theirs).abs().max() <= 1e-12 * theirs.abs().max()


def test_a_kind_moves_no_column_of_the_other(backend):
    is_image = [True, False, True]
    inputs = mixed_pack([4, 6, 5], is_image)
    inputs["advantages"][1] = 0.0
    params = LossParams(beta=0.0, clip_low=0.5, clip_high=1.0)
    _, dhidden, dweight, dbias = loss_and_gradients(inputs, params=params, backend=backend)
    inside = slice(*IMAGES)
    for gradient in (dweight, dbias):
        assert gradient[inside].abs().max() > 0
        gradient[inside] = 0
        assert torch.equal(gradient, torch.zeros_like(gradient))
    assert torch.equal(dhidden[4:10], torch.zeros_like(dhidden[4:10]))


def sampled(logits: Tensor, allowed: tuple[int, int], generator: torch.Generator) -> Tensor:
    probabilities = logits[..., slice(*allowed)].softmax(dim=-1)
    return torch.multinomial(probabilities, 1, generator=generator)[..., 0] + allowed[0]


@pytest.mark.parametrize("backend", ON_HOST)
def test_a_policy_learns_the_image_tokens_that_are_rewarded(backend):
    """Eight positions of a picture, for each of which one of 17 codes is right."""
    positions, group, width = 8, 16, 12
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(positions, width, generator=generator).repeat(group, 1)
    weight = torch.zeros(VOCAB, width, requires_grad=True)
    right = torch.randint(*IMAGES, (positions,), generator=generator)
    rewards = []
    for _ in range(40):
        with torch.no_grad():
            logits = hidden @ weight.T
            ids = sampled(logits, IMAGES, generator)
            logprobs = logits[:, slice(*IMAGES)].log_softmax(dim=1)
            old = logprobs[range(len(ids)), ids - IMAGES[0]]
        reward = (ids.view(group, positions) == right).float().mean(dim=1)
        rewards.append(float(reward.mean()))
        found = linear_grpo_loss(
            *(hidden, weight, ids, old, (reward - reward.mean()) / (reward.std() + 1e-4)),
            torch.arange(group + 1) * positions,
            vocab_range=IMAGES,
            backend=backend,
        )
        assert abs(found.metrics.ratio_max - 1) < 1e-5
        (gradient,) = torch.autograd.grad(found.loss, weight)
        with torch.no_grad():
            weight -= 3.0 * gradient
    assert rewards[0] < 0.2
    assert sum(rewards[-5:]) / 5 > 0.7
    others = torch.cat([weight[: IMAGES[0]], weight[IMAGES[1] :]])
    assert torch.equal(others, torch.zeros_like(others))
