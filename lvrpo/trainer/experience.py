"""Rollout, rewards, advantages: everything of a step before the gradient."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias, TypeVar

import torch
from torch import Tensor

from lvrpo import random
from lvrpo.data.example import Example, Skill
from lvrpo.models.flow import FlowSchedule
from lvrpo.models.protocol import Answers, Pictures, Policy
from lvrpo.ops.normalize_advantages import normalize_advantages
from lvrpo.params.advantages import AdvantageParams
from lvrpo.rewards.registry import reward_label
from lvrpo.rewards.reward import Reward, Samples
from lvrpo.rewards.score import Scores, score_samples
from lvrpo.trainer.config import TrainConfig
from lvrpo.trainer.correction import correct_sampler, truncation_metrics
from lvrpo.trainer.curriculum import Curriculum
from lvrpo.trainer.journal import GalleryItem
from lvrpo.trainer.ranks import ALONE, Ranks
from lvrpo.trainer.resampling import Groups, resample
from lvrpo.trainer.sampling import answer_sampling
from lvrpo.trainer.schedule import flow_guidance
from lvrpo.trainer.sharing import SharedPictures, gather_answers, of_rank, places
from lvrpo.trainer.shown import training_samples
from lvrpo.trainer.task import (
    Checks,
    Rewards,
    Task,
    further_examples,
    mean_scores,
    training_examples,
)

T = TypeVar("T")
Sampled: TypeAlias = Answers | Pictures | SharedPictures


@dataclass(frozen=True)
class Experience:
    """One rollout with its advantages, on the policy's device: what an update learns from."""

    answers: Answers | None
    answer_advantages: Tensor | None  # [P_text * G]
    pictures: Pictures | SharedPictures | None  # of several ranks, each has its own
    picture_advantages: Tensor | None  # [P_image * G]
    token_weights: Tensor | None = None  # [T] factors of the policy term of the answers' tokens
    shown: Sequence[GalleryItem] = ()  # some samples with their scores, for a reader


def gather_experience(
    policy: Policy,
    task: Task,
    rewards: Rewards,
    config: TrainConfig,
    schedule: FlowSchedule,
    step: int,
    ranks: Ranks = ALONE,
) -> tuple[Experience, dict[str, Any]]:
    """Sample the groups of one step and score them.

    Ranks sample and score groups of their own, and know all answers and scores afterwards.

    Args:
        policy: that samples.
        task: its prompts and checks.
        rewards: of the skills that are trained.
        config: in force.
        schedule: of the denoising.
        step: number of this step; with the run's seed it fixes every draw.
        ranks: that share the groups.

    Returns:
        The experience, and metrics: rewards, each reward's share of the advantage variance, the
        fraction of constant groups, times, and "alarm", a list of sentences.

    Raises:
        DivergedError: what the policy sampled is not finite; no reward has seen it.
        RewardError: see `score_samples`.
    """
    rollout, seed = config.rollout, config.run.seed
    metrics: dict[str, Any] = {"alarm": []}
    clock = _Clock()
    answers: Answers | None = None
    pictures: Pictures | SharedPictures | None = None
    sampler = _Sampler(policy, config, schedule, step, ranks)
    if rollout.understand_prompts:
        answers = sampler.texts(_prompts(task, "understand", config, step, ranks))
    if rollout.generate_prompts:
        pictures = sampler.images(_prompts(task, "generate", config, step, ranks))
    metrics["time/rollout"] = clock.lap()

    tables: dict[Skill, Tensor] = {}
    shown: list[GalleryItem] = []
    sampled: dict[Skill, Sampled | None] = {"understand": answers, "generate": pictures}
    for skill, groups in sampled.items():
        if groups is not None:
            scores, found = _score(groups, rewards[skill], task.checks, config, ranks)
            tables[skill] = scores.table
            _merge(metrics, scores.metrics(skill, config.rewards) | mean_scores(found, skill))
            shown += _shown(groups, scores.table, config, ranks)
    metrics["time/rewards"] = clock.lap()

    if rollout.resample_rounds:
        more = _Resampling(task, rewards, config, step, metrics, ranks)
        if answers is not None:
            answers, tables["understand"] = more.of(answers, tables["understand"], sampler.texts)
        if pictures is not None:
            pictures, tables["generate"] = more.of(pictures, tables["generate"], sampler.images)
        metrics["time/resampling"] = clock.lap()

    advantages: dict[Skill, Tensor] = {}
    for skill, table in tables.items():
        if config.run.shuffle_rewards:
            table = shuffle_within_groups(table, rollout.group_size, seed, step, skill)
        # A drawing is as long as any other.
        lengths = [1] * len(table)
        if skill == "understand" and answers is not None:
            lengths = [len(ids) for ids in answers.token_ids]
        advantages[skill], reported = _advantages(table, lengths, skill, config)
        _merge(metrics, reported)
    if answers is not None and config.rewards.truncated == "mask":
        kept = torch.tensor([reason != "length" for reason in answers.finish_reasons])
        advantages["understand"] = advantages["understand"][kept]
        answers = answers.where(kept)
    moved = {skill: values.to(policy.device) for skill, values in advantages.items()}
    metrics["time/advantages"] = clock.lap()
    weights = None
    if answers is not None:
        metrics |= truncation_metrics(answers)
        answers, weights, reported = correct_sampler(policy, answers, config, ranks)
        metrics |= reported
    experience = Experience(
        answers, moved.get("understand"), pictures, moved.get("generate"), weights, shown
    )
    return experience, metrics


def _prompts(
    task: Task, skill: Skill, config: TrainConfig, step: int, ranks: Ranks
) -> list[Example]:
    count, hook = getattr(config.rollout, f"{skill}_prompts"), task.curriculum
    drawn = count * (hook.pool if hook else 1)
    examples = training_examples(task.source, skill, drawn, config.run.seed, step)
    return _pick(hook, examples, count, step - config.warm_start.steps, ranks)


def _pick(
    hook: Curriculum | None, examples: list[Example], count: int, step: int, ranks: Ranks
) -> list[Example]:
    """What the hook chooses on the first rank: a user's code may draw at random."""
    if hook is None or not examples:
        return examples
    numbers = {id(example): i for i, example in enumerate(examples)}
    chosen = ranks.first(lambda: [numbers[id(e)] for e in hook.pick(examples, count, step)])
    return [examples[i] for i in chosen]


@dataclass(frozen=True)
class _Sampler:
    """Samples groups of one step, each on the rank that it is dealt to."""

    policy: Policy
    config: TrainConfig
    schedule: FlowSchedule
    step: int
    ranks: Ranks

    def texts(self, examples: list[Example]) -> Answers:
        """Answers of all ranks."""
        rollout = self.config.rollout

        def sample(some: list[Example]) -> Answers:
            sampling = answer_sampling(rollout)
            return self.policy.sample_texts(
                some, rollout.group_size, sampling=sampling, **self._key()
            )

        if self.ranks.size == 1:
            return sample(examples)
        owners, own = self._sample(examples, sample)
        return gather_answers(own, examples, owners, self.ranks, self.policy.device)

    def images(self, examples: list[Example]) -> Pictures | SharedPictures:
        """Pictures, which stay where they are drawn."""
        rollout = self.config.rollout

        def sample(some: list[Example]) -> Pictures:
            return self.policy.sample_images(
                some,
                rollout.group_size,
                self.schedule,
                guidance=flow_guidance(rollout),
                **self._key(),
            )

        if self.ranks.size == 1:
            return sample(examples)
        owners, own = self._sample(examples, sample)
        return SharedPictures.of(own, examples, owners, self.ranks, self.policy.device)

    def _sample(
        self, examples: list[Example], sample: Callable[[list[Example]], T]
    ) -> tuple[list[int], T | None]:
        owners = self.ranks.deal(examples)
        mine = of_rank(examples, owners, self.ranks.rank)
        return owners, self.ranks.apart(lambda: sample(mine) if mine else None)

    def _key(self) -> dict[str, int]:
        return {"seed": self.config.run.seed, "step": self.step}


def _score(
    groups: Sampled,
    rewards: Mapping[str, Reward],
    checks: Checks | None,
    config: TrainConfig,
    ranks: Ranks,
) -> tuple[Scores, Mapping[str, Tensor]]:
    """Scores by rewards and by checks of all samples; each rank asks for those of its own."""
    owners = groups.owners if isinstance(groups, SharedPictures) else ranks.deal(groups.examples)
    own = _own_samples(groups, owners, ranks)

    def ask() -> tuple[Scores, Mapping[str, Tensor]] | None:
        if own is None:
            return None
        scores = score_samples(rewards, own, config.rewards)
        return scores, {} if checks is None else checks.scores(own)

    found = [part for part in ranks.gather(ranks.apart(ask)) if part is not None]
    if ranks.size == 1:
        return found[0]
    scores = Scores.concat([each for each, _ in found])
    rows = torch.tensor(places(owners))[:, None] * groups.group_size
    order = (rows + torch.arange(groups.group_size)).flatten()
    names = dict.fromkeys(name for _, columns in found for name in columns)
    columns = {
        name: torch.cat(
            [of.get(name, torch.full((len(each.table),), torch.nan)) for each, of in found]
        )[order]
        for name in names
    }
    table, truncated = scores.table[order], scores.truncated[order]
    return dataclasses.replace(scores, table=table, truncated=truncated), columns


def _own_samples(groups: Sampled, owners: list[int], ranks: Ranks) -> Samples | None:
    if isinstance(groups, SharedPictures):
        groups = groups.own
    elif ranks.size > 1:
        groups = groups.take(of_rank(range(len(owners)), owners, ranks.rank))
    return _samples_of(groups) if groups.examples else None


def _shown(groups: Sampled, table: Tensor, config: TrainConfig, ranks: Ranks) -> list[GalleryItem]:
    """Some of the samples that this rank has."""
    owners = groups.owners if isinstance(groups, SharedPictures) else ranks.deal(groups.examples)
    own, size = _own_samples(groups, owners, ranks), groups.group_size
    if own is None:
        return []
    mine = torch.tensor(of_rank(range(len(owners)), owners, ranks.rank))
    rows = (mine[:, None] * size + torch.arange(size)).flatten()
    weights = getattr(config.rewards, own.examples[0].task)
    return training_samples(own, table[rows], weights, config.run.seed)


@dataclass(frozen=True)
class _Resampling:
    """Other prompts for groups without a signal, see `resample`."""

    task: Task
    rewards: Rewards
    config: TrainConfig
    step: int
    metrics: dict[str, Any]
    ranks: Ranks

    def of(
        self, groups: Groups, table: Tensor, sample: Callable[[list[Example]], Groups]
    ) -> tuple[Groups, Tensor]:
        """The groups of one skill that are learned from, and their scores."""
        skill, config = groups.examples[0].task, self.config

        def draw(turn: int, count: int, seen: set[str]) -> Groups | None:
            key = {"seed": config.run.seed, "step": self.step, "turn": turn}
            hook = self.task.curriculum
            drawn = count * (hook.pool if hook else 1)
            examples = further_examples(self.task.source, skill, drawn, seen, **key)
            step = self.step - config.warm_start.steps
            examples = _pick(hook, examples, count, step, self.ranks)
            return sample(examples) if examples else None

        def rate(more: Groups) -> Tensor:
            assert isinstance(more, Answers | Pictures | SharedPictures)
            scores, _ = _score(more, self.rewards[skill], None, config, self.ranks)
            self.metrics["alarm"] += scores.metrics(skill, config.rewards)["alarm"]
            return scores.table

        chosen, scores, found = resample(
            groups,
            table,
            weights=list(getattr(config.rewards, skill).values()),
            rounds=config.rollout.resample_rounds,
            draw=draw,
            rate=rate,
        )
        self.metrics.update({f"resampling/{name}/{skill}": value for name, value in found.items()})
        return chosen, scores


def _samples_of(groups: Answers | Pictures) -> Samples:
    examples = _repeat(groups.examples, groups.group_size)
    if isinstance(groups, Pictures):
        return Samples.of_images(examples, groups.images)
    return Samples.of_texts(examples, groups.texts, groups.finish_reasons)


def _merge(metrics: dict[str, Any], found: dict[str, Any]) -> None:
    alarms = [*metrics["alarm"], *found.get("alarm", ())]
    metrics |= found
    metrics["alarm"] = alarms


def _advantages(
    rewards: Tensor, lengths: list[int], skill: Skill, config: TrainConfig
) -> tuple[Tensor, dict[str, Any]]:
    weights = getattr(config.rewards, skill)
    result = normalize_advantages(
        rewards,
        config.rollout.group_size,
        weights=list(weights.values()),
        lengths=lengths,
        params=AdvantageParams.preset(config.rewards.advantage, clip=config.loss.advantage_clip),
        backend=config.run.backend or None,
    )
    stats = result.stats
    metrics: dict[str, Any] = {"alarm": []}
    for k, name in enumerate(map(reward_label, weights)):
        metrics[f"reward/{skill}/{name}"] = float(stats.mean[k])
        metrics[f"share/{skill}/{name}"] = float(stats.share[k])
        metrics[f"constant_groups/{skill}/{name}"] = float(stats.constant_groups[k])
    zero = result.values.view(-1, config.rollout.group_size).eq(0).all(dim=1)
    metrics[f"constant_groups/{skill}"] = float(zero.float().mean())
    if bool(stats.all_zero):
        metrics["alarm"].append(f"every {skill} advantage is zero: this step teaches nothing")
    return result.values, metrics


def shuffle_within_groups(
    rewards: Tensor, group_size: int, seed: int, step: int, skill: str
) -> Tensor:
    """The control experiment: each sample gets the rewards of a random sample of its group.

    Args:
        rewards: [P * G, K].
        group_size: G.
        seed: of the run; with `step` and `skill` it fixes the permutation.
        step: see `seed`.
        skill: see `seed`.
    """
    groups = rewards.view(-1, group_size, rewards.shape[1])
    keys = random.stream(seed, "shuffle", step, skill).random(groups.shape[:2])
    order = torch.from_numpy(keys.argsort(axis=1))
    return groups.gather(1, order[:, :, None].expand_as(groups)).reshape(rewards.shape)


def _repeat(examples: list[Example], times: int) -> list[Example]:
    return [example for example in examples for _ in range(times)]


class _Clock:
    def __init__(self) -> None:
        self.last = time.perf_counter()

    def lap(self) -> float:
        now = time.perf_counter()
        elapsed, self.last = now - self.last, now
        return elapsed
