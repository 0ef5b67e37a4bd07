"""What one way of sampling gave on held-out prompts, sample by sample: the raw result of a run.

Rates, their intervals, pass@k and paired changes are all made of these, see `lvrpo.runs.results`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lvrpo.data.example import Skill

#: Names of ways of sampling. "as trained" is that of the rollout, "as configured" that of [eval];
#: the headline ones are the modes, which no temperature and no noise improves.
AS_TRAINED, AS_CONFIGURED, GREEDY, LOW_NOISE = (
    "as trained",
    "as configured",
    "greedy",
    "ode noise 0",
)
HEADLINE: Mapping[Skill, str] = {"understand": GREEDY, "generate": LOW_NOISE}


@dataclass(frozen=True)
class Measurement:
    """P held-out prompts of one skill, G samples of each.

    Attributes:
        step: after which it was made.
        label: "warm start", "after", ... as in evals.jsonl.
        skill: of the prompts.
        sampling: name of the way of sampling: "as trained", "as configured", "greedy",
            "temperature 0.5", "ode", "ode noise 0.5", "ode noise 0".
        settings: of it: {"temperature": 0.5, "top_p": 0.9}; {"dynamics": "ode", "start_noise":
            0.5}.
        group_size: G.
        uids: [P] of the prompts, the same for every label, seed and way of sampling.
        clusters: [P], equal for prompts that are not independent of each other.
        kinds: [P] of the prompts.
        scores: by measure, each [P * G] with None where nothing tells: "right" (0 or 1) always,
            where there are any "gold" (0 or 1, by a reader that no reward uses), "partial" (0 to
            1), "reward" (weighted sum of the configured rewards).
        diversity: [P] of the samples of one prompt: pictures, root of the mean squared pairwise
            distance; answers, the probability that two differ. Empty where G is 1.
    """

    step: int
    label: str
    skill: Skill
    sampling: str
    settings: Mapping[str, float | str]
    group_size: int
    uids: Sequence[str]
    clusters: Sequence[str]
    kinds: Sequence[str]
    scores: Mapping[str, Sequence[float | None]]
    diversity: Sequence[float] = ()

    def __post_init__(self) -> None:
        prompts = len(self.uids)
        lengths = {"clusters": len(self.clusters), "kinds": len(self.kinds)}
        lengths |= {"diversity": len(self.diversity)} if self.diversity else {}
        wrong = {name: n for name, n in lengths.items() if n != prompts}
        samples = prompts * self.group_size
        wrong |= {name: len(s) for name, s in self.scores.items() if len(s) != samples}
        if wrong or self.group_size < 1 or "right" not in self.scores:
            raise ValueError(
                f"Measurement: {prompts} prompts with {self.group_size} samples each, but lengths "
                f"{wrong} and scores {sorted(self.scores)}, expected 'right' among them"
            )

    def to_row(self) -> dict[str, Any]:
        """As a row of measurements.jsonl."""
        return dataclasses.asdict(self)

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> Measurement:
        """The inverse of `to_row`; keys that are unknown are left out."""
        names = {field.name for field in dataclasses.fields(cls)}
        return cls(**{key: value for key, value in row.items() if key in names})
