"""What `lvrpo eval` does: a run's newest checkpoint on held-out prompts, sampled in any way."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import cast, get_args

from lvrpo.data.example import SKILLS, Skill
from lvrpo.data.jsonl import DataError
from lvrpo.data.sources import Split
from lvrpo.rewards.reward import RewardError
from lvrpo.runs.config_file import read_settings
from lvrpo.runs.evals import kinds_of
from lvrpo.runs.inference import foreign_notes, load_reference, policy_at, read_run
from lvrpo.runs.progress import ProgressView
from lvrpo.runs.results import Rate, best_of, pass_at_k, rate
from lvrpo.runs.setup import FrozenParts, Setup
from lvrpo.trainer.config import ConfigError, TrainConfig
from lvrpo.trainer.evaluate import Planned, held_out, measure_all
from lvrpo.trainer.measurement import Measurement
from lvrpo.trainer.placement import place_frozen
from lvrpo.trainer.sampling import (
    WayOfSampling,
    as_configured,
    as_trained,
    at_temperature,
    by_ode,
    headline,
)
from lvrpo.trainer.task import Rewards, Task

_ASKS: dict[Skill, str] = {"understand": "a question", "generate": "a request to draw"}
_OPTIONS: dict[Skill, str] = {
    "understand": "--temperature and --greedy",
    "generate": "--noise and --ode",
}


@dataclass(frozen=True)
class EvalOptions:
    """What is asked of an evaluation; without a way of sampling, what a run measures of itself.

    Args:
        items: questions and drawing prompts, each.
        seed: of the samples.
        data: a JSONL file instead of the run's own held-out prompts.
        split: "test" or "validation".
        temperatures: of answers.
        greedy: answers at temperature 0.
        ode: drawings without noise on the way, from all of it.
        start_noises: the same, from noise of these standard deviations.
        pass_at: samples of each prompt, for pass@k and the best of k by the reward.
        overrides: "eval.key=value" in place of the run's own [eval].
        device: in place of the run's own `run.device`; None for that.

    Raises:
        ValueError: a value is wrong, or two contradict each other.
    """

    items: int = 1024
    seed: int = 0
    data: Path | None = None
    split: str = "test"
    temperatures: Sequence[float] = ()
    greedy: bool = False
    ode: bool = False
    start_noises: Sequence[float] = ()
    pass_at: int | None = None
    overrides: Sequence[str] = ()
    device: str | None = None

    def __post_init__(self) -> None:
        if self.split not in get_args(Split)[1:]:
            raise ValueError(f"--split is {self.split!r}, expected 'validation' or 'test'")
        if self.data is not None and self.split != "test":
            raise ValueError(f"--data {self.data} has one split, expected no --split {self.split}")
        for value in self.temperatures:
            if value != 0 and not 1e-4 <= value <= 1e4:
                raise ValueError(
                    f"--temperature is {value:g}, expected 0 (greedy) or a number in "
                    "[0.0001, 10000]"
                )
        for value in self.start_noises:
            if not 0 <= value <= 100:
                raise ValueError(f"--noise is {value:g}, expected a number in [0, 100]")
        if self.greedy and self.temperatures:
            raise ValueError(
                "--greedy is --temperature 0, expected one of --greedy and --temperature"
            )
        if self.pass_at is not None:
            if not 2 <= self.pass_at <= 65536:
                raise ValueError(f"--pass-at is {self.pass_at}, expected 2 to 65536")
            named = [*self._temperatures, *self._noises]
            if named and not any(named):
                raise ValueError(
                    f"--pass-at {self.pass_at}: greedy answers, and drawings from --noise 0, are "
                    "all equal, expected another --temperature or --noise beside them"
                )

    @property
    def _temperatures(self) -> list[float]:
        return [0.0] if self.greedy else list(dict.fromkeys(self.temperatures))

    @property
    def _noises(self) -> list[float]:
        return list(dict.fromkeys(self.start_noises)) or [1.0] * self.ode

    def config(self, config: TrainConfig) -> TrainConfig:
        """That of a run with the [eval] that is asked for.

        Raises:
            ConfigError: a key is of another section, is unknown, or has a value it may not have.
        """
        named = read_settings(overrides=self.overrides)
        for section in named.table:
            if section != "eval":
                raise ConfigError(f"--set {section}. is of a run, expected keys of [eval] alone")
        return named.over(config)

    def samplings(self, config: TrainConfig) -> list[WayOfSampling]:
        """The ways that are asked for by name; none where no option names one."""
        group = self.pass_at or 1  # where samples are not all equal
        return [
            *(at_temperature(config, value, group if value else 1) for value in self._temperatures),
            *(by_ode(config, value, group if value else 1) for value in self._noises),
        ]

    def default_samplings(self, config: TrainConfig) -> list[WayOfSampling]:
        """Those of a run's own evaluation."""
        group = self.pass_at or 1
        return [
            way
            for skill in SKILLS
            for way in (
                headline(config, skill),
                as_trained(config, skill, group),
                *as_configured(config, skill, group),
            )
        ]


@dataclass(frozen=True)
class Result:
    """One number of an evaluation, with its 95 % interval.

    Attributes:
        sampling: name of the way of sampling.
        skill: of the prompts.
        measure: "right", "gold", "partial", "truncated", "reward", "reward/<name>", "pass@<k>",
            "best@<k>" and "best@<k>/gold": of the sample that the reward is highest of.
        kind: of the prompts; "" for all.
        value: a share in [0, 1], or a mean reward.
        low: end of the interval; NaN where too few prompts tell.
        high: end of the interval.
        prompts: that it is of.
        samples: that it is of.
    """

    sampling: str
    skill: Skill
    measure: str
    kind: str
    value: float
    low: float
    high: float
    prompts: int
    samples: int

    def line(self) -> str:
        """For a reader."""
        spelled = "{:.4g}" if self.measure.startswith("reward") else "{:.1%}"
        value, low, high = (spelled.format(each) for each in (self.value, self.low, self.high))
        measure = f"{self.measure} ({self.kind})" if self.kind else self.measure
        each = self.samples // self.prompts
        of = f"of {self.prompts}" + (f" x {each}" if each > 1 else "")
        return (
            f"{self.sampling:<16} {self.skill:<10} {measure:<24} {value:>7}  [{low}, {high}]  {of}"
        )


def results_of(measurement: Measurement) -> list[Result]:
    """All that one measurement says: means, right ones by kind, and of groups the best of them."""
    kinds = ("", *kinds_of(measurement))
    found: list[tuple[str, str, Rate | None]] = [
        (name, kind, rate(measurement, name, kind or None))
        for name in measurement.scores
        for kind in (kinds if name == "right" else ("",))
    ]
    k = measurement.group_size
    if k > 1:
        found += [(f"pass@{k}", kind, pass_at_k(measurement, k, kind or None)) for kind in kinds]
        for judge, best in best_of(measurement, k).items():
            found.append((f"best@{k}" + ("" if judge == "right" else f"/{judge}"), "", best))
    return [
        Result(measurement.sampling, measurement.skill, name, kind, **dataclasses.asdict(each))
        for name, kind, each in found
        if each is not None
    ]


def to_json(results: Sequence[Result]) -> str:
    """A list of objects; an end of an interval that too few prompts tell of is null."""
    rows = [
        {
            key: None if isinstance(value, float) and math.isnan(value) else value
            for key, value in dataclasses.asdict(result).items()
        }
        for result in results
    ]
    return json.dumps(rows, indent=1, allow_nan=False)


def evaluate_run(directory: Path, options: EvalOptions) -> tuple[list[Result], list[str]]:
    """Measure the newest checkpoint of a run.

    Args:
        directory: of the run.
        options: what, and how.

    Returns:
        Results, and what a reader of them should know.

    Raises:
        DataError: the data is wrong, or no rule and no answer tells what is right in it.
        ConfigError: there is no such device here.
        ValueError: a way of sampling is named that there is no prompt for.
    """
    setup, parts = read_run(directory, options.device)
    config, task = options.config(setup.config), setup.task(parts, options.data)
    split = cast(Split, options.split)
    prompts = {skill: held_out(task, split, skill, options.items) for skill in SKILLS}
    where = options.data or _source_of(config, split)
    named = options.samplings(config)
    for way in named:
        if not prompts[way.skill]:
            raise ValueError(
                f"{where} has no prompt for {_OPTIONS[way.skill]}, expected {_ASKS[way.skill]}"
            )
    notes = []
    if options.data is not None:
        texts = [
            text
            for examples in prompts.values()
            for example in examples
            for text in (example.prompt, example.answer or "")
        ]
        notes = foreign_notes(parts.family.words, texts, options.data)
    policy = place_frozen(policy_at(directory, setup, parts), config.run)
    rewards = _rewards(directory, setup, parts, task, notes)
    plan = [
        Planned(way, prompts[way.skill], rewards)
        for way in named or options.default_samplings(config)
    ]
    with ProgressView() as view:
        found = measure_all(
            policy,
            task,
            config,
            plan,
            seed=options.seed,
            label="eval",
            step=0,
            progress=partial(view.evaluation, ""),
        )
    results = [result for measurement in found for result in results_of(measurement)]
    if all(result.measure == "truncated" for result in results):
        raise DataError(
            f"{where}: nothing to judge, no example has an answer, a rule or a reward of this run's"
        )
    return results, notes


def _source_of(config: TrainConfig, split: Split) -> str:
    data = config.data
    named = data.validation_source if split == "validation" else data.eval_source
    return named or f"the {split} split"


def _rewards(
    directory: Path, setup: Setup, parts: FrozenParts, task: Task, notes: list[str]
) -> Rewards:
    """The rewards of the run; none, and a note, where they cannot be made."""
    reference = load_reference(directory, setup, parts)
    if reference is None:
        notes.append("the warm start goes on: rewards are not measured yet")
        return {}
    try:
        return task.make_rewards(place_frozen(reference, setup.config.run))
    except RewardError as error:
        notes.append(f"rewards are not measured: {error}")
        return {}
