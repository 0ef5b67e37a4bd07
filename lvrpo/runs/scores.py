"""What a row of evals.jsonl says: rates with their totals, means of rewards with their errors."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lvrpo.intervals import Mean


@dataclass(frozen=True)
class Score:
    """One rate of an evaluation row.

    Attributes:
        task: "understand", "generate", or a task of the user's.
        kind: the kind of prompt, "" for all of them.
        measure: "correct", "strict", "gold", "partial", ...
        successes: right ones, or the sum of graded scores.
        total: how many were tried.
    """

    task: str
    kind: str
    measure: str
    successes: float
    total: int

    @property
    def name(self) -> str:
        """The key of the row it came from."""
        return "/".join(part for part in (self.task, self.kind, self.measure) if part)


def eval_scores(row: Mapping[str, Any]) -> list[Score]:
    """The rates of an evaluation row: whatever stands beside a "<task>[/<kind>]/total".

    An integer is a count; a float is a mean, as "partial" is.
    """
    scores = []
    for key, value in row.items():
        prefix, _, measure = key.rpartition("/")
        total = row.get(f"{prefix}/total")
        if measure == "total" or not isinstance(total, int) or isinstance(value, (bool, str)):
            continue
        task, _, kind = prefix.partition("/")
        successes = value if isinstance(value, int) else value * total
        if math.isfinite(successes) and 0 <= successes <= total:
            scores.append(Score(task, kind, measure, successes, total))
    return scores


def eval_rewards(row: Mapping[str, Any]) -> dict[tuple[str, str], Mean]:
    """{(task, name): mean} of the rewards of an evaluation row, the inverse of
    `lvrpo.trainer.evaluate.reward_row`."""
    found = {}
    for key, value in row.items():
        head, _, rest = key.partition("/")
        task, _, name = rest.partition("/")  # which may be a path
        count = row.get(f"reward_count/{rest}")
        if head == "reward" and isinstance(count, int) and count and math.isfinite(value):
            found[task, name] = Mean(value, row.get(f"reward_error/{rest}", math.nan), count)
    return found
