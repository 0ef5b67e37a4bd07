"""Models of packed buffers as policies: how they are sampled from, and how prompts enter them.

A prompt is computed once; its keys and values serve the whole group and all denoising steps. Random
numbers come from counter-based streams keyed by (seed, step, prompt, sample), so a sample does not
depend on what else is in the batch.
"""

from __future__ import annotations

import copy
import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import ClassVar, TypeVar

import torch
from torch import Tensor, nn

from lvrpo import random
from lvrpo.data.example import SKILLS, Example, Skill
from lvrpo.data.marks import IMAGE_MARK
from lvrpo.models.answer_sampler import AnswerSampler
from lvrpo.models.flow import FlowSchedule, Guidance, drawn_noise
from lvrpo.models.packs import (
    Branch,
    GuidedPictures,
    GuidedRows,
    LaidOut,
    Pack,
    PictureGroup,
    TextGroup,
    guided_by_image,
    pack_groups,
)
from lvrpo.models.protocol import (
    Answers,
    DivergedError,
    Head,
    Outputs,
    Pictures,
    sample_seeds,
    sample_streams,
)
from lvrpo.models.sampling import Sampling
from lvrpo.models.unified.cache import CachedPass
from lvrpo.models.unified.decoding import Decoding
from lvrpo.models.unified.latents import LinearAutoencoder
from lvrpo.models.unified.layout import ROOT, PackBuilder
from lvrpo.models.unified.model import PackedBatch, PackedModel, UnifiedModel
from lvrpo.models.unified.tokenizer import BOS, DRAW, EOS, IMAGE, IMAGE_END, Tokenizer
from lvrpo.ops.flow_step import flow_step

Renewed = TypeVar("Renewed", bound="PackedPolicy")


class PackedPolicy(ABC):
    """A `lvrpo.models.protocol.Policy` of a model of packed buffers, but for its words and pixels.

    A subclass has the attributes.

    Attributes:
        keeps_noise: whether a drawing keeps the noise of its steps, drawn on the host, or the
            streams that `flow_step` draws it from: a third less memory for a trajectory.
    """

    keeps_noise: ClassVar[bool] = True

    module: PackedModel
    latent_grid: tuple[int, int]  # rows and columns of latent tokens of a picture
    answer_range: tuple[int, int]  # [low, high) of the tokens an answer may hold
    backend: str | None

    @property
    @abstractmethod
    def blocks(self) -> Sequence[nn.Module]:
        """The layers of the language model."""

    @abstractmethod
    def add_prompt(self, builder: PackBuilder, example: Example) -> int:
        """Lay out the picture (if any) and the words of a prompt; returns its last span."""

    @abstractmethod
    def add_without_words(self, builder: PackBuilder, example: Example) -> int:
        """Lay out a request to draw without its words; returns its last span, `ROOT` for none.

        It is the same for all requests without a picture to be edited.
        """

    @abstractmethod
    def add_without_pictures(self, builder: PackBuilder, example: Example) -> int:
        """Lay out the words of a request to draw alone; returns the last span, `ROOT` for none."""

    @abstractmethod
    def prompt_ids(self, example: Example) -> list[int]:
        """Tokens of the words of a prompt."""

    @property
    @abstractmethod
    def end_id(self) -> int:
        """The token that ends an answer."""

    @abstractmethod
    def decode(self, ids: Sequence[int]) -> str:
        """The text of tokens."""

    @abstractmethod
    def draw(self, latents: Tensor) -> Tensor:
        """[N, n, c] latents -> [N, C, H, W] pictures in [0, 1]."""

    @abstractmethod
    def encode(self, images: Tensor) -> Tensor:
        """[N, C, H, W] in [0, 1] -> [N, n, c] latents on the policy's device."""

    @property
    def skills(self) -> frozenset[Skill]:
        """Both."""
        return frozenset(SKILLS)

    @property
    def device(self) -> torch.device:
        """Where the module is."""
        return self.module.head.weight.device

    @property
    def network(self) -> nn.Module:
        """The module."""
        assert isinstance(self.module, nn.Module)
        return self.module

    def renewed(self: Renewed) -> Renewed:
        """As it is: its module has the parameters themselves."""
        return self

    @property
    def latent_shape(self) -> tuple[int, int]:
        """(tokens, numbers per token) of one picture."""
        return self.latent_grid[0] * self.latent_grid[1], self.module.config.latent_dim

    def builder(self) -> PackBuilder:
        """An empty packed buffer for this model."""
        return PackBuilder(self.module.config)

    def prompt(self, example: Example) -> PackBuilder:
        """A buffer with one prompt in it."""
        builder = self.builder()
        self.add_prompt(builder, example)
        return builder

    def without_words(self, example: Example) -> PackBuilder:
        """A buffer with a request to draw without its words."""
        builder = self.builder()
        self.add_without_words(builder, example)
        return builder

    def without_pictures(self, example: Example) -> PackBuilder:
        """A buffer with a request to draw without its pictures."""
        builder = self.builder()
        self.add_without_pictures(builder, example)
        return builder

    def packs(
        self,
        texts: Sequence[TextGroup],
        pictures: Sequence[PictureGroup] = (),
        latents: Tensor | None = None,
        timesteps: Tensor | None = None,
        max_rows: int = 1 << 30,
        *,
        share_prompts: bool = True,
        guided: GuidedPictures | None = None,
    ) -> Iterator[Pack]:
        """See `pack_groups`."""
        packs = pack_groups(
            self,
            texts,
            pictures,
            latents,
            timesteps,
            max_rows,
            share_prompts=share_prompts,
            guided=guided,
        )
        return (pack.to(self.device) for pack in packs)

    def forward(self, pack: Pack) -> Outputs:
        """One pass over a pack of this policy's."""
        assert isinstance(pack.batch, PackedBatch)
        text, latent = self.module(pack.batch, backend=self.backend)
        head = self.module.head
        if len(pack.batch.noisy) < len(latent):
            latent = latent[pack.batch.noisy]
        velocity = self.module.velocity(latent).view(-1, *self.latent_shape)
        if pack.guided is not None:
            velocity = pack.guided.velocity(velocity, self.backend)
        return Outputs(
            text[pack.predictors], Head(head.weight, head.bias, self.answer_range), velocity
        )

    @torch.no_grad()
    def sample_texts(
        self,
        examples: Sequence[Example],
        group_size: int,
        *,
        sampling: Sampling,
        seed: int,
        step: int,
    ) -> Answers:
        """See `lvrpo.models.protocol.Policy`."""
        sampler = AnswerSampler(
            examples,
            group_size,
            sampling,
            prompt_ids=[self.prompt_ids(example) for example in examples],
            vocab_range=self.answer_range,
            end_ids=[self.end_id],
            decode=self.decode,
            device=self.device,
            seed=seed,
            step=step,
            backend=self.backend,
        )
        prompts = [self.prompt(example) for example in examples]
        decoding = Decoding(
            self.module, self.builder, prompts, group_size, sampling.max_tokens, self.backend
        )
        while True:
            ids, _ = sampler.draw(self.module.logits(decoding.hidden), decoding.row_index)
            if not len(sampler.active):
                return sampler.answers()
            decoding.append(ids, sampler.active)

    @torch.no_grad()
    def sample_images(
        self,
        examples: Sequence[Example],
        group_size: int,
        schedule: FlowSchedule,
        *,
        start_noise: float = 1.0,
        guidance: Guidance | None = None,
        seed: int,
        step: int,
    ) -> Pictures:
        """See `lvrpo.models.protocol.Policy`."""
        drawings = _Drawings(self, examples, group_size, guidance)
        start, of_steps = self._noise(examples, group_size, schedule.num_steps, seed, step)
        x = start * start_noise
        latents, velocities, noise, steps = [], [], [], []
        for k in range(schedule.num_steps):
            coefficients = schedule.coefficients(k, device=self.device)
            time = float(schedule.times[k])
            velocity = drawings.velocity(x, time)
            stochastic = k in schedule.stochastic_steps
            z = of_steps[:, k] if stochastic else None
            if stochastic:
                latents.append(x)
                velocities.append(velocity)
                noise.append(of_steps[:, k])
                steps.append(k)
            x, _ = flow_step(velocity, x, coefficients, z, backend=self.backend)
        if not bool(x.isfinite().all()):
            # Decoding clips to [0, 1] and would hide an infinity.
            raise DivergedError.of_samples("drawings", step)
        none = x.new_zeros(len(x), 0, *x.shape[1:])
        return Pictures(
            examples=list(examples),
            group_size=group_size,
            images=self.draw(x).clamp(0, 1).to("cpu", torch.float32),
            latents=torch.stack(latents, dim=1) if latents else none,
            velocities=torch.stack(velocities, dim=1) if latents else none,
            noise=torch.stack(noise, dim=1) if latents else none,
            steps=steps,
            fingerprint=schedule.fingerprint(),
            guidance=guidance,
        )

    def _noise(
        self, examples: Sequence[Example], group_size: int, steps: int, seed: int, step: int
    ) -> tuple[Tensor, Tensor]:
        """What drawings start from [N, n, c], and that of all steps [N, steps, n, c] or [.., 2]."""
        if self.keeps_noise:
            # One draw holds a sample's starting noise and then the noise of each step.
            samplers = sample_streams("picture", examples, group_size, seed, step)
            drawn = random.normal(samplers, (1 + steps, *self.latent_shape)).to(self.device)
            return drawn[:, 0], drawn[:, 1:]
        seeds = sample_seeds("picture", examples, group_size, seed, step).to(self.device)
        subsequences = torch.arange(1 + steps, device=self.device)
        streams = torch.stack(torch.broadcast_tensors(seeds[:, None], subsequences), dim=2)
        return drawn_noise(streams[:, 0], self.latent_shape, self.backend), streams[:, 1:]


class _Drawings:
    """The velocity of drawings on their way, guided or not; their prompts are computed once.

    Args:
        policy: that draws.
        examples: drawing prompts.
        group_size: drawings of each.
        guidance: of the velocity; None: the model's own.
    """

    def __init__(
        self,
        policy: PackedPolicy,
        examples: Sequence[Example],
        group_size: int,
        guidance: Guidance | None,
    ) -> None:
        self.policy, self.examples, self.group_size = policy, examples, group_size
        self.guidance = guidance
        self.builder = policy.builder()
        self.prompt_rows: list[int] = []
        self.noise_rows: list[int] = []
        self.laid_out: list[LaidOut] = []
        prompts = range(len(examples))
        for i in prompts:
            self._lay_out("whole", policy.add_prompt, [i])
        unguided_rows = torch.tensor(self.noise_rows)
        if guidance is not None:
            # Without its words a prompt is like any other: neighbours have it once, but for edits.
            for _, alike in groupby(prompts, lambda i: examples[i].images and examples[i].uid):
                self._lay_out("without words", policy.add_without_words, list(alike))
            for i in prompts:
                if guided_by_image(guidance.params, examples[i]):
                    self._lay_out("without pictures", policy.add_without_pictures, [i])
        layout, prompt_rows = self.builder.build(), torch.tensor(self.prompt_rows)
        self.run = CachedPass(policy.module, layout, prompt_rows, policy.backend)
        self.unguided = self.run.part(unguided_rows)
        if guidance is not None:
            self.guided = self.run.part(torch.tensor(self.noise_rows))
            self.rows = GuidedRows.of(guidance.params, self.laid_out).to(policy.device)
            samples = [sample for sample, _ in self.laid_out]
            self.order = torch.tensor(samples).to(policy.device)

    def _lay_out(
        self,
        branch: Branch,
        add: Callable[[PackBuilder, Example], int],
        alike: Sequence[int],
    ) -> None:
        """What the branch leaves of these prompts, the same of each, and all their drawings."""
        first = self.builder.rows
        parent = add(self.builder, self.examples[alike[0]])
        self.prompt_rows.extend(range(first, self.builder.rows))
        for prompt in alike:
            for sample in range(prompt * self.group_size, (prompt + 1) * self.group_size):
                noise = self.builder.noise(*self.policy.latent_grid, parent=parent)
                self.noise_rows.extend(range(self.builder.start(noise), self.builder.end(noise)))
                self.laid_out.append((sample, branch))

    def velocity(self, x: Tensor, time: float) -> Tensor:
        """[N, n, c] of the latents `x` [N, n, c] at one time."""
        if self.guidance is None or not self.guidance.guides(time):
            return self.run.run_latents(*self.unguided, x, time)
        laid_out = self.run.run_latents(*self.guided, x[self.order], time)
        return self.rows.velocity(laid_out, self.policy.backend)


@dataclass(frozen=True)
class UnifiedPolicy(PackedPolicy):
    """The unified model, its words and its autoencoder, which is on the module's device."""

    module: UnifiedModel
    tokenizer: Tokenizer
    autoencoder: LinearAutoencoder
    latent_grid: tuple[int, int]
    answer_range: tuple[int, int]
    backend: str | None = None

    def add_prompt(self, builder: PackBuilder, example: Example) -> int:
        """See `PackedPolicy`.

        Raises:
            ValueError: see `check_shown`.
        """
        span = ROOT
        images, videos = len(example.images), len(example.videos)
        check_shown(example.task, example.uid, example.prompt, images=images, videos=videos)
        if example.image is not None:
            span = builder.picture(example.image, IMAGE, IMAGE_END, span)
        return builder.text(self.prompt_ids(example), span)

    def add_without_words(self, builder: PackBuilder, example: Example) -> int:
        """See `PackedPolicy`."""
        return builder.text([BOS, DRAW])

    def add_without_pictures(self, builder: PackBuilder, example: Example) -> int:
        """See `PackedPolicy`; a request has no pictures, see `check_shown`."""
        return self.add_prompt(builder, example)

    def prompt_ids(self, example: Example) -> list[int]:
        """See `PackedPolicy`."""
        words = [BOS, *self.tokenizer.encode(example.prompt)]
        return [*words, DRAW] if example.task == "generate" else words

    @property
    def end_id(self) -> int:
        """See `PackedPolicy`."""
        return EOS

    def answer_ids(self, text: str) -> list[int]:
        """Tokens of a complete answer, closed by the end token."""
        return [*self.tokenizer.encode(text), EOS]

    def decode(self, ids: Sequence[int]) -> str:
        """See `PackedPolicy`."""
        return self.tokenizer.decode(ids)

    @property
    def blocks(self) -> Sequence[nn.Module]:
        """See `PackedPolicy`."""
        return [*self.module.layers]

    def to(self, device: torch.device) -> UnifiedPolicy:
        """See `lvrpo.models.protocol.Policy`; the autoencoder is copied."""
        autoencoder = copy.deepcopy(self.autoencoder).to(device)
        return dataclasses.replace(self, module=self.module.to(device), autoencoder=autoencoder)

    def encode(self, images: Tensor) -> Tensor:
        """See `PackedPolicy`."""
        return self.autoencoder.encode(images.to(self.device))

    def draw(self, latents: Tensor) -> Tensor:
        """See `PackedPolicy`."""
        return self.autoencoder.decode(latents)


def check_shown(task: Skill, uid: str, prompt: str, *, images: int, videos: int) -> None:
    """See that the unified model can read what a prompt shows: one picture, before its words.

    Args:
        task: of the prompt.
        uid: of the prompt, for the error.
        prompt: its words.
        images: pictures that it has.
        videos: that it has.

    Raises:
        ValueError: it cannot.
    """
    given = ""
    if images > 1 or videos:
        given = f"{images} pictures and {videos} videos"
    elif images and IMAGE_MARK in prompt:
        given = f"its picture where {IMAGE_MARK} stands"
    elif images and task == "generate":
        given = "a picture to be edited"
    if given:
        raise ValueError(
            f"{uid}: the prompt has {given}, expected one picture at most, before the words of a "
            "question: the unified model reads no more, and edits nothing, models of a folder "
            "(model.path) do"
        )
