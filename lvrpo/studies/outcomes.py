"""What the finished runs of a study say: rates, changes, shares of rewards, by arm over seeds."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from statistics import fmean

from lvrpo.data.example import Skill
from lvrpo.intervals import Change, Interval
from lvrpo.runs.config_file import load_config
from lvrpo.runs.log import Row, read_measurements, read_metrics
from lvrpo.runs.results import (
    Pooled,
    PromptScores,
    Rate,
    mean_scores,
    pass_scores,
    pooled_change,
    pooled_rate,
)
from lvrpo.studies.directory import StudyRun
from lvrpo.studies.study import Arm
from lvrpo.trainer.loop import AFTER, WARM_START
from lvrpo.trainer.measurement import AS_TRAINED, GREEDY, LOW_NOISE, Measurement
from lvrpo.trainer.sampling import GROUP_SIZE

#: Of the samples of a prompt, in pass@k.
K = GROUP_SIZE


@dataclass(frozen=True)
class Quantity:
    """One number that an arm is judged by.

    Attributes:
        key: of it in results.json.
        title: for people.
        skill: that it is of.
        sampling: of the samples.
        k: of pass@k; 1: the share of right samples.
    """

    key: str
    title: str
    skill: Skill
    sampling: str
    k: int = 1

    def of(self, measurements: Sequence[Measurement], label: str) -> PromptScores | None:
        """Its value by prompt under a label; None where it was not measured."""
        found = [
            each
            for each in measurements
            if (each.label, each.skill, each.sampling) == (label, self.skill, self.sampling)
            and each.group_size >= self.k
        ]
        if not found:
            return None
        most = max(found, key=lambda each: len(each.uids))
        scores = pass_scores(most, self.k) if self.k > 1 else mean_scores(most)
        return scores if scores.values else None


#: The first two are the headlines: no temperature and no noise improves them.
QUANTITIES = (
    Quantity("greedy-answers", "greedy answers", "understand", GREEDY),
    Quantity("low-noise-drawings", "low-noise drawings", "generate", LOW_NOISE),
    Quantity(f"pass-{K}-answers", f"answers, pass@{K}", "understand", AS_TRAINED, K),
    Quantity(f"pass-{K}-drawings", f"drawings, pass@{K}", "generate", AS_TRAINED, K),
    Quantity("answers", "answers as trained", "understand", AS_TRAINED),
    Quantity("drawings", "drawings as trained", "generate", AS_TRAINED),
)


@dataclass(frozen=True)
class Outcome:
    """One quantity of one arm, over the seeds that measured it.

    Attributes:
        quantity: which.
        before: at the end of the warm start.
        after: at the end of the run.
        change: after - before, by pairs of the same prompt.
        over_base: after - that of the base's run of the same seed; None for the base.
    """

    quantity: Quantity
    before: Pooled[Rate]
    after: Pooled[Rate]
    change: Pooled[Change]
    over_base: Pooled[Change] | None


@dataclass(frozen=True)
class Share:
    """A reward's share of the variance of the advantages, mean over the steps with a signal.

    Attributes:
        runs: of each seed.
        interval: 95 %, of the mean over seeds by Student's t; None for one seed.
    """

    runs: tuple[float, ...]
    interval: Interval | None

    @property
    def value(self) -> float:
        """Mean over the seeds."""
        return fmean(self.runs)


@dataclass(frozen=True)
class ArmOutcome:
    """All that an arm's finished runs say.

    Attributes:
        arm: which.
        seeds: that are finished.
        advantage: how its rewards became advantages, `rewards.advantage`.
        outcomes: in the order of `QUANTITIES`; without what was not measured.
        shares: by skill and reward.
    """

    arm: Arm
    seeds: tuple[int, ...]
    advantage: str
    outcomes: tuple[Outcome, ...]
    shares: Mapping[tuple[str, str], Share]


def outcomes_of(runs: Sequence[StudyRun]) -> list[ArmOutcome]:
    """What finished runs say, arm by arm, the base first.

    Args:
        runs: of one study, each finished.

    Raises:
        ValueError: a log is damaged.
    """
    measured = {run: read_measurements(run.directory) for run in runs}
    by_arm: dict[Arm, list[StudyRun]] = {}
    for run in runs:
        by_arm.setdefault(run.arm, []).append(run)
    bases = {run.directory: found for run, found in measured.items() if run.origin is None}
    return [
        ArmOutcome(
            arm,
            tuple(run.seed for run in own),
            load_config(own[0].directory / "config.toml").rewards.advantage,
            _outcomes({run: measured[run] for run in own}, bases),
            shares_of([run.directory for run in own]),
        )
        for arm, own in by_arm.items()
    ]


def shares_of(run_dirs: Sequence[Path]) -> dict[tuple[str, str], Share]:
    """Each reward's share of the advantage variance over runs, by skill and reward."""
    found: defaultdict[tuple[str, str], list[float]] = defaultdict(list)
    for run_dir in run_dirs:
        for key, value in _mean_shares(read_metrics(run_dir)).items():
            found[key].append(value)
    return {key: Share(tuple(values), _interval(values)) for key, values in found.items()}


def _outcomes(
    measured: Mapping[StudyRun, Sequence[Measurement]],
    bases: Mapping[Path, Sequence[Measurement]],
) -> tuple[Outcome, ...]:
    found = []
    for quantity in QUANTITIES:
        changes, over_base = [], []
        for run, measurements in measured.items():
            before, after = (quantity.of(measurements, label) for label in (WARM_START, AFTER))
            if before is None or after is None:
                continue
            changes.append((before, after))
            base = None if run.origin is None else bases.get(run.origin)
            if base is not None and (theirs := quantity.of(base, AFTER)) is not None:
                over_base.append((theirs, after))
        outcome = _outcome(quantity, changes, over_base)
        found += [] if outcome is None else [outcome]
    return tuple(found)


def _outcome(
    quantity: Quantity,
    changes: Sequence[tuple[PromptScores, PromptScores]],
    over_base: Sequence[tuple[PromptScores, PromptScores]],
) -> Outcome | None:
    if not changes:
        return None
    before, after = (pooled_rate(side) for side in zip(*changes, strict=True))
    change = pooled_change(changes)
    if before is None or after is None or change is None:
        return None
    against = pooled_change(over_base) if over_base else None
    return Outcome(quantity, before, after, change, against)


def _mean_shares(rows: Sequence[Row]) -> dict[tuple[str, str], float]:
    """Over the steps of one run; a step whose advantages are all zero has no shares."""
    sums: defaultdict[tuple[str, str], list[float]] = defaultdict(list)
    for row in rows:
        shares: defaultdict[str, dict[str, float]] = defaultdict(dict)
        for key, value in row.items():
            head, _, rest = key.partition("/")
            if head == "share":
                skill, _, reward = rest.partition("/")  # which may be a path
                shares[skill][reward] = value
        for skill, own in shares.items():
            if all(map(isfinite, own.values())) and any(own.values()):
                for reward, value in own.items():
                    sums[skill, reward].append(value)
    return {key: fmean(values) for key, values in sums.items()}


def _interval(values: Sequence[float]) -> Interval | None:
    from statsmodels.stats.weightstats import DescrStatsW

    if len(values) < 2:
        return None
    return Interval(*map(float, DescrStatsW(values).tconfint_mean()))
