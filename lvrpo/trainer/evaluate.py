"""Held-out measurement: what ways of sampling give on prompts that were not trained on."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from lvrpo.data.example import SKILLS, Example, Skill, cluster_of
from lvrpo.data.sources import Split
from lvrpo.models.protocol import Policy
from lvrpo.rewards.reward import Reward, Samples
from lvrpo.rewards.score import score_samples
from lvrpo.trainer.config import TrainConfig
from lvrpo.trainer.journal import GalleryItem
from lvrpo.trainer.measurement import AS_TRAINED, Measurement
from lvrpo.trainer.ranks import ALONE, Ranks
from lvrpo.trainer.sampling import WayOfSampling, as_configured, as_trained, frontier, headline
from lvrpo.trainer.shown import gallery_item
from lvrpo.trainer.task import Rewards, Task

#: Samples drawn at once; bounds the memory, changes no number.
CHUNK = 256
#: Evaluation samples come from streams of their own, the same before and after training.
EVALUATION_STEP = -1
#: Prompts of each skill that are shown.
GALLERY_ITEMS = 6


class Planned(NamedTuple):
    """A measurement to make."""

    sampling: WayOfSampling
    prompts: Sequence[Example]  # of its skill
    rewards: Rewards  # to measure too; may be empty


def evaluate(
    policy: Policy,
    task: Task,
    rewards: Rewards,
    config: TrainConfig,
    *,
    label: str,
    step: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
    ranks: Ranks = ALONE,
) -> tuple[list[Measurement], list[GalleryItem]]:
    """What a run measures at both ends of its policy phase.

    `run.eval_items` prompts of each skill are sampled once as trained, once by the policy's mode
    and, where [eval] has a way of its own, once so; `run.frontier_items` of them eight times by
    every sampling of the frontier.

    Args:
        policy: what is measured.
        task: gives the prompts and judges the samples.
        rewards: to measure where is sampled as trained; may be empty.
        config: in force.
        label: of the evaluation.
        step: after which it is made.
        progress: told how many samples there are, and of how many.
        ranks: that share the prompts.

    Returns:
        The measurements, and the first prompts as the policy's mode answers them.

    Raises:
        DivergedError: what the policy sampled is not finite.
        RewardError: as in training.
    """
    run = config.run
    plan: list[Planned] = []
    gallery: list[GalleryItem] = []
    for skill in (skill for skill in SKILLS if skill in policy.skills):
        prompts = held_out(task, "test", skill, max(run.eval_items, run.frontier_items))
        mode = headline(config, skill)
        ways = [(as_trained(config, skill), run.eval_items), (mode, run.eval_items)]
        ways += [(each, run.eval_items) for each in as_configured(config, skill)]
        ways += [(each, run.frontier_items) for each in frontier(config, skill)]
        for sampling, count in ways:
            # The rewards are those of training, and some of them cost as much as the sampling.
            its = rewards if sampling.name == AS_TRAINED else {}
            plan.append(Planned(sampling, prompts[:count], its))
        shown = partial(_gallery, policy, task, config, mode, prompts[:GALLERY_ITEMS])
        gallery += ranks.first(shown)
    key = {"seed": run.seed, "step": step}
    found = measure_all(
        policy, task, config, plan, label=label, progress=progress, ranks=ranks, **key
    )
    return found, gallery


def held_out(task: Task, split: Split, skill: Skill, count: int) -> list[Example]:
    """The prompts that are measured with, the same for every seed, before and after."""
    return task.source.examples(split, skill, count, 0)


def measure_all(
    policy: Policy,
    task: Task,
    config: TrainConfig,
    plan: Sequence[Planned],
    *,
    seed: int,
    label: str,
    step: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
    ranks: Ranks = ALONE,
) -> list[Measurement]:
    """One measurement of each part of a plan that has prompts; see `measure`.

    Args:
        policy: what is measured.
        task: judges the samples.
        config: in force.
        plan: what to measure.
        seed: of the samples.
        label: of the measurements.
        step: after which they are made.
        progress: told how many samples there are, and of how many.
        ranks: that share the prompts.
    """
    plan = [part for part in plan if part.prompts]
    sizes = [part.sampling.group_size * len(part.prompts) for part in plan]

    def tell(before: int, done: int) -> None:
        progress(before + done, sum(sizes))

    return [
        measure(
            policy,
            task,
            config,
            part,
            seed=seed,
            label=label,
            step=step,
            progress=partial(tell, sum(sizes[:number])),
            ranks=ranks,
        )
        for number, part in enumerate(plan)
    ]


def measure(
    policy: Policy,
    task: Task,
    config: TrainConfig,
    planned: Planned,
    *,
    seed: int,
    label: str,
    step: int,
    progress: Callable[[int], None] = lambda done: None,
    ranks: Ranks = ALONE,
) -> Measurement:
    """What one way of sampling gives.

    Args:
        policy: what is measured.
        task: judges the samples.
        config: in force: how is cut, scored and weighted.
        planned: with one prompt at least.
        seed: of the samples.
        label: of the measurement.
        step: after which it is made.
        progress: told how many of the samples there are.
        ranks: that share the prompts; every one gets the measurement of all.

    Raises:
        DivergedError: what the policy sampled is not finite.
        RewardError: as in training.
    """
    sampling, prompts, _ = planned
    group = sampling.group_size
    at_once = ranks.size * max(1, CHUNK // group)
    scores: dict[str, list[float | None]] = {}
    diversity: list[float] = []
    for start in range(0, len(prompts), at_once):
        some = prompts[start : start + at_once]
        # Every rank-th one: a prompt of held-out data is there once.
        mine = some[ranks.rank :: ranks.size]
        own = ranks.apart(partial(_chunk, policy, task, config, planned, mine, seed))
        parts = ranks.gather(own)
        for i in range(len(some)):
            of_rank, place = parts[i % ranks.size], i // ranks.size
            samples = slice(place * group, (place + 1) * group)
            before = (start + i) * group
            for name in {**scores, **of_rank.scores}:
                column = scores.setdefault(name, [None] * before)
                column += of_rank.scores.get(name, [])[samples] or [None] * group
            diversity += of_rank.diversity[place : place + 1]
        progress((start + len(some)) * group)
    told = {
        name: column
        for name, column in scores.items()
        if name == "right" or any(score is not None for score in column)
    }
    return Measurement(
        step=step,
        label=label,
        skill=sampling.skill,
        sampling=sampling.name,
        settings=sampling.settings,
        group_size=group,
        uids=[example.uid for example in prompts],
        clusters=[cluster_of(example) for example in prompts],
        kinds=[example.kind for example in prompts],
        scores=told,
        diversity=diversity,
    )


class _Chunk(NamedTuple):
    """What some prompts gave, by sample and by prompt."""

    scores: dict[str, list[float | None]]
    diversity: list[float]


def _chunk(
    policy: Policy,
    task: Task,
    config: TrainConfig,
    planned: Planned,
    prompts: Sequence[Example],
    seed: int,
) -> _Chunk:
    if not prompts:
        return _Chunk({}, [])
    sampling = planned.sampling
    samples = sampling.draw(policy, prompts, seed=seed, step=EVALUATION_STEP)
    columns = {
        **task.checks.scores(samples),
        **_reward_scores(planned.rewards.get(sampling.skill, {}), samples, config),
    }
    if sampling.skill == "understand":
        columns["truncated"] = samples.truncated.float()
    scores = {
        name: [None if math.isnan(score) else score for score in column.tolist()]
        for name, column in columns.items()
    }
    group = sampling.group_size
    return _Chunk(scores, _diversity(samples, group) if group > 1 else [])


def _reward_scores(
    rewards: Mapping[str, Reward], samples: Samples, config: TrainConfig
) -> dict[str, Tensor]:
    """Every reward, and their weighted sum, NaN for a sample that none has a score for."""
    if not rewards:
        return {}
    skill = samples.examples[0].task
    # No larger batches than in training: a reward's time limit is for those.
    size = config.rollout.group_size * getattr(config.rollout, f"{skill}_prompts")
    parts = [
        score_samples(
            rewards, samples.take(range(start, min(start + size, len(samples)))), config.rewards
        )
        for start in range(0, len(samples), size)
    ]
    for part in parts:
        part.metrics(skill, config.rewards)  # too many that failed
    table = torch.cat([part.table for part in parts])
    weights = torch.tensor([*getattr(config.rewards, skill).values()])
    total = (table * weights).nansum(dim=1).masked_fill(table.isnan().all(dim=1), math.nan)
    columns = {f"reward/{name}": table[:, k] for k, name in enumerate(rewards)}
    return columns | {"reward": total}


def _diversity(samples: Samples, group: int) -> list[float]:
    """Of every group of samples, see `Measurement`."""
    if samples.images is not None:
        drawn = samples.images.flatten(1).split(group)
        return [float(torch.pdist(pictures).square().mean().sqrt()) for pictures in drawn]
    pairs = group * (group - 1)
    counts = [Counter(samples.texts[i : i + group]) for i in range(0, len(samples), group)]
    return [1 - sum(n * (n - 1) for n in each.values()) / pairs for each in counts]


def _gallery(
    policy: Policy,
    task: Task,
    config: TrainConfig,
    sampling: WayOfSampling,
    prompts: Sequence[Example],
) -> list[GalleryItem]:
    if not prompts:
        return []
    seed = config.run.seed
    samples = sampling.draw(policy, prompts, seed=seed, step=EVALUATION_STEP)
    return [
        gallery_item(samples, i, seed, right=None if math.isnan(right) else bool(right))
        for i, right in enumerate(task.checks.scores(samples)["right"].tolist())
    ]
