"""The update of groups that share their prompt, against the same update with a prompt per sample.

Forward, reference forward, losses, backward and optimizer step of the unified model, as the trainer
does them; nothing is padded in either. Who takes part:

    shared      every prompt once, all groups in one buffer
    unshared    a copy of the prompt for every completion and every noisy picture, in buffers as
                long as the shared one, so that both have the same token budget
    one buffer  the same copies at once

Tokens are those that are learned from, of completions and noisy latents: the same for all three.
The first setting is the default configuration with its own rollout; the others are synthetic, with
longer prompts: pictures and questions with sampled answers, or words with sampled pictures.
"""

from __future__ import annotations

import copy
import dataclasses
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from bench_train_step import Step
from harness import results
from harness.measure import Race, peak_bytes
from harness.providers import DEVICE
from torch import Tensor, nn

import lvrpo
from lvrpo.data.example import Example
from lvrpo.digits.phrases import scene_words
from lvrpo.models.flow import FlowSchedule
from lvrpo.models.protocol import Answers, Pictures, Policy
from lvrpo.models.unified.latents import LinearAutoencoder
from lvrpo.models.unified.model import UnifiedConfig, UnifiedModel
from lvrpo.models.unified.policy import UnifiedPolicy
from lvrpo.models.unified.tokenizer import Tokenizer
from lvrpo.runs.config_file import load_config
from lvrpo.runs.setup import Setup
from lvrpo.testing import DEFAULT_ULPS, check_against_plain
from lvrpo.trainer.experience import Experience
from lvrpo.trainer.objective import Objective
from lvrpo.trainer.update import pack_experience, policy_gradient

GROUP = 8
ONE_BUFFER = 1 << 30


@dataclass(frozen=True)
class Setting:
    """Groups of one kind: a prompt, and completions of text or of denoising steps."""

    model: UnifiedConfig
    prompts: int
    prompt: int  # tokens
    completion: int = 0  # tokens; 0 for pictures
    side: int = 0  # of the prompt's picture, or else of a sampled one
    steps: int = 2  # trained steps of a sampled picture
    dtype: torch.dtype = torch.float32


SMALL = UnifiedConfig(512, hidden=48, layers=2, head_dim=16, mlp=96)
#: 7 million parameters.
FULL = UnifiedConfig(4096, hidden=256, heads=8, kv_heads=4, mlp=704, max_grid=16)
#: Half of the layers, and patches without an encoder of their own: 1.8 billion parameters.
GPU = dataclasses.replace(UnifiedConfig.preset("bagel-1.5b"), layers=14, vision_layers=0)
SHAPES = {
    "small": {
        "answers": Setting(SMALL, 2, prompt=32, completion=8, side=4),
        "pictures": Setting(SMALL, 2, prompt=32, side=2),
    },
    "full": {
        "answers": Setting(FULL, 2, prompt=256, completion=64, side=12),
        "pictures": Setting(FULL, 2, prompt=128, side=4),
    },
    "gpu": {
        "answers": Setting(GPU, 2, prompt=2048, completion=512, side=32, dtype=torch.bfloat16),
        "pictures": Setting(GPU, 1, prompt=512, side=16, dtype=torch.bfloat16),
    },
}


@dataclass(frozen=True)
class Update:
    """What all who take part share: the models, the rollout and the optimizer."""

    policy: Policy
    reference: Policy
    experience: Experience
    schedule: FlowSchedule
    objective: Objective
    optimizer: torch.optim.Optimizer

    def given(self, *, share: bool, most: int) -> Update:
        objective = dataclasses.replace(self.objective, share_prompts=share, max_rows=most)
        return dataclasses.replace(self, objective=objective)

    def gradient(self) -> dict[str, float]:
        return policy_gradient(
            self.policy, self.reference, self.experience, self.schedule, self.objective
        )

    def __call__(self) -> None:
        self.gradient()
        nn.utils.clip_grad_norm_(self.policy.module.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    @property
    def rows(self) -> list[int]:
        """Of every packed buffer."""
        packs = pack_experience(self.policy, self.experience, self.schedule, self.objective)
        return [pack.batch.rows for pack in packs]

    @property
    def tokens(self) -> int:
        """That are learned from."""
        answers, pictures = self.experience.answers, self.experience.pictures
        of_pictures = 0 if pictures is None else pictures.latents[..., 0].numel()
        return of_pictures + (0 if answers is None else len(answers.logprobs))

    def results(self, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        """Losses and gradients, in another precision if asked for."""
        policies = {
            name: dataclasses.replace(policy, module=copy.deepcopy(policy.module).to(dtype))
            for name, policy in (("policy", self.policy), ("reference", self.reference))
        }
        found = dataclasses.replace(self, **policies)
        metrics = found.gradient()
        losses = {k: torch.tensor(v) for k, v in metrics.items() if k.startswith("loss/")}
        named = found.policy.module.named_parameters()
        return losses | {name: p.grad for name, p in named if p.grad is not None}


def optimizer_of(policy: Policy) -> torch.optim.Optimizer:
    """The trainer's; without a rate the weights stay, so that every round does the same work."""
    return torch.optim.AdamW(policy.module.parameters(), lr=0.0, betas=(0.9, 0.95))


def check(update: Update) -> None:
    """Shared prompts make the update of unshared ones, by the rule of `lvrpo.testing`."""
    unshared = update.given(share=False, most=ONE_BUFFER)
    gold, plain = unshared.results(torch.float64), unshared.results()
    ours = update.given(share=True, most=ONE_BUFFER).results()
    assert ours.keys() == gold.keys() == plain.keys()
    assert ours
    for key, value in ours.items():
        # Losses are means of terms of order 1; a gradient's elements are sums that cancel. Those of
        # narrow weights pass through many roundings: four units, in the size of the largest.
        narrow = torch.finfo(value.dtype).eps > torch.finfo(torch.float32).eps
        ulps = 4 * torch.finfo(value.dtype).eps / torch.finfo(torch.float32).eps
        check_against_plain(
            value,
            gold[key],
            plain[key],
            scale=1.0 if key.startswith("loss/") else gold[key].abs().max(),
            ulps=ulps if narrow else DEFAULT_ULPS,
            name=f"shared prompts: {key}",
        )


def synthetic(setting: Setting) -> Update:
    """Groups of random prompts and completions under a random model, on the device."""
    config = setting.model
    tokenizer = Tokenizer(scene_words())
    grid = (setting.side, setting.side)
    with torch.device(DEVICE):
        model = UnifiedModel(config).to(setting.dtype)
    with torch.no_grad():
        # Near the uniform distribution and the velocity 0 that "sampled" them, as after a rollout.
        nn.init.normal_(model.head.weight, std=1e-3)
        nn.init.normal_(model.latent_out.weight, std=1e-3)
        reference = copy.deepcopy(model).requires_grad_(False)
        reference.head.weight.mul_(0.5)
        reference.latent_out.weight.mul_(0.5)
    autoencoder = LinearAutoencoder(1, 8, 8, patch=8, dim=1)  # which an update does not use
    policy, reference_policy = (
        UnifiedPolicy(m, tokenizer, autoencoder, grid, (0, config.vocab_size))
        for m in (model, reference)
    )
    schedule = FlowSchedule(window=(0, setting.steps - 1))
    answers = pictures = None
    if setting.completion:
        answers = random_answers(setting)
    else:
        pictures = random_pictures(setting, schedule)
    advantages = torch.randn(setting.prompts * GROUP, device=DEVICE)
    experience = Experience(answers, advantages, pictures, advantages)
    objective = dataclasses.replace(Objective.from_config(load_config()), temperature=1.0)
    optimizer = optimizer_of(policy)
    return Update(policy, reference_policy, experience, schedule, objective, optimizer)


def random_answers(setting: Setting) -> Answers:
    config = setting.model
    pixels = (config.image_channels, *[setting.side * config.image_patch] * 2)
    count = setting.prompts * GROUP
    words = setting.prompt - setting.side**2 - 3  # and the markers of picture and text
    images = np.random.default_rng(0).random((setting.prompts, *pixels), dtype=np.float32)
    tokens = torch.randint(config.vocab_size, (count, setting.completion), device="cpu")
    uniform = torch.full((tokens.numel(),), 1 / config.vocab_size, device=DEVICE)
    return Answers(
        [
            Example("understand", f"question {i}", random_words(words), image=image, answer="")
            for i, image in enumerate(images)
        ],
        GROUP,
        tokens.tolist(),
        [""] * count,
        uniform.log(),
        ["length"] * count,
    )


def random_pictures(setting: Setting, schedule: FlowSchedule) -> Pictures:
    shape = setting.prompts * GROUP, setting.steps, setting.side**2, setting.model.latent_dim
    words = setting.prompt - 2  # and the markers of text and drawing
    return Pictures(
        [Example("generate", f"drawing {i}", random_words(words)) for i in range(setting.prompts)],
        GROUP,
        torch.zeros(0),
        torch.randn(shape, device=DEVICE),
        torch.zeros(shape, device=DEVICE),
        torch.randn(shape, device=DEVICE),
        list(schedule.stochastic_steps),
        schedule.fingerprint(),
    )


def random_words(count: int) -> str:
    return " ".join(random.Random(0).choices(scene_words(), k=count))


def compare(
    update: Update, name: str, dtype: torch.dtype, race: Any, publish: Any, capsys: Any
) -> None:
    shared = update.given(share=True, most=ONE_BUFFER)
    racers = {
        "shared": shared,
        "unshared": update.given(share=False, most=sum(shared.rows)),
        "one buffer": update.given(share=False, most=ONE_BUFFER),
    }
    parameters = sum(p.numel() for p in update.policy.module.parameters())
    found: Race = race(f"update {name}", racers, most=20)
    lines = [f"\nupdate of {parameters / 1e6:.3g} M parameters, {name}, {update.tokens} tokens"]
    fastest = results.published(found.times["shared"].facts())
    for provider, racer in racers.items():
        facts, rows, peak = found.times[provider].facts(), racer.rows, peak_bytes(racer)
        ms = results.published(facts)
        rate = update.tokens / ms * 1e3
        publish(
            op="update",
            direction="whole",
            shape=name,
            dtype=str(dtype).removeprefix("torch."),
            provider=provider,
            provider_version=lvrpo.__version__,
            correct=True,
            precision=str(dtype).removeprefix("torch."),
            rounds=found.rounds,
            peak_bytes=peak,
            buffer_rows=rows,
            tokens_per_s=rate,
            **facts,
        )
        memory = "" if peak is None else f"{peak / 2**20:10,.0f} MiB"
        lines.append(
            f"  {provider:12} {ms:10,.1f} ms = {ms / fastest:.2f} x shared "
            f"{rate:10,.0f} tokens/s {sum(rows):8,} rows in {len(rows):3} {memory}"
        )
    with capsys.disabled():
        print("\n".join(lines))


def bench_synthetic_groups(race: Any, publish: Any, capsys: Any, shape: Setting) -> None:
    torch.set_default_device(None)  # a rollout is laid out on the host
    # In fp64 as it is, but for the depth: every layer does the same.
    layers = min(shape.model.layers, 2)
    gate = dataclasses.replace(
        shape, model=dataclasses.replace(shape.model, layers=layers), prompts=1
    )
    check(synthetic(gate))
    kind = f"{GROUP} x {shape.completion}"
    if not shape.completion:
        kind = f"{GROUP} x {shape.steps} x {shape.side}x{shape.side}"
    name = f"{shape.prompts} groups: prompt {shape.prompt}, {kind}"
    compare(synthetic(shape), name, shape.dtype, race, publish, capsys)


@pytest.mark.skipif(DEVICE != "cpu", reason="the default rollout runs on a CPU")
def bench_default_configuration(
    race: Any, publish: Any, capsys: Any, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    overrides = []
    if request.config.getoption("--size") == "small":
        overrides = ["rollout.understand_prompts=4", "rollout.generate_prompts=4"]
    config = load_config(overrides=overrides)
    step = Step(config, Setup(config).frozen_parts(tmp_path), "")
    experience, _ = step.experience()
    # An untrained policy's answers are all wrong, which would leave nothing to compare.
    advantages = [torch.randn(len(x)) for x in vars(experience).values() if isinstance(x, Tensor)]
    experience = dataclasses.replace(
        experience, answer_advantages=advantages[0], picture_advantages=advantages[1]
    )
    policy, optimizer = step.policy, optimizer_of(step.policy)
    update = Update(policy, step.reference, experience, step.schedule, step.objective, optimizer)
    check(update)
    rollout = config.rollout
    prompts = f"{rollout.understand_prompts}+{rollout.generate_prompts}"
    name = f"default configuration, {prompts} prompts x {rollout.group_size}"
    compare(update, name, torch.float32, race, publish, capsys)
