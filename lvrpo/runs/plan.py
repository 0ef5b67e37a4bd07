"""What `lvrpo plan` counts: the model of a configuration, and the rows of one of its steps."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lvrpo.data.example import SKILLS, Example, Skill
from lvrpo.models.packs import Layout, PictureGroup, TextGroup, guided_by_image, pack_groups
from lvrpo.planning.forecast import Plan, Sampled, Work
from lvrpo.planning.memory import Numerics
from lvrpo.planning.rows import Rows
from lvrpo.runs.setup import Setup
from lvrpo.trainer.config import ConfigError, RolloutSection, TrainConfig
from lvrpo.trainer.evaluate import CHUNK
from lvrpo.trainer.objective import Objective
from lvrpo.trainer.schedule import flow_guidance, flow_schedule
from lvrpo.trainer.task import training_examples, warm_start_examples


@dataclass(frozen=True)
class RunPlan:
    """The first rank's part of a run.

    Attributes:
        plan: its model, and how it is computed.
        work: of a policy step.
        evaluated: what an evaluation samples at once.
        warm_start: rows of the one buffer of a supervised step; none where there is no such step.
        notes: lines worth reading.
    """

    plan: Plan
    work: Work
    evaluated: Work
    warm_start: Rows
    notes: Sequence[str] = ()

    def to_dict(self, rate: float = 0.0, bandwidth: float = 0.0) -> dict[str, Any]:
        """Everything as names and numbers, bytes and operations where nothing else is said.

        Args:
            rate: operations a second of a rank; 0: no seconds are told.
            bandwidth: bytes a second that a rank receives; 0: likewise.
        """
        plan, found = self.plan, self.plan.to_dict(self.work)
        peaks = {"warm start": plan.peak_of_warm_start(self.warm_start), **found["peak"]}
        peaks["evaluation"] = plan.peak_of_rollout(self.evaluated)
        found["peak"] = {name: size for name, size in peaks.items() if size}
        if rate and bandwidth:
            found["seconds"] = plan.seconds(self.work, rate, bandwidth)
        return found | {"notes": list(self.notes)}


def plan_run(
    config: TrainConfig, numerics: Numerics, *, ranks: int = 1, on_gpu: bool = False
) -> RunPlan:
    """Lay out one step of a run without a weight in memory.

    Prompts are those of the first policy step, and answers as long as they may be. The groups of a
    step are shared by all ranks as evenly as they go, and the plan is that of the first.

    Args:
        config: of the run.
        numerics: how its model is to be computed.
        ranks: that share the parameters, and the groups of a step.
        on_gpu: whether chunks of logits are as large as on a GPU.

    Raises:
        ConfigError: there are fewer groups than ranks.
        DataError: a line or picture of a JSONL file is wrong.
    """
    setup = Setup(config)
    parts = setup.unfitted_parts()
    with torch.device("meta"):
        policy = setup.new_policy(parts)
    plan = Plan(
        setup.transformer(parts),
        setup.family.parameters(policy),
        numerics,
        ranks,
        on_gpu=on_gpu,
    )
    source, seed = setup.data.source, config.run.seed
    prompts: dict[Skill, list[Example]] = {}
    for skill in SKILLS:
        count = getattr(config.rollout, f"{skill}_prompts")
        if 0 < count < ranks:
            raise ConfigError(
                f"rollout.{skill}_prompts is {count}, expected at least {ranks}, a group for "
                "every rank"
            )
        step = config.warm_start.steps + 1
        prompts[skill] = training_examples(source, skill, -(-count // ranks), seed, step)
    warm_start = Rows()
    if config.warm_start.steps:
        questions, drawings = warm_start_examples(source, config.warm_start, seed, 1)
        answers = [(each, [policy.answer_ids(each.answer or "")]) for each in questions]
        labelled = [(group[0], len(group)) for group in drawings]
        warm_start = sum(_buffers(policy, answers, labelled), Rows())
    items = min(CHUNK, config.run.eval_items)
    held_out = [source.examples("test", skill, items, 0) for skill in SKILLS]
    evaluated = sampling_of(policy, config.rollout, *held_out, group=1)
    work = step_of(policy, config, prompts["understand"], prompts["generate"])
    return RunPlan(plan, work, evaluated, warm_start, setup.family.uncounted)


def step_of(
    layout: Layout, config: TrainConfig, questions: Sequence[Example], drawings: Sequence[Example]
) -> Work:
    """What a policy step does with these prompts.

    Args:
        layout: of the model family.
        config: of the run.
        questions: prompts of answers.
        drawings: prompts of pictures.
    """
    rollout, optimizer = config.rollout, config.optimizer
    objective = Objective.from_config(config)
    sampled = sampling_of(layout, rollout, questions, drawings, group=rollout.group_size)
    answer = [0] * rollout.max_answer_tokens
    texts = [(example, [answer] * rollout.group_size) for example in questions]
    noisy = rollout.group_size * sampled.trained
    pictures = [(example, noisy * _branches(rollout, example)) for example in drawings]
    buffers: list[Rows] = []
    separate = Rows()
    count = optimizer.minibatches
    for part in zip(_dealt(texts, count), _dealt(pictures, count), strict=True):
        buffers += _buffers(layout, *part, optimizer.max_rows)
        alone = _buffers(layout, *part, optimizer.max_rows, share_prompts=False)
        separate = sum(alone, separate)
    return dataclasses.replace(
        sampled,
        buffers=buffers,
        minibatches=count,
        passes=optimizer.updates_per_rollout,
        reference=bool(objective.text.beta or objective.image.beta),
        separate=separate,
    )


def sampling_of(
    layout: Layout,
    rollout: RolloutSection,
    questions: Sequence[Example],
    drawings: Sequence[Example],
    *,
    group: int,
) -> Work:
    """The sampling alone of a step, with so many samples of each prompt."""
    longest = [0] * rollout.max_answer_tokens
    pictures = [(example, group * _branches(rollout, example)) for example in drawings]
    answers = [(example, [[*longest, 0]] * group) for example in questions]
    return Work(
        texts=Sampled(
            # A layout has a row for the last token, too, which predicts nothing.
            sum(_buffers(layout, answers), Rows()),
            _prompts(layout, questions),
            samples=len(questions) * group,
            passes=rollout.max_answer_tokens - 1,
        ),
        pictures=Sampled(
            sum(_buffers(layout, [], pictures), Rows()),
            _prompts(layout, drawings),
            samples=len(drawings) * group,
            passes=rollout.denoise_steps,
        ),
        picture=layout.latent_shape,
        trained=len(flow_schedule(rollout).stochastic_steps),
    )


def _branches(rollout: RolloutSection, example: Example) -> int:
    """How often a drawing is laid out, as if every step were guided: whole, and with less."""
    guidance = flow_guidance(rollout)
    return 1 if guidance is None else 2 + guided_by_image(guidance.params, example)


def _prompts(layout: Layout, examples: Sequence[Example]) -> Rows:
    return sum(_buffers(layout, [(example, [[0]]) for example in examples]), Rows())


def _dealt(groups: Sequence[Any], count: int) -> list[list[Any]]:
    """As many to each minibatch as `lvrpo.trainer.minibatches` deals."""
    return [[groups[i] for i in part] for part in np.array_split(range(len(groups)), count)]


def _buffers(
    layout: Layout,
    texts: Sequence[TextGroup],
    pictures: Sequence[PictureGroup] = (),
    max_rows: int = 1 << 30,
    *,
    share_prompts: bool = True,
) -> list[Rows]:
    """The rows of the packs that these groups fill; what they hold is not looked at."""
    count = sum(number for _, number in pictures)
    nothing = torch.zeros(()).expand
    latents: Tensor | None = nothing(count, *layout.latent_shape) if count else None
    times = nothing(count) if count else None
    packs = pack_groups(
        layout, texts, pictures, latents, times, max_rows, share_prompts=share_prompts
    )
    return [Rows.of_pack(pack) for pack in packs]
