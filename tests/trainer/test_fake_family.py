"""A model family is one object: another one trains by the same loop, without a line of its own."""

from __future__ import annotations

import dataclasses
from statistics import fmean

import numpy as np
import pytest
import torch
from trainer.fake_family import LinearPolicy
from trainer.memory_journal import MemoryJournal
from trainer.small_policy import OBJECTIVE, SCHEDULE, TEMPERATURE, prompts

from lvrpo import random
from lvrpo.data.example import Example, Skill
from lvrpo.data.sources import LabelErrors
from lvrpo.models.answering import answer_probability
from lvrpo.models.protocol import Policy
from lvrpo.models.sampling import Sampling
from lvrpo.rewards.reward import FunctionReward, Samples
from lvrpo.runs.config_file import load_config
from lvrpo.runs.signals import Signals
from lvrpo.trainer.config import ConfigError
from lvrpo.trainer.experience import Experience
from lvrpo.trainer.loop import train
from lvrpo.trainer.measurement import AS_TRAINED
from lvrpo.trainer.task import Task
from lvrpo.trainer.update import policy_gradient
from lvrpo.trainer.warm_start import supervised_gradient

GROUP = 4


def experience(policy: Policy) -> Experience:
    generator = torch.Generator().manual_seed(0)
    key = {"seed": 3, "step": 1}
    questions, drawings = prompts("understand", 3), prompts("generate", 2)
    return Experience(
        policy.sample_texts(
            questions, GROUP, sampling=Sampling(max_tokens=5, temperature=TEMPERATURE), **key
        ),
        torch.randn(3 * GROUP, generator=generator),
        policy.sample_images(drawings, GROUP, SCHEDULE, **key),
        torch.randn(2 * GROUP, generator=generator),
    )


def gradients(policy: LinearPolicy) -> dict[str, torch.Tensor]:
    found = {name: p.grad for name, p in policy.module.named_parameters()}
    policy.module.zero_grad()
    return found


def test_its_update_replays_its_rollout():
    policy = LinearPolicy.fresh()
    metrics = policy_gradient(policy, policy, experience(policy), SCHEDULE, OBJECTIVE)
    for key in ("text", "image"):
        assert abs(metrics[f"ratio/{key}/min"] - 1) < 1e-5
        assert abs(metrics[f"ratio/{key}/max"] - 1) < 1e-5
        assert abs(metrics[f"kl/{key}"]) < 1e-9
    assert all(gradient.any() for gradient in gradients(policy).values())


def test_its_packs_are_its_own_affair():
    policy, reference = LinearPolicy.fresh(), LinearPolicy.fresh(1)
    found = experience(LinearPolicy.fresh(2))
    parts = dataclasses.replace(OBJECTIVE, max_rows=1)
    whole_metrics = policy_gradient(policy, reference, found, SCHEDULE, OBJECTIVE)
    whole = gradients(policy)
    metrics = policy_gradient(policy, reference, found, SCHEDULE, parts)
    for name, gradient in gradients(policy).items():
        torch.testing.assert_close(gradient, whole[name])
    assert metrics.keys() == whole_metrics.keys()


def test_it_learns_what_it_is_rewarded_for():
    policy = LinearPolicy.fresh()
    found = experience(policy)
    reference = policy.with_weights_of(policy)
    optimizer = torch.optim.SGD(policy.module.parameters(), lr=0.1)
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        metrics = policy_gradient(policy, reference, found, SCHEDULE, OBJECTIVE)
        losses.append(metrics["loss/text"] + metrics["loss/image"])
        optimizer.step()
    assert losses == sorted(losses, reverse=True)


def test_it_is_warmed_up_and_answers():
    policy = LinearPolicy.fresh()
    questions = [dataclasses.replace(e, answer="3") for e in prompts("understand", 4)]
    blank = np.zeros((1, 16, 16), np.float32)
    drawings = [[dataclasses.replace(e, target=blank)] * 2 for e in prompts("generate", 2)]
    optimizer = torch.optim.SGD(policy.module.parameters(), lr=0.3)
    rows = []
    for _ in range(20):
        optimizer.zero_grad()
        rows.append(supervised_gradient(policy, questions, drawings, seed=0, step=1))
        optimizer.step()
    assert rows[-1]["loss/text"] < rows[0]["loss/text"] / 4
    assert rows[-1]["loss/image"] < rows[0]["loss/image"]
    pictures = torch.zeros(2, 1, 16, 16)
    three, four = answer_probability(policy, pictures, [questions[0].prompt] * 2, ["3", "4"])
    assert three > 0.5 > four


class Numbers:
    """A source of prompts that name the digit which is their answer, or the grey to draw."""

    picture_shape = (1, 16, 16)

    def examples(self, split: str, skill: Skill, count: int, seed: int) -> list[Example]:
        return [group[0] for group in self.labelled(skill, count, LabelErrors(), seed)]

    def labelled(
        self, skill: Skill, count: int, errors: LabelErrors, seed: int, copies: int = 1
    ) -> list[list[Example]]:
        digits = random.stream(seed, "digits", skill).integers(10, size=count).tolist()
        return [[self._example(skill, digit)] * copies for digit in digits]

    def _example(self, skill: Skill, digit: int) -> Example:
        picture, prompt = np.full(self.picture_shape, digit / 10, np.float32), f"say {digit}"
        if skill == "understand":
            return Example(skill, f"ask {digit}", prompt, image=picture, answer=str(digit))
        return Example(skill, f"draw {digit}", prompt, target=picture)


class NoChecks:
    def scores(self, samples: Samples) -> dict[str, torch.Tensor]:
        return {"right": torch.full((len(samples),), torch.nan)}


def right_answers(samples: Samples) -> list[bool]:
    return [text == e.answer for text, e in zip(samples.texts, samples.examples, strict=True)]


def brightness(samples: Samples) -> torch.Tensor:
    return samples.images.flatten(1).mean(dim=1)


def test_it_trains_by_the_same_loop_and_evaluation():
    """From the first step of the warm start on; both rewards rise on held-out prompts."""
    rewards = {
        "understand": {"answers": FunctionReward(right_answers, "answers")},
        "generate": {"brightness": FunctionReward(brightness, "brightness")},
    }
    task = Task(Numbers(), NoChecks(), LinearPolicy.fresh, lambda reference: rewards, "numbers")
    config = load_config(
        overrides=[
            "warm_start.steps=5",
            "warm_start.lr=0.05",
            "run.steps=40",
            "run.eval_items=128",
            "run.frontier_items=0",
            "optimizer.lr=0.03",
            "loss.text_kl=0",
            "loss.image_kl=0",
            "rollout.max_answer_tokens=2",
            "rewards.understand={ answers = 1.0 }",
            "rewards.generate={ brightness = 1.0 }",
        ]
    )
    journal = MemoryJournal()
    train(config, task, journal, Signals())
    assert [row["step"] for row in journal.rows] == list(range(1, 46))
    (before, _), (after, gallery) = journal.evals.values()
    assert gallery
    for then, now in zip(before, after, strict=True):
        if now.sampling == AS_TRAINED:
            assert fmean(now.scores["reward"]) > fmean(then.scores["reward"]) + 0.1, now.skill


def test_it_is_not_asked_for_what_it_cannot_do():
    def new_policy() -> LinearPolicy:
        return dataclasses.replace(LinearPolicy.fresh(), skills=frozenset({"understand"}))

    task = Task(Numbers(), NoChecks(), new_policy, lambda reference: {}, "numbers")
    with pytest.raises(ConfigError, match=r"generate_prompts is 32, .* only understand"):
        train(load_config(), task, MemoryJournal(), Signals())
