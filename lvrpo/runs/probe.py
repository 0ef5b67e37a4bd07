"""Call every reward once before a run, on what the training data itself holds.

A reward that fails, or has nothing to say about this data, would otherwise be met after the whole
warm start.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from lvrpo.data.example import Example, FinishReason, Skill
from lvrpo.rewards.registry import FoundReward
from lvrpo.rewards.reward import RewardError, Samples
from lvrpo.rewards.score import score_samples
from lvrpo.runs.setup import FrozenParts, Setup

#: Training prompts of each skill.
PROMPTS = 4


def probe_rewards(setup: Setup, parts: FrozenParts) -> None:
    """Score a group of samples, right and wrong ones, for a few training prompts of each skill.

    Nothing is fitted for it: an encoder and an answerer that know nothing show what they fail at
    and where they have no score.

    Args:
        setup: of the run; its rewards are known to exist.
        parts: of the run's shape, see `Setup.unfitted_parts`.

    Raises:
        RewardError: as in a step of the run, or no reward has a score for any of the samples; or
            the one of `rewards.right` fails.
    """
    source = setup.data.source
    # A large model that no reward asks anything would take its time.
    with torch.device("cpu" if "answer_probability" in setup.needs else "meta"):
        policy = setup.new_policy(parts)
    policy.module.requires_grad_(False)
    for skill, rewards in setup.make_rewards(parts, policy).items():
        examples = source.examples("train", skill, PROMPTS, 0)
        if skill == "understand":
            samples = _answers(examples)
        else:
            samples = _drawings(examples, setup.family.drawing_shape(parts.family))
        scores = score_samples(rewards, samples, setup.config.rewards)
        scores.metrics(skill, setup.config.rewards)  # too many that failed
        if bool(scores.table.isnan().all()):
            raise RewardError(_nothing_to_say(skill, setup.rewards[skill], examples))
        if skill in setup.config.rewards.right:
            setup.checks.scores(samples)


def _answers(examples: list[Example]) -> Samples:
    """The right answer, none at all, and one that was cut."""
    texts: list[str] = []
    reasons: list[FinishReason] = []
    for example in examples:
        right = example.answer or ""
        texts += [right, "", f"{right} {right}"]
        reasons += ["end", "end", "length"]
    return Samples.of_texts([example for example in examples for _ in range(3)], texts, reasons)


def _drawings(examples: list[Example], shape: tuple[int, int, int]) -> Samples:
    """The target, or noise where there is none of this shape, and an empty canvas."""
    noise = torch.Generator().manual_seed(0)
    pictures = []
    for example in examples:
        if example.target is None or example.target.shape != shape:
            pictures.append(torch.rand(shape, generator=noise))
        else:
            pictures.append(torch.from_numpy(example.target))
        pictures.append(torch.zeros(shape))
    return Samples.of_images(
        [example for example in examples for _ in range(2)], torch.stack(pictures)
    )


def _nothing_to_say(
    skill: Skill, rewards: Mapping[str, FoundReward], examples: list[Example]
) -> str:
    first = examples[0]
    by_rule = [label for label, reward in rewards.items() if "rules" in reward.needs]
    hint = ""
    if skill == "generate" and by_rule:
        hint = f"; rewards by rule ({', '.join(by_rule)}) need drawings with a 'rule'"
    return (
        f"rewards.{skill}: no reward ({', '.join(rewards)}) has a score for any of {len(examples)} "
        f"training prompts, {first.uid!r} ({first.prompt!r}) for one{hint}"
    )
