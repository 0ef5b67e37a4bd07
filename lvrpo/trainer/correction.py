"""Answers that were drawn from another distribution than the update replays: how far it is off.

Their sampler was not the trainer's own policy, or options such as top-p cut its distribution.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from itertools import accumulate

import torch
from torch import Tensor

from lvrpo.models.protocol import Answers, Policy
from lvrpo.params.sampler_correction import SamplerCorrectionParams
from lvrpo.sampler_correction import sampler_weights
from lvrpo.trainer.config import TrainConfig
from lvrpo.trainer.ranks import ALONE, Ranks
from lvrpo.trainer.sampling import answer_sampling
from lvrpo.trainer.sharing import shared_over_answers


def distribution_notes(config: TrainConfig) -> list[str]:
    """Say it where answers are not sampled from the distribution that the update replays."""
    changes = answer_sampling(config.rollout).changes
    if not (changes and config.rollout.understand_prompts):
        return []
    spelled = {"min_tokens": "min_answer_tokens"}
    keys = ", ".join(f"rollout.{spelled.get(name, name)}" for name in changes)
    correction = config.loss.sampler_correction
    weights = f"loss.sampler_correction = {correction or 'tis'!r}"
    return [
        f"answers are sampled from a distribution that {keys} changed, and ratios are of the "
        f"unchanged one: {weights} {'weighs' if correction else 'would weigh'} tokens for it, "
        "sampler/kept_mass and sampler/differs of the log measure it"
    ]


def truncation_metrics(answers: Answers) -> dict[str, float]:
    """By how much options of sampling changed the distribution of the tokens, on average.

    Returns:
        "sampler/kept_mass", the probability of the tokens that could be drawn, and
        "sampler/differs", the share of tokens that were drawn from a changed distribution; nothing
        where no option changes it.
    """
    found = answers.sampled_from
    if found is None or not len(found.logprobs):
        return {}
    kept, differs = torch.stack([found.kept_mass.mean(), found.differs.double().mean()]).tolist()
    return {"sampler/kept_mass": kept, "sampler/differs": differs}


@torch.no_grad()
def correct_sampler(
    policy: Policy, answers: Answers, config: TrainConfig, ranks: Ranks = ALONE
) -> tuple[Answers, Tensor | None, dict[str, float]]:
    """Log-probs of the policy's own in place of the sampler's, and weights for the difference.

    They take one more forward pass, that ranks share; without `loss.sampler_correction` there is
    none, and nothing changes.

    Args:
        policy: that the update replays them with.
        answers: of all ranks.
        config: in force.
        ranks: of which every one has them.

    Returns:
        The answers with those log-probs, [T] weights or None, and metrics of the mismatch.
    """
    name = config.loss.sampler_correction
    if not name or not answers.token_ids:
        return answers, None, {}
    sampled = answers.logprobs
    if answers.sampled_from is not None:
        sampled = answers.sampled_from.logprobs
    old = shared_over_answers(answers, partial(_logprobs, policy, config), ranks)
    ends = accumulate(map(len, answers.token_ids))
    correction = sampler_weights(
        old,
        sampled,
        torch.tensor([0, *ends]).to(old.device),
        params=SamplerCorrectionParams.preset(name),
    )
    told = ("kl", "gap_max", "truncated", "dropped", "effective_sample_size")
    values = torch.stack([getattr(correction.stats, key) for key in told]).tolist()
    metrics = {f"sampler/{key}": value for key, value in zip(told, values, strict=True)}
    return dataclasses.replace(answers, logprobs=old), correction.weights, metrics


def _logprobs(policy: Policy, config: TrainConfig, answers: Answers) -> Tensor:
    return torch.cat(
        [
            policy.forward(pack).logprobs(
                pack, temperature=config.rollout.temperature, backend=policy.backend
            )
            for pack in policy.packs(answers.groups(), max_rows=config.optimizer.max_rows)
        ]
    )
