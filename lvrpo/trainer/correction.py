"""Answers that a sampler drew which is not the trainer's own policy: how far it is off."""

from __future__ import annotations

import dataclasses
from itertools import accumulate

import torch
from torch import Tensor

from lvrpo.models.protocol import Answers, Policy
from lvrpo.params.sampler_correction import SamplerCorrectionParams
from lvrpo.sampler_correction import sampler_weights
from lvrpo.trainer.config import TrainConfig


@torch.no_grad()
def correct_sampler(
    policy: Policy, answers: Answers, config: TrainConfig
) -> tuple[Answers, Tensor | None, dict[str, float]]:
    """Log-probs of the policy's own in place of the sampler's, and weights for the difference.

    They take one more forward pass; without `loss.sampler_correction` there is none, and nothing
    changes.

    Returns:
        The answers with those log-probs, [T] weights or None, and metrics of the mismatch.
    """
    name = config.loss.sampler_correction
    if not name or not answers.token_ids:
        return answers, None, {}
    old = torch.cat(
        [
            policy.forward(pack).logprobs(
                pack, temperature=config.rollout.temperature, backend=policy.backend
            )
            for pack in policy.packs(answers.groups(), max_rows=config.optimizer.max_rows)
        ]
    )
    ends = accumulate(map(len, answers.token_ids))
    correction = sampler_weights(
        old,
        answers.logprobs,
        torch.tensor([0, *ends]).to(old.device),
        params=SamplerCorrectionParams.preset(name),
    )
    told = ("kl", "gap_max", "truncated", "dropped", "effective_sample_size")
    values = torch.stack([getattr(correction.stats, key) for key in told]).tolist()
    metrics = {f"sampler/{key}": value for key, value in zip(told, values, strict=True)}
    return dataclasses.replace(answers, logprobs=old), correction.weights, metrics
