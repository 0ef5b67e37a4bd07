"""The table of scores that advantages are made from: every reward called, in time, on a copy.

NaN in the table means that there is no score. Weighting and normalising is
`lvrpo.normalize_advantages`.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypeAlias, get_args

import numpy as np
import torch
from torch import Tensor

from lvrpo.data.example import Skill
from lvrpo.rewards._calls import (
    TimeLimitError,
    call_within,
    defined_at,
    finished,
    raised_at,
)
from lvrpo.rewards.reward import FunctionReward, Reward, RewardError, Samples

#: What a text that was cut at the limit of tokens scores, see `score`.
Truncated: TypeAlias = Literal["zero", "keep", "mask"]


def score(
    rewards: Sequence[Reward],
    samples: Samples,
    *,
    truncated: Truncated = "zero",
    timeout: float = 0.0,
    on_failure: Callable[[RewardError], None] | None = None,
) -> Tensor:
    """Every reward of every sample. Each reward is given a copy of the samples of its own.

    Args:
        rewards: K of them.
        samples: B samples.
        truncated: what a text that was cut at the limit of tokens scores: "zero", at most 0 in
            every reward; "keep", what the reward says; "mask", NaN in every reward.
        timeout: seconds each reward may take, all its calls together; 0 for no limit.
        on_failure: None raises. Otherwise a reward that raises, is late or returns another shape is
            called again for each group alone, so that one sample silences its own group at most,
            and whatever fails then is NaN and told to `on_failure`. An infinite score, or a NaN
            that was not declared, is NaN for its sample alone.

    Returns:
        [B, K] fp32 on the CPU, NaN where a reward has no score.

    Raises:
        RewardError: a reward raised, was late, returned something else than one number per sample,
            +-inf, or a NaN it did not declare. It names the reward, the prompt, and the line.
    """
    if not rewards:
        raise ValueError("score: no rewards")
    if truncated not in get_args(Truncated):
        raise ValueError(
            f"score: truncated is {truncated!r}, expected one of {', '.join(get_args(Truncated))}"
        )
    columns = []
    for reward in rewards:
        call = _Calls(reward, samples, timeout, time.monotonic() + timeout, on_failure)
        columns.append(call.column(range(len(samples))))
    table = torch.stack(columns, dim=1)
    cut = samples.truncated[:, None]
    if truncated == "zero":  # a penalty stays one: 0 would be its best
        table = torch.where(cut, table.clamp(max=0.0), table)
    elif truncated == "mask":
        table = table.masked_fill(cut, math.nan)
    return table


class Scoring(Protocol):
    """What is made of cut answers and failing rewards; `[rewards]` of a configuration is one."""

    @property
    def truncated(self) -> Truncated:
        """See `score`."""

    @property
    def max_failures(self) -> float:
        """Share of the samples that a reward may fail at, which have no score of it then."""

    @property
    def timeout(self) -> float:
        """See `score`."""


@dataclass(frozen=True)
class Scores:
    """What B samples of one skill have scored.

    Attributes:
        table: [B, K] fp32, NaN where a reward has no score.
        truncated: [B] bool, the texts that were cut.
        failures: of each reward by label, of which there are none unless some are allowed.
    """

    table: Tensor
    truncated: Tensor
    failures: Mapping[str, Sequence[RewardError]]

    @classmethod
    def concat(cls, parts: Sequence[Scores]) -> Scores:
        """Those of all parts, in order."""
        return cls(
            torch.cat([part.table for part in parts]),
            torch.cat([part.truncated for part in parts]),
            {
                label: [failure for part in parts for failure in part.failures[label]]
                for label in parts[0].failures
            },
        )

    def metrics(self, skill: Skill, scoring: Scoring) -> dict[str, Any]:
        """What is told of cut answers and failing rewards.

        Args:
            skill: of the samples.
            scoring: what the rewards were called with.

        Returns:
            The shares of cut answers, of samples without any score, and of those that each reward
            failed at, with alarms.

        Raises:
            RewardError: a reward failed at more than `max_failures` of the samples.
        """
        metrics: dict[str, Any] = {"alarm": []}
        for name, failures in self.failures.items():
            if scoring.max_failures > 0:
                share = sum(len(failure.samples) for failure in failures) / len(self.table)
                metrics[f"failed/{skill}/{name}"] = share
                if share > scoring.max_failures:
                    raise RewardError(
                        f"{failures[0]}; without a score are {share:.0%} of the samples, more than "
                        f"rewards.max_failures = {scoring.max_failures:g} allows"
                    )
            metrics["alarm"] += dict.fromkeys(f"{failure.kind}: no signal" for failure in failures)
        metrics[f"unscored/{skill}"] = float(self.table.isnan().all(dim=1).float().mean())
        if skill == "understand":
            metrics["truncated/understand"] = float(self.truncated.float().mean())
        return metrics


def score_samples(rewards: Mapping[str, Reward], samples: Samples, scoring: Scoring) -> Scores:
    """The scores of one skill, however many of them failed.

    Args:
        rewards: by label, in the order of the configuration's weights.
        samples: B samples of one skill.
        scoring: see there.

    Raises:
        RewardError: a reward failed, and none may.
    """
    columns = []
    failures: dict[str, list[RewardError]] = {name: [] for name in rewards}
    for name, reward in rewards.items():
        column = score(
            [reward],
            samples,
            truncated=scoring.truncated,
            timeout=scoring.timeout,
            on_failure=failures[name].append if scoring.max_failures > 0 else None,
        )
        columns.append(column)
    return Scores(torch.cat(columns, dim=1), samples.truncated, failures)


@dataclass(frozen=True)
class _Calls:
    """All calls of one reward for one batch."""

    reward: Reward
    samples: Samples
    timeout: float
    deadline: float
    on_failure: Callable[[RewardError], None] | None

    def column(self, rows: range) -> Tensor:
        """[len(rows)] scores."""
        part = self.samples if len(rows) == len(self.samples) else self.samples.take(rows)
        try:
            values, missing = self._call(part, rows)
        except RewardError as error:
            if self.on_failure is None:
                raise
            groups = part.groups()
            if len(groups) > 1 and not self._is_late():
                there = [range(rows.start + g.start, rows.start + g.stop) for g in groups]
                return torch.cat([self.column(group) for group in there])
            self.on_failure(error)
            return torch.full((len(rows),), math.nan)
        infinite = values.isinf()
        undeclared = values.isnan() & ~missing
        self._refuse(values, infinite, "is infinite", "", part, rows)
        if not self.reward.may_be_nan:
            hint = "; set may_be_nan on it, or return None, if that means 'does not apply'"
            self._refuse(values, undeclared, "is NaN", hint, part, rows)
        return values

    @property
    def _code(self) -> Callable[..., Any]:
        return self.reward.function if isinstance(self.reward, FunctionReward) else self.reward

    def _is_late(self) -> bool:
        return bool(self.timeout) and time.monotonic() >= self.deadline

    def _call(self, part: Samples, rows: range) -> tuple[Tensor, Tensor]:
        """[B] fp32 scores of a part, and where a None stood."""
        reward, code = self.reward, self._code
        left = self.deadline - time.monotonic() if self.timeout else None
        try:
            found = call_within(left, lambda: _attempt(reward, part))
        except TimeLimitError:
            why = f"took longer than {self.timeout:g} s (rewards.timeout)"
            raise self._error(f"{why}{_first_prompt(part)}{defined_at(code)}", why, rows) from None
        if isinstance(found, _WrongReturnError):
            why = f"returned {found}, expected one number per sample ({len(part)})"
            raise self._error(f"{why}{defined_at(code)}", why, rows) from found.__cause__
        if isinstance(found, BaseException):
            at = raised_at(found, code)
            why = f"raised {type(found).__name__}"
            message = f"{why}: {found}{_first_prompt(part)}{at}"
            raise self._error(message, f"{why}{at}", rows) from found
        values, missing = found
        if values.shape != (len(part),):
            why = f"returned shape {tuple(values.shape)} for {len(part)} samples"
            message = f"{why}, expected one number each{defined_at(code)}"
            raise self._error(message, "returned another number of scores than samples", rows)
        return values, missing

    def _refuse(
        self, values: Tensor, bad: Tensor, why: str, hint: str, part: Samples, rows: range
    ) -> None:
        if not bool(bad.any()):
            return
        at = [rows.start + i for i in bad.nonzero().flatten().tolist()]
        where = f"{_describe(part, bad, rows.start)}{hint}{defined_at(self._code)}"
        error = self._error(f"{why} for {where}", why, at)
        if self.on_failure is None:
            raise error
        self.on_failure(error)
        values[bad] = math.nan

    def _error(self, message: str, kind: str, rows: Sequence[int]) -> RewardError:
        name = f"reward {self.reward.name!r}"
        return RewardError(f"{name} {message}", kind=f"{name} {kind}", samples=rows)


class _WrongReturnError(Exception):
    """Not numbers; the message says what it is instead."""


def _attempt(reward: Reward, samples: Samples) -> tuple[Tensor, Tensor] | Exception | SystemExit:
    """What a reward returned as a tensor, and where a None stood, or what it raised.

    Returned, so that what a signal raises while it is waited for is not taken for the reward's.
    """
    try:
        # What it returns may be a generator, whose code runs when it is read.
        return _as_tensor(finished(reward(copy.deepcopy(samples))))
    except (Exception, SystemExit) as error:
        return error


def _as_tensor(values: Any) -> tuple[Tensor, Tensor]:
    """Any shape of fp32 numbers of its own memory, and where a None stood."""
    if isinstance(values, Tensor):
        if values.is_complex():
            raise _WrongReturnError(f"a tensor of {values.dtype}")
        table = values.detach().to("cpu", torch.float32, copy=True)
        return table, torch.zeros_like(table, dtype=torch.bool)
    if hasattr(values, "__array__"):
        array = np.asarray(values)
        if array.dtype.kind in "biuf":
            table = torch.from_numpy(array.astype(np.float32))
            return table, torch.zeros_like(table, dtype=torch.bool)
        values = array.tolist()
    if isinstance(values, (str, bytes, Mapping, Set)) or not isinstance(values, Iterable):
        raise _WrongReturnError(_said(values))
    numbers: list[float] = []
    missing: list[bool] = []
    for i, value in enumerate(values):
        missing.append(value is None)
        try:
            if isinstance(value, (str, bytes)):  # float() would read "0.5"
                raise TypeError(f"{value!r} is no number")
            numbers.append(math.nan if value is None else float(value))
        except (TypeError, ValueError, OverflowError) as error:
            raise _WrongReturnError(f"{_said(value)} for sample {i}") from error
    return torch.tensor(numbers, dtype=torch.float32), torch.tensor(missing, dtype=torch.bool)


def _said(value: Any) -> str:
    if value is None:
        return "None"
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 40 else text[:40] + '...'}"


def _first_prompt(samples: Samples) -> str:
    if not len(samples):
        return ""
    first = samples.examples[0]
    return f", first prompt {first.uid!r} ({first.prompt!r})"


def _describe(samples: Samples, bad: Tensor, first: int) -> str:
    at = int(bad.nonzero()[0])
    example, text = samples.examples[at], samples.texts[at]
    sampled = "a drawing" if text is None else f"the text {text!r}"
    more = int(bad.sum()) - 1
    others = f" and {more} more samples" if more else ""
    return f"sample {first + at} ({sampled}) of prompt {example.uid!r} ({example.prompt!r}){others}"
