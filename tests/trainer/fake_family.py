"""A model family of one object: a linear model of the last token, with a layout of its own.

It shares no code with the unified model: no spans, no mask, a head with a bias, a pack per group.
"""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lvrpo import random
from lvrpo.data.example import Example, Skill
from lvrpo.models.flow import FlowSchedule, Guidance
from lvrpo.models.packs import GuidedPictures, Pack, PictureGroup, TextGroup
from lvrpo.models.protocol import Answers, Head, Outputs, Pictures, sample_streams
from lvrpo.models.sampling import Sampling
from lvrpo.ops.flow_step import flow_step

WORDS = ["<end>", *map(str, range(10)), "yes", "no", "<start>"]
END, START = 0, len(WORDS) - 1
PROMPTS = 31  # of which the model tells so many apart
SIDE, WIDTH = 2, 6  # latent tokens of a picture along a side, numbers of a token


class LinearModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.prompt = nn.Embedding(PROMPTS, WIDTH)
        self.token = nn.Embedding(len(WORDS), WIDTH)
        self.head = nn.Linear(WIDTH, len(WORDS))
        self.drift = nn.Linear(WIDTH, WIDTH)


@dataclass(frozen=True)
class Rows:
    """A row per predicted token, and one per noisy picture."""

    prompts: Tensor  # [T]
    previous: Tensor  # [T]
    drawn: Tensor  # [M], the prompt of each picture
    latents: Tensor  # [M, n, c]
    times: Tensor  # [M]

    @property
    def rows(self) -> int:
        return len(self.previous) + len(self.latents)

    def to(self, device: torch.device | str) -> Rows:
        return Rows(**{name: value.to(device) for name, value in vars(self).items()})


@dataclass(frozen=True)
class LinearPolicy:
    """A `lvrpo.models.protocol.Policy`."""

    module: LinearModel
    backend: str | None = None
    skills: frozenset[Skill] = frozenset({"understand", "generate"})

    @classmethod
    def fresh(cls, seed: int = 0) -> LinearPolicy:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return cls(LinearModel())

    @property
    def device(self) -> torch.device:
        return self.module.head.weight.device

    @property
    def network(self) -> LinearModel:
        return self.module

    @property
    def blocks(self) -> list[nn.Module]:
        return []

    def renewed(self) -> LinearPolicy:
        return self

    def to(self, device: torch.device) -> LinearPolicy:
        self.module.to(device)
        return self

    def answer_ids(self, text: str) -> list[int]:
        return [*map(WORDS.index, text.split()), END]

    def encode(self, images: Tensor) -> Tensor:
        pooled = nn.functional.adaptive_avg_pool2d(images.to(self.device), SIDE)
        return pooled.flatten(1)[:, :, None].expand(-1, -1, WIDTH)

    def forward(self, pack: Pack) -> Outputs:
        rows = pack.batch
        assert isinstance(rows, Rows)
        hidden = self.module.prompt(rows.prompts) + self.module.token(rows.previous)
        head = Head(self.module.head.weight, self.module.head.bias, (END, START))
        return Outputs(hidden, head, self._velocity(rows.latents, rows.times, rows.drawn))

    def _velocity(self, x: Tensor, times: Tensor, prompts: Tensor) -> Tensor:
        return self.module.drift(x) * times[:, None, None] + self.module.prompt(prompts)[:, None]

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
        """One pack if everything fits, otherwise one for each group."""
        groups: list[tuple[list[TextGroup], list[PictureGroup]]] = [([*texts], [*pictures])]
        if sum(len(tokens) for _, group in texts for tokens in group) > max_rows:
            groups = [*(([text], []) for text in texts), *(([], [p]) for p in pictures)]
        completion = token = picture = 0
        for some_texts, some_pictures in groups:
            samples = [(example, tokens) for example, group in some_texts for tokens in group]
            ids = [token for _, tokens in samples for token in tokens]
            before = [t for _, tokens in samples for t in [START, *tokens[:-1]]]
            asked = [number(example) for example, tokens in samples for _ in tokens]
            drawn = [number(example) for example, count in some_pictures for _ in range(count)]
            shown = slice(picture, picture + len(drawn))
            empty = torch.zeros(0, SIDE**2, WIDTH)
            batch = Rows(
                torch.tensor(asked, dtype=torch.int64),
                torch.tensor(before, dtype=torch.int64),
                torch.tensor(drawn, dtype=torch.int64),
                empty if latents is None else latents[shown],
                empty[:, 0, 0] if timesteps is None else timesteps[shown],
            )
            lengths = torch.tensor([0, *(len(tokens) for _, tokens in samples)])
            pack = Pack(
                batch,
                torch.tensor(ids, dtype=torch.int64),
                torch.arange(len(ids)),
                torch.arange(len(ids)),
                lengths.cumsum(0),
                slice(completion, completion + len(samples)),
                slice(token, token + len(ids)),
                shown,
            )
            completion, token, picture = pack.completions.stop, pack.tokens.stop, shown.stop
            yield pack.to(self.device)

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
        streams = sample_streams("answer", examples, group_size, seed, step)
        token_ids, logprobs = [], []
        for sample, stream in enumerate(streams):
            prompt = torch.tensor(number(examples[sample // group_size]))
            ids = [START]
            while ids[-1] != END and len(ids) <= sampling.max_tokens:
                hidden = self.module.prompt(prompt) + self.module.token(torch.tensor(ids[-1]))
                logits = self.module.head(hidden)[END:START]
                table = (logits / (sampling.temperature or 1.0)).log_softmax(-1)
                below = (table.exp().cumsum(0) < stream.random()).sum().clamp(max=START - 1)
                drawn = int(below if sampling.temperature else table.argmax())
                ids.append(drawn)
                logprobs.append(table[drawn])
            token_ids.append(ids[1:])
        return Answers(
            list(examples),
            group_size,
            token_ids,
            [" ".join(WORDS[t] for t in ids if t != END) for ids in token_ids],
            torch.stack(logprobs),
            ["end" if ids[-1] == END else "length" for ids in token_ids],
        )

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
        streams = sample_streams("picture", examples, group_size, seed, step)
        noise = random.normal(streams, (1 + schedule.num_steps, SIDE**2, WIDTH))
        prompts = torch.tensor([number(e) for e in examples for _ in range(group_size)])
        x, steps = noise[:, 0] * start_noise, list(schedule.stochastic_steps)
        latents, velocities = [], []
        for k in range(schedule.num_steps):
            velocity = self._velocity(x, torch.full((len(x),), float(schedule.times[k])), prompts)
            latents.append(x)
            velocities.append(velocity)
            z = noise[:, 1 + k] if k in steps else None
            x, _ = flow_step(velocity, x, schedule.coefficients(k), z)
        pixels = x.mean(dim=-1).unflatten(1, (1, SIDE, SIDE)).sigmoid()
        return Pictures(
            list(examples),
            group_size,
            nn.functional.interpolate(pixels, size=(16, 16)),
            torch.stack(latents, dim=1)[:, steps],
            torch.stack(velocities, dim=1)[:, steps],
            noise[:, [1 + k for k in steps]],
            steps,
            schedule.fingerprint(),
        )

    def with_weights_of(self, other: LinearPolicy) -> LinearPolicy:
        policy = dataclasses.replace(self, module=LinearModel())
        policy.module.load_state_dict(other.module.state_dict())
        return policy


def number(example: Example) -> int:
    return zlib.crc32(example.prompt.encode()) % PROMPTS
