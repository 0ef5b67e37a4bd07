"""What is counted and watched of the samples of a run: verdicts, in all and by kind of prompt."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

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

    def right(self, samples: Samples) -> Tensor:
        """[B] fp32, 1 where everything is right, 0 where not, NaN where nothing tells."""
        return self._verdicts(samples).strict

    def measure(self, samples: Samples) -> dict[str, float]:
        """Mean scores of a batch of one skill."""
        skill = samples.examples[0].task
        verdicts = self._verdicts(samples)
        metrics = {f"strict/{skill}": _mean(verdicts.strict)}
        if skill == "generate":
            metrics["partial/generate"] = _mean(verdicts.partial)
            for name, audit in self.audits.items():
                metrics[f"{name}/generate"] = _mean(audit(samples).strict)
        return {name: value for name, value in metrics.items() if not math.isnan(value)}

    def count(self, samples: Samples) -> dict[str, Any]:
        """How many samples of one skill are right, in all and by kind, as a row of evals.jsonl.

        Samples that nothing tells about are left out; nothing is said where there are no others.
        """
        skill = samples.examples[0].task
        measure = "correct" if skill == "understand" else "strict"
        verdicts = self._verdicts(samples)
        row: dict[str, Any] = {}
        by_kind: dict[str, list[int]] = {"": list(range(len(samples)))}
        for i, example in enumerate(samples.examples):
            if example.kind:
                by_kind.setdefault(example.kind, []).append(i)
        if len(by_kind) == 2:  # a single kind is the whole
            by_kind = {"": by_kind[""]}
        for kind, members in by_kind.items():
            strict = verdicts.strict[members]
            total = int((~strict.isnan()).sum())
            prefix = f"{skill}/{kind}" if kind else skill
            if total:
                row[f"{prefix}/{measure}"] = int(strict.nansum())
                row[f"{prefix}/total"] = total
        if row and skill == "generate":
            for name, audit in self.audits.items():
                row[f"generate/{name}"] = int(audit(samples).strict.nansum())
            row["generate/partial"] = float(verdicts.partial.nanmean())
        return row

    def _verdicts(self, samples: Samples) -> Verdicts:
        verdicts = self.check(samples)
        if self.cut_is_wrong:
            verdicts.strict[samples.truncated] = 0.0
        return verdicts


def _mean(values: Tensor) -> float:
    return float(values.nanmean())
