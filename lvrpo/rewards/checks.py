"""What is watched of the samples of a run: verdicts that nothing is trained on."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lvrpo.data.example import Skill
from lvrpo.rewards.parts import Verdicts
from lvrpo.rewards.reward import Reward, Samples
from lvrpo.rewards.score import score


@dataclass(frozen=True)
class RewardCheck:
    """What a reward says as a verdict: a sample is right where it scores 1 or more.

    Args:
        reward: whose scores are shares of what is asked; NaN where it has none.
    """

    reward: Reward

    def __call__(self, samples: Samples) -> Verdicts:
        """Of samples of any kind.

        Raises:
            RewardError: see `score`.
        """
        scores = score([self.reward], samples, truncated="keep")[:, 0]
        strict = (scores >= 1).float().masked_fill(scores.isnan(), math.nan)
        return Verdicts(strict, scores.clamp(0, 1), torch.full_like(scores, math.nan))


@dataclass(frozen=True)
class ChecksBySkill:
    """One check of answers, another of drawings; samples are of one skill.

    Args:
        checks: by skill.
        otherwise: of a skill that has none.
    """

    checks: Mapping[Skill, Callable[[Samples], Verdicts]]
    otherwise: Callable[[Samples], Verdicts]

    def __call__(self, samples: Samples) -> Verdicts:
        """Of at least one sample."""
        return self.checks.get(samples.examples[0].task, self.otherwise)(samples)


@dataclass(frozen=True)
class VerdictChecks:
    """Checks of a run, a `lvrpo.trainer.task.Checks`.

    Args:
        check: says what is right.
        audits: second opinions on drawings, by name: where a policy exploits a blind spot of
            `check`, it does not please these.
        cut_is_wrong: whether an answer that was cut is never right.
    """

    check: Callable[[Samples], Verdicts]
    audits: Mapping[str, Callable[[Samples], Verdicts]] = field(default_factory=dict)
    cut_is_wrong: bool = True

    def scores(self, samples: Samples) -> dict[str, Tensor]:
        """Scores of samples of one skill by measure, each [B] fp32, NaN where nothing tells.

        "right" is 1 where everything is right, else 0. Drawings have "partial", the share of the
        request that is met, and the verdict of every audit under its name.
        """
        verdicts = self.check(samples)
        if samples.examples[0].task == "understand":
            strict = verdicts.strict
            if self.cut_is_wrong:
                strict = strict.masked_fill(samples.truncated, 0.0)
            return {"right": strict}
        audits = {name: audit(samples).strict for name, audit in self.audits.items()}
        return {"right": verdicts.strict, "partial": verdicts.partial} | audits
