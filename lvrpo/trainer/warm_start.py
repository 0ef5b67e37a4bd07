"""Supervised training, before the first reward or in its place: cross entropy and flow matching."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import compress

import torch
from torch import Tensor

from lvrpo import random
from lvrpo.data.example import Example, Picture
from lvrpo.models.flow import interpolate, velocity_target
from lvrpo.models.protocol import Policy
from lvrpo.ops.linear_logprobs import linear_logprobs
from lvrpo.trainer.ranks import ALONE, Ranks, balance, sum_gradients


def supervised_gradient(
    policy: Policy,
    questions: Sequence[Example],
    drawings: Sequence[Sequence[Example]],
    *,
    seed: int,
    step: int,
    ranks: Ranks = ALONE,
) -> dict[str, float]:
    """Add the gradient of cross entropy plus velocity error to the model's parameters.

    Args:
        policy: its model is trained.
        questions: examples with an answer.
        drawings: groups of examples of one prompt, each with a target picture of its own; the
            prompt is computed once for the group.
        seed: of the run.
        step: number of this step; with `seed` it fixes the noise.
        ranks: that share the examples, whose gradients are added up.

    Returns:
        "loss/text" in nats per token and "loss/image", the mean squared velocity error.
    """
    losses = ranks.together(partial(_add_gradients, policy, questions, drawings, seed, step, ranks))
    sum_gradients(policy.module, ranks)
    metrics: dict[str, float] = {}
    for part in ranks.gather(losses):
        for name, loss in part.items():
            metrics[name] = metrics.get(name, 0.0) + loss
    return metrics


def _add_gradients(
    policy: Policy,
    questions: Sequence[Example],
    drawings: Sequence[Sequence[Example]],
    seed: int,
    step: int,
    ranks: Ranks,
) -> dict[str, float]:
    """Of this rank's examples; returns its part of each loss."""
    tokens = [len(policy.answer_ids(_answer(example))) for example in questions]
    targets = [len(group) for group in drawings]
    own, text_share = _own_part(tokens, ranks)
    questions = list(compress(questions, own))
    own, image_share = _own_part(targets, ranks)
    latents = times = target = None
    if drawings:
        chosen = torch.tensor(own).repeat_interleave(torch.tensor(targets))
        latents, times, target = _noisy_targets(policy, drawings, chosen, seed, step)
    drawings = list(compress(drawings, own))
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
        loss = -logprobs.mean() * text_share
        metrics["loss/text"] = float(loss.detach())
        total = total + loss
    if target is not None:
        loss = (outputs.velocity - target).square().mean() * image_share
        metrics["loss/image"] = float(loss.detach())
        total = total + loss
    total.backward()  # type: ignore[no-untyped-call]
    return metrics


def _own_part(costs: Sequence[int], ranks: Ranks) -> tuple[list[bool], float]:
    """Which pieces of work are this rank's, and which share of all they are.

    Ranks that have parts of the parameters all make the same pass: one without a piece takes the
    first, of weight 0.
    """
    own = [owner == ranks.rank for owner in balance(costs, ranks.size)]
    share = sum(compress(costs, own)) / max(1, sum(costs))
    return own if any(own) else [i == 0 for i in range(len(own))], share


def _noisy_targets(
    policy: Policy,
    drawings: Sequence[Sequence[Example]],
    chosen: Tensor,
    seed: int,
    step: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """x_t [M, n, c], t [M] and the velocity [M, n, c] they should predict.

    Of all examples M are chosen; what is drawn for them does not depend on which.
    """
    targets = [torch.from_numpy(_target(example)) for group in drawings for example in group]
    clean = policy.encode(torch.stack([t for t, own in zip(targets, chosen, strict=True) if own]))
    count = len(targets)
    generator = random.stream(seed, "flow noise", step)
    noise = torch.from_numpy(generator.standard_normal((count, *clean.shape[1:]), dtype="float32"))
    noise = noise[chosen].to(clean.device)
    # One time in each part of [0, 1]: uniform like independent draws, with less variance.
    strata = generator.permutation(count) + generator.random(count)
    times = torch.from_numpy((strata / count).astype("float32"))[chosen].to(clean.device)
    return interpolate(clean, noise, times), times, velocity_target(clean, noise)


def _answer(example: Example) -> str:
    if example.answer is None:
        raise ValueError(f"{example.uid}: a question without an answer cannot be learned from")
    return example.answer


def _target(example: Example) -> Picture:
    if example.target is None:
        raise ValueError(f"{example.uid}: a drawing prompt without a target cannot be learned from")
    return example.target
