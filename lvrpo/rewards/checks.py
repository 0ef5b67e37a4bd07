"""What is watched of the samples of a run: verdicts that nothing is trained on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from torch import Tensor

from lvrpo.rewards.parts import Verdicts
from lvrpo.rewards.reward import Samples


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
