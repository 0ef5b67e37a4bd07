"""Ways of sampling that a policy is measured by: as it is trained, its modes, and between them.

Sharpening alone makes a policy that samples better, and a lower temperature gives that for nothing:
what has been learned shows where both are at their sharpest, and at equal diversity.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

from lvrpo.data.example import Example, Skill
from lvrpo.models.flow import FlowSchedule, Guidance
from lvrpo.models.protocol import Policy
from lvrpo.models.sampling import Sampling
from lvrpo.rewards.reward import Samples
from lvrpo.trainer.config import EvalSection, RolloutSection, TrainConfig
from lvrpo.trainer.measurement import AS_CONFIGURED, AS_TRAINED, GREEDY
from lvrpo.trainer.schedule import flow_guidance, flow_schedule

#: Of the points between greedy answers and those of a flat distribution.
TEMPERATURES = (0.25, 0.5, 0.75, 1.0, 1.5)
#: Options that a section has for the distribution of answers, beside their temperature.
DISTRIBUTION = ("top_k", "top_p", "min_p", "repetition_penalty")
#: Standard deviations of what an ODE begins with, between the one drawing of no noise and all.
START_NOISES = (0.5, 1.0)
#: Samples of a prompt where their diversity, or the best of them, is asked for.
GROUP_SIZE = 8


@dataclass(frozen=True)
class WayOfSampling:
    """One way of sampling answers, or drawings (a schedule, starting noise, guidance).

    Attributes:
        skill: that it is a way of.
        name: see `lvrpo.trainer.measurement.Measurement`.
        group_size: samples of each prompt.
        texts: how answers are sampled; None for drawings.
        schedule: of drawings; None for answers.
        start_noise: standard deviation of what a drawing begins with.
        guidance: of drawings.
    """

    skill: Skill
    name: str
    group_size: int = 1
    texts: Sampling | None = None
    schedule: FlowSchedule | None = None
    start_noise: float = 1.0
    guidance: Guidance | None = None

    @property
    def settings(self) -> dict[str, float | str]:
        """All that sets it apart from other ways of the same run."""
        if self.texts is not None:
            told = {name: getattr(self.texts, name) for name in DISTRIBUTION}
            changed = {name: told[name] for name in self.texts.changes if name in told}
            return {"temperature": self.texts.temperature, **changed}
        assert self.schedule is not None
        told = {"dynamics": self.schedule.dynamics, "start_noise": self.start_noise}
        if self.guidance is not None:
            scales = self.guidance.params
            told["guidance"] = scales.text_scale
            if scales.image_scale != 1:
                told["guidance_image"] = scales.image_scale
        return told

    def draw(self, policy: Policy, prompts: Sequence[Example], *, seed: int, step: int) -> Samples:
        """Sample every prompt `group_size` times, those of a prompt one after the other.

        Args:
            policy: that samples.
            prompts: of this skill.
            seed: of the samples.
            step: keys their streams too.

        Raises:
            DivergedError: what the policy sampled is not finite.
        """
        examples = [example for example in prompts for _ in range(self.group_size)]
        key = {"seed": seed, "step": step}
        if self.texts is not None:
            answers = policy.sample_texts(prompts, self.group_size, sampling=self.texts, **key)
            return Samples.of_texts(examples, answers.texts, answers.finish_reasons)
        assert self.schedule is not None
        pictures = policy.sample_images(
            prompts,
            self.group_size,
            self.schedule,
            start_noise=self.start_noise,
            guidance=self.guidance,
            **key,
        )
        return Samples.of_images(examples, pictures.images)


def plain_sampling(rollout: RolloutSection, temperature: float) -> Sampling:
    """Answers of the policy's own distribution, which end as those of the rollout."""
    return Sampling(
        max_tokens=rollout.max_answer_tokens,
        min_tokens=rollout.min_answer_tokens,
        temperature=temperature,
        stop=tuple(rollout.stop),
        stop_token_ids=tuple(rollout.stop_token_ids),
    )


def answer_sampling(
    rollout: RolloutSection, section: RolloutSection | EvalSection | None = None
) -> Sampling:
    """Answers from the distribution of `section`, which end as those of the rollout.

    Args:
        rollout: ends them.
        section: None: the rollout too.
    """
    section = section or rollout
    return dataclasses.replace(
        plain_sampling(rollout, section.temperature),
        **{name: getattr(section, name) for name in DISTRIBUTION},
    )


def as_trained(config: TrainConfig, skill: Skill, group_size: int = 1) -> WayOfSampling:
    """That of the rollout."""
    rollout = config.rollout
    if skill == "understand":
        return WayOfSampling(skill, AS_TRAINED, group_size, texts=answer_sampling(rollout))
    return WayOfSampling(
        skill,
        AS_TRAINED,
        group_size,
        schedule=flow_schedule(rollout),
        guidance=flow_guidance(rollout),
    )


def at_temperature(config: TrainConfig, temperature: float, group_size: int = 1) -> WayOfSampling:
    """Answers of the policy's own distribution at a temperature; of 0, the greedy ones."""
    texts = plain_sampling(config.rollout, temperature)
    name = f"temperature {temperature:g}" if temperature else GREEDY
    return WayOfSampling("understand", name, group_size, texts=texts)


def as_configured(config: TrainConfig, skill: Skill, group_size: int = 1) -> list[WayOfSampling]:
    """That of [eval], where it has one: answers of its temperature, guided drawings by an ODE."""
    section = config.eval
    if skill == "understand":
        if not section.temperature:
            return []
        texts = answer_sampling(config.rollout, section)
        return [WayOfSampling(skill, AS_CONFIGURED, group_size, texts=texts)]
    guidance = flow_guidance(section)
    if guidance is None:
        return []
    way = by_ode(config, 1.0, group_size)
    return [dataclasses.replace(way, name=AS_CONFIGURED, guidance=guidance)]


def by_ode(config: TrainConfig, start_noise: float, group_size: int = 1) -> WayOfSampling:
    """Drawings by the rollout's steps without their noise, begun with as much as is said."""
    schedule = dataclasses.replace(flow_schedule(config.rollout), dynamics="ode")
    name = "ode" if start_noise == 1 else f"ode noise {start_noise:g}"
    return WayOfSampling(
        "generate",
        name,
        group_size,
        schedule=schedule,
        start_noise=start_noise,
        guidance=flow_guidance(config.rollout),
    )


def headline(config: TrainConfig, skill: Skill) -> WayOfSampling:
    """The mode of the policy: greedy answers, the one drawing of no noise."""
    return at_temperature(config, 0.0) if skill == "understand" else by_ode(config, 0.0)


def frontier(config: TrainConfig, skill: Skill) -> list[WayOfSampling]:
    """From sharp to diverse, `GROUP_SIZE` samples of a prompt; `headline` is the end of it."""
    trained = as_trained(config, skill, GROUP_SIZE)
    if skill == "understand":
        assert trained.texts is not None
        others = [
            way
            for way in (at_temperature(config, t, GROUP_SIZE) for t in TEMPERATURES)
            if way.texts != trained.texts
        ]
    else:
        others = [by_ode(config, noise, GROUP_SIZE) for noise in START_NOISES]
    return [*others, trained]
