"""Supervised training, before the first reward or in its place: cross entropy and flow matching."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lvrpo import random
from lvrpo.data.example import Example, Picture
from lvrpo.models.flow import interpolate, velocity_target
from lvrpo.models.protocol import Policy
from lvrpo.ops.linear_logprobs import linear_logprobs


def supervised_gradient(
    policy: Policy,
    questions: Sequence[Example],
    drawings: Sequence[Sequence[Example]],
    *,
    seed: int,
    step: int,
) -> dict[str, float]:
    """Add the gradient of cross entropy plus velocity error to the model's parameters.

    Args:
        policy: its model is trained.
        questions: examples with an answer.
        drawings: groups of examples of one prompt, each with a target picture of its own; the
            prompt is computed once for the group.
        seed: of the run.
        step: number of this step; with `seed` it fixes the noise.

    Returns:
        "loss/text" in nats per token and "loss/image", the mean squared velocity error.
    """
    latents = times = target = None
    if drawings:
        latents, times, target = _noisy_targets(policy, drawings, seed, step)
    (pack,) = policy.packs(
        [(example, [policy.answer_ids(_answer(example))]) for example in questions],
        [(group[0], len(group)) for group in drawings],
        latents,
        times,
    )
    outputs = policy.forward(pack)
    metrics, total = {}, outputs.hidden.new_zeros(())
    if questions:
        # Imitation is among all tokens: which of them answers may hold is learned here.
        head = outputs.head.arguments() | {"vocab_range": None}
        logprobs = linear_logprobs(
            outputs.hidden,
            token_ids=pack.token_ids,
            row_index=pack.row_index,
            **head,
            backend=policy.backend,
        )
        loss = -logprobs.mean()
        metrics["loss/text"] = float(loss.detach())
        total = total + loss
    if target is not None:
        loss = (outputs.velocity - target).square().mean()
        metrics["loss/image"] = float(loss.detach())
        total = total + loss
    total.backward()  # type: ignore[no-untyped-call]
    return metrics


def _noisy_targets(
    policy: Policy, drawings: Sequence[Sequence[Example]], seed: int, step: int
) -> tuple[Tensor, Tensor, Tensor]:
    """x_t [M, n, c], t [M] and the velocity [M, n, c] they should predict, for all M examples."""
    targets = [torch.from_numpy(_target(example)) for group in drawings for example in group]
    clean = policy.encode(torch.stack(targets))
    generator = random.stream(seed, "flow noise", step)
    noise = torch.from_numpy(generator.standard_normal(clean.shape, dtype="float32"))
    noise = noise.to(clean.device)
    # One time in each M-th part of [0, 1]: uniform like independent draws, with less variance.
    strata = generator.permutation(len(clean)) + generator.random(len(clean))
    times = torch.from_numpy((strata / len(clean)).astype("float32")).to(clean.device)
    return interpolate(clean, noise, times), times, velocity_target(clean, noise)


def _answer(example: Example) -> str:
    if example.answer is None:
        raise ValueError(f"{example.uid}: a question without an answer cannot be learned from")
    return example.answer


def _target(example: Example) -> Picture:
    if example.target is None:
        raise ValueError(f"{example.uid}: a drawing prompt without a target cannot be learned from")
    return example.target
