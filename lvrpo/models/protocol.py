"""What a trainer asks of a model family: sample, lay out, evaluate.

A family is one class with these methods; nothing that trains, scores or measures knows more of it.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from lvrpo import random
from lvrpo.data.example import Example, FinishReason, Skill
from lvrpo.models.flow import FlowSchedule, Guidance
from lvrpo.models.packs import GuidedPictures, Pack, PictureGroup, TextGroup
from lvrpo.models.sampling import SampledFrom, Sampling
from lvrpo.ops.linear_logprobs import linear_logprobs


class DivergedError(RuntimeError):
    """What the policy sampled, or its gradient, is not finite."""

    @classmethod
    def of_samples(cls, what: str, step: int) -> DivergedError:
        """The error of a step (0 for none) whose samples show it."""
        at = f"step {step}: " if step > 0 else ""
        return cls(
            f"{at}the policy's {what} are not finite: its weights have diverged; a lower "
            "optimizer.lr or optimizer.grad_clip may help; the checkpoints before it are kept"
        )


@dataclass(frozen=True)
class Answers:
    """Sampled texts, group by group: sample g of prompt p is at p * G + g if none was left out."""

    examples: list[Example]  # [P]
    group_size: int
    token_ids: list[list[int]]  # [P * G] sampled tokens, with the one that ended the answer
    texts: list[str]  # [P * G] without what ended them
    logprobs: Tensor  # [T] nats, of all tokens one after the other, on the policy's device
    finish_reasons: list[FinishReason]  # [P * G], "length" where the limit of tokens cut
    sizes: Sequence[int] = ()  # [P] samples of each prompt, where not all of a group are left
    sampled_from: SampledFrom | None = None  # [T], where that is another distribution

    @property
    def group_sizes(self) -> list[int]:
        """[P] samples of each prompt."""
        return list(self.sizes) or [self.group_size] * len(self.examples)

    def groups(self) -> list[tuple[Example, list[list[int]]]]:
        """Every prompt that has samples, with their tokens."""
        tokens = iter(self.token_ids)
        return [
            (example, list(islice(tokens, size)))
            for example, size in zip(self.examples, self.group_sizes, strict=True)
            if size
        ]

    @classmethod
    def concat(cls, parts: Sequence[Answers]) -> Answers:
        """The groups of all parts, in order; all of one size, and sampled in one way."""
        first = parts[0]
        sampled_from = None
        if first.sampled_from is not None:
            columns = zip(*(part.sampled_from or () for part in parts), strict=True)
            sampled_from = SampledFrom(*map(torch.cat, columns))
        return cls(
            examples=[example for part in parts for example in part.examples],
            group_size=first.group_size,
            token_ids=[ids for part in parts for ids in part.token_ids],
            texts=[text for part in parts for text in part.texts],
            logprobs=torch.cat([part.logprobs for part in parts]),
            finish_reasons=[reason for part in parts for reason in part.finish_reasons],
            sizes=[size for part in parts for size in part.group_sizes],
            sampled_from=sampled_from,
        )

    def take(self, groups: Sequence[int]) -> Answers:
        """Some whole groups, in the order given."""
        sizes = torch.tensor(self.group_sizes)
        starts = (sizes.cumsum(0) - sizes).tolist()
        rows = [i for g in groups for i in range(starts[g], starts[g] + self.group_sizes[g])]
        lengths = torch.tensor([len(ids) for ids in self.token_ids], dtype=torch.int64)
        ends = lengths.cumsum(0).tolist()
        tokens = torch.tensor(
            [t for i in rows for t in range(ends[i] - len(self.token_ids[i]), ends[i])],
            dtype=torch.int64,
        ).to(self.logprobs.device)
        sampled_from = self.sampled_from and SampledFrom(*(x[tokens] for x in self.sampled_from))
        return dataclasses.replace(
            self,
            examples=[self.examples[g] for g in groups],
            token_ids=[self.token_ids[i] for i in rows],
            texts=[self.texts[i] for i in rows],
            logprobs=self.logprobs[tokens],
            sampled_from=sampled_from,
            finish_reasons=[self.finish_reasons[i] for i in rows],
            sizes=[self.group_sizes[g] for g in groups],
        )

    def where(self, kept: Tensor) -> Answers:
        """The samples for which `kept`, one bool each, holds; a group keeps its place."""
        lengths = torch.tensor([len(ids) for ids in self.token_ids], dtype=torch.int64)
        tokens = kept.repeat_interleave(lengths).nonzero().flatten()
        tokens = tokens.to(self.logprobs.device)
        chosen = kept.nonzero().flatten().tolist()
        sampled_from = self.sampled_from and SampledFrom(*(x[tokens] for x in self.sampled_from))
        return dataclasses.replace(
            self,
            token_ids=[self.token_ids[i] for i in chosen],
            texts=[self.texts[i] for i in chosen],
            logprobs=self.logprobs[tokens],
            sampled_from=sampled_from,
            finish_reasons=[self.finish_reasons[i] for i in chosen],
            sizes=[int(group.sum()) for group in kept.split(self.group_sizes)],
        )


@dataclass(frozen=True)
class Pictures:
    """Sampled pictures and the stochastic steps they took; same order as `Answers`.

    N = P * G pictures, K stochastic steps, n latent tokens of c numbers. All but the images are on
    the policy's device.
    """

    examples: list[Example]  # [P]
    group_size: int
    images: Tensor  # [N, C, H, W] fp32 in [0, 1], on the host
    latents: Tensor  # [N, K, n, c] x_t before each stochastic step
    velocities: Tensor  # [N, K, n, c] of the sampling weights, guided where the sampling was
    noise: Tensor  # [N, K, n, c] that each step drew, or int64 [N, K, 2], its streams
    steps: list[int]  # [K] step numbers in the schedule
    fingerprint: str  # of the schedule
    guidance: Guidance | None = None  # of the velocities

    @classmethod
    def concat(cls, parts: Sequence[Pictures]) -> Pictures:
        """The groups of all parts, in order; all of one size and schedule."""
        return dataclasses.replace(
            parts[0],
            examples=[example for part in parts for example in part.examples],
            images=torch.cat([part.images for part in parts]),
            latents=torch.cat([part.latents for part in parts]),
            velocities=torch.cat([part.velocities for part in parts]),
            noise=torch.cat([part.noise for part in parts]),
        )

    def take(self, groups: Sequence[int]) -> Pictures:
        """Some whole groups, in the order given."""
        first = torch.tensor(groups, dtype=torch.int64)[:, None] * self.group_size
        samples = (first + torch.arange(self.group_size)).flatten()
        there = samples.to(self.latents.device)
        return dataclasses.replace(
            self,
            examples=[self.examples[group] for group in groups],
            images=self.images[samples],
            latents=self.latents[there],
            velocities=self.velocities[there],
            noise=self.noise[there],
        )


class Head(NamedTuple):
    """The projection on the vocabulary.

    Logits are softcap * tanh(logit_scale * z / softcap), z = hidden @ weight.T + bias.
    """

    weight: Tensor  # [V, H]
    bias: Tensor | None  # [V]
    vocab_range: tuple[int, int]  # [low, high) of the tokens that answers are sampled from
    logit_scale: float = 1.0
    softcap: float | None = None  # None: logits are as large as they are

    def arguments(self, temperature: float = 1.0) -> dict[str, Any]:
        """Keyword arguments of the `linear_` ops.

        Args:
            temperature: that the logits are divided by.
        """
        return {
            "weight": self.weight,
            "bias": self.bias,
            "vocab_range": self.vocab_range,
            "temperature": temperature / self.logit_scale,
            "softcap": None if self.softcap is None else self.softcap / self.logit_scale,
        }


class Outputs(NamedTuple):
    """What one forward pass over a `Pack` predicts."""

    hidden: Tensor  # [R, H] of the rows that predict a token, in the order of `Pack.predictors`
    head: Head
    velocity: Tensor  # [M, n, c] of the noisy pictures, fp32 or fp64

    def logprobs(
        self, pack: Pack, *, temperature: float = 1.0, backend: str | None = None
    ) -> Tensor:
        """[T] log-probs of the pack's targets among the tokens that answers may hold, nats."""
        found: Tensor = linear_logprobs(
            self.hidden,
            token_ids=pack.token_ids,
            row_index=pack.row_index,
            **self.head.arguments(temperature),
            backend=backend,
        )
        return found


class Policy(Protocol):
    """A model with the frozen parts that turn words and pixels into its inputs.

    Everything that goes into the model follows its device and dtype; what is laid out is laid out
    on the host and moved there once.
    """

    @property
    def skills(self) -> frozenset[Skill]:
        """What it can be asked for."""

    @property
    def module(self) -> nn.Module:
        """All that is trained and saved."""

    @property
    def backend(self) -> str | None:
        """Of every op; None for the first that can run."""

    @property
    def device(self) -> torch.device:
        """Where the module is."""

    @property
    def network(self) -> nn.Module:
        """Whose forward is a pass, with all parameters, frozen ones too."""

    @property
    def blocks(self) -> Sequence[nn.Module]:
        """Modules of the network that every pass runs once, one after the other."""

    def renewed(self) -> Policy:
        """The policy after its network was given other parameters."""

    def to(self, device: torch.device) -> Policy:
        """The policy with all that it has on a device; what it had may have been moved there."""

    def sample_texts(
        self,
        examples: Sequence[Example],
        group_size: int,
        *,
        sampling: Sampling,
        seed: int,
        step: int,
    ) -> Answers:
        """Sample `group_size` answers to every question, each until its end or a limit.

        Args:
            examples: questions.
            group_size: samples of each.
            sampling: how. The log-probs of the answers are those of softmax(logits / temperature)
                among the tokens that answers may hold, of temperature 1 where it is 0, whatever
                else `sampling` does; see `Answers.sampled_from`.
            seed: of the samples.
            step: keys their streams too.

        Raises:
            DivergedError: the model's logits are not finite.
        """

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
        """Denoise `group_size` pictures for every drawing prompt.

        Args:
            examples: drawing prompts.
            group_size: samples of each.
            schedule: of the denoising.
            start_noise: standard deviation of the noise that it begins with. 1 is what the model
                has learned; with 0 and an ODE there is one drawing of a prompt, whatever the seed.
            guidance: of the velocity that is followed; None: the model's own.
            seed: of the samples.
            step: keys their streams too.

        Raises:
            DivergedError: what the model drew is not finite.
        """

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
        """Packed buffers on the policy's device; see `lvrpo.models.packs.pack_groups`."""

    def forward(self, pack: Pack) -> Outputs:
        """One pass over a pack of this policy's."""

    def answer_ids(self, text: str) -> list[int]:
        """Tokens of a complete answer, closed by the end token."""

    def encode(self, images: Tensor) -> Tensor:
        """[N, C, H, W] in [0, 1] -> [N, n, c] latents on the policy's device."""


def sample_streams(
    kind: str, examples: Sequence[Example], group_size: int, seed: int, step: int
) -> list[np.random.Generator]:
    """A stream per sample, keyed so that a sample does not depend on what shares its batch."""
    keys = _sample_keys(kind, examples, group_size, step)
    return [random.stream(seed, *key) for key in keys]


def sample_seeds(
    kind: str, examples: Sequence[Example], group_size: int, seed: int, step: int
) -> Tensor:
    """Likewise a seed per sample, int64 [N]."""
    keys = _sample_keys(kind, examples, group_size, step)
    return torch.tensor([random.seed_of(seed, *key) for key in keys], dtype=torch.int64)


def _sample_keys(
    kind: str, examples: Sequence[Example], group_size: int, step: int
) -> Iterator[tuple[int | str, ...]]:
    """A prompt that comes twice goes on counting, so its samples differ."""
    taken: Counter[str] = Counter()
    for example in examples:
        for _ in range(group_size):
            yield kind, step, example.uid, taken[example.uid]
            taken[example.uid] += 1
