"""A row of evals.jsonl, made of measurements; lvrpo/runs/scores.py reads it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lvrpo.data.example import Skill
from lvrpo.intervals import Mean, clustered_mean
from lvrpo.trainer.measurement import AS_TRAINED, GREEDY, LOW_NOISE, Measurement

#: What evals.jsonl calls "right" of the samplings that it counts.
_COUNTED: Mapping[tuple[Skill, str], str] = {
    ("understand", AS_TRAINED): "correct",
    ("understand", GREEDY): "greedy",
    ("generate", AS_TRAINED): "strict",
    ("generate", LOW_NOISE): "low_noise",
}


def evaluation_row(found: Sequence[Measurement]) -> dict[str, Any]:
    """Flat counts and means, keyed as a row of evals.jsonl, of what was sampled once a prompt.

    Samples that nothing tells about are left out; nothing is said where there are no others.
    """
    row: dict[str, Any] = {}
    for measurement in found:
        counted = _COUNTED.get((measurement.skill, measurement.sampling))
        if counted is None or measurement.group_size > 1:
            continue
        row |= _counts(measurement, counted)
        if measurement.sampling == AS_TRAINED:
            row |= _means(measurement)
    return row


def kinds_of(measurement: Measurement) -> list[str]:
    """The kinds of prompt to break down by, as they first come; none where one is the whole."""
    kinds = list(dict.fromkeys(kind for kind in measurement.kinds if kind))
    return kinds if len(kinds) > 1 else []


def reward_row(skill: str, name: str, mean: Mean) -> dict[str, Any]:
    """The keys that hold the mean of one reward."""
    key = f"{skill}/{name}"
    return {
        f"reward/{key}": mean.value,
        f"reward_error/{key}": mean.error,
        f"reward_count/{key}": mean.count,
    }


def _counts(measurement: Measurement, counted: str) -> dict[str, int]:
    """How many are right, in all and by kind."""
    row = {}
    for kind in ("", *kinds_of(measurement)):
        right = [
            score
            for score, its in zip(measurement.scores["right"], measurement.kinds, strict=True)
            if score is not None and kind in ("", its)
        ]
        prefix = f"{measurement.skill}/{kind}" if kind else measurement.skill
        if right:
            row[f"{prefix}/{counted}"] = int(sum(right))
            row[f"{prefix}/total"] = len(right)
    return row


def _means(measurement: Measurement) -> dict[str, Any]:
    """What else was scored: by a second reader, in part, as cut, and by every reward."""
    skill = measurement.skill
    row: dict[str, Any] = {}
    for name, column in measurement.scores.items():
        pairs = zip(column, measurement.clusters, strict=True)
        known = [(score, cluster) for score, cluster in pairs if score is not None]
        if not known:
            continue
        scores, clusters = zip(*known, strict=True)
        _, _, reward = name.partition("/")
        if name == "gold":
            row[f"{skill}/gold"] = int(sum(scores))
        elif name == "partial":
            row[f"{skill}/partial"] = sum(scores) / len(scores)
        elif name == "truncated":
            row[f"truncated/{skill}"] = sum(scores) / len(scores)
        elif reward:
            row |= reward_row(skill, reward, clustered_mean(scores, clusters))
    return row
