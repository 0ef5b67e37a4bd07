"""Sample groups: G answers per question, G pictures per drawing prompt.

A prompt is computed once; its keys and values serve the whole group and all denoising steps. Random
numbers come from counter-based streams keyed by (seed, step, prompt, sample), so a sample does not
depend on what else is in the batch.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch
from torch import Tensor

from lvrpo import random
from lvrpo.data.example import Example
from lvrpo.models.flow import FlowSchedule
from lvrpo.models.unified.policy import CachedPass, Policy, take_rows
from lvrpo.models.unified.tokenizer import EOS
from lvrpo.ops.flow_step import flow_step
from lvrpo.ops.gather_logprobs import gather_logprobs
from lvrpo.rewards.samples import FinishReason


class DivergedError(RuntimeError):
    """What the policy sampled, or its gradient, is not finite."""


@dataclass(frozen=True)
class Answers:
    """Sampled texts, group by group: sample g of prompt p is at p * G + g if none was left out."""

    examples: list[Example]  # [P]
    group_size: int
    token_ids: list[list[int]]  # [P * G] sampled tokens, the end token included
    texts: list[str]  # [P * G]
    logprobs: Tensor  # [T] nats, of all tokens one after the other
    sizes: Sequence[int] = ()  # [P] samples of each prompt, where not all of a group are left

    @property
    def finish_reasons(self) -> list[FinishReason]:
        """[P * G]: "end" after an end token, "length" where the limit of tokens cut the answer."""
        return ["end" if ids[-1] == EOS else "length" for ids in self.token_ids]

    def groups(self) -> list[tuple[Example, list[list[int]]]]:
        """Every prompt that has samples, with their tokens."""
        sizes = self.sizes or [self.group_size] * len(self.examples)
        tokens = iter(self.token_ids)
        return [
            (example, list(islice(tokens, size)))
            for example, size in zip(self.examples, sizes, strict=True)
            if size
        ]

    def where(self, kept: Tensor) -> Answers:
        """The samples for which `kept`, [P * G] bool, holds; a group keeps its place."""
        lengths = torch.tensor([len(ids) for ids in self.token_ids])
        chosen = kept.nonzero().flatten().tolist()
        return dataclasses.replace(
            self,
            token_ids=[self.token_ids[i] for i in chosen],
            texts=[self.texts[i] for i in chosen],
            logprobs=self.logprobs[kept.repeat_interleave(lengths)],
            sizes=kept.view(-1, self.group_size).sum(dim=1).tolist(),
        )


@dataclass(frozen=True)
class Pictures:
    """Sampled pictures and the stochastic steps they took; same order as `Answers`.

    N = P * G pictures, K stochastic steps, n latent tokens of c numbers.
    """

    examples: list[Example]  # [P]
    group_size: int
    images: Tensor  # [N, C, H, W] in [0, 1]
    latents: Tensor  # [N, K, n, c] x_t before each stochastic step
    velocities: Tensor  # [N, K, n, c] of the sampling weights
    noise: Tensor  # [N, K, n, c] that each step drew
    steps: list[int]  # [K] step numbers in the schedule
    fingerprint: str  # of the schedule


@torch.no_grad()
def sample_answers(
    policy: Policy,
    examples: Sequence[Example],
    group_size: int,
    *,
    max_tokens: int,
    temperature: float,
    seed: int,
    step: int,
) -> Answers:
    """Sample `group_size` answers to every question, each until its end token or `max_tokens`.

    Raises:
        DivergedError: the model's logits are not finite.
    """
    builder = policy.builder()
    last_prompt_row: list[int] = []
    child_start: list[int] = []
    prompt_rows: list[int] = []
    for example in examples:
        first = builder.rows
        prompt = policy.add_prompt(builder, example)
        prompt_rows.extend(range(first, builder.rows))
        for _ in range(group_size):
            last_prompt_row.append(builder.end(prompt) - 1)
            child = builder.text([0] * max_tokens, prompt)
            child_start.append(builder.start(child))
    layout = builder.build()
    run = CachedPass(policy, layout, torch.tensor(prompt_rows))

    uniform = random.uniform(_streams("answer", examples, group_size, seed, step), (max_tokens,))
    # The row of the prompts' text hidden states that predicts each sample's first token.
    prompt_text_rows = layout.text_rows[torch.isin(layout.text_rows, torch.tensor(prompt_rows))]
    source = torch.searchsorted(prompt_text_rows, torch.tensor(last_prompt_row))
    hidden, row_index = run.prompt_text, source
    starts = torch.tensor(child_start)
    active = torch.arange(len(starts))
    tokens: list[list[int]] = [[] for _ in starts]
    logprobs: list[list[float]] = [[] for _ in starts]
    for position in range(max_tokens):
        ids, token_logprobs = _sample_tokens(
            policy, hidden, row_index, uniform[active, position], temperature, step
        )
        for sample, token, logprob in zip(
            active.tolist(), ids.tolist(), token_logprobs.tolist(), strict=True
        ):
            tokens[sample].append(token)
            logprobs[sample].append(logprob)
        going_on = ids != EOS
        active = active[going_on]
        if position + 1 == max_tokens or not len(active):
            break
        rows = starts[active] + position
        batch = dataclasses.replace(take_rows(layout, rows), token_ids=ids[going_on])
        hidden, _ = run.run(batch, rows)
        row_index = torch.arange(len(active))
    return Answers(
        examples=list(examples),
        group_size=group_size,
        token_ids=tokens,
        texts=[policy.decode_answer(ids) for ids in tokens],
        logprobs=torch.tensor([value for sample in logprobs for value in sample]),
    )


def _sample_tokens(
    policy: Policy,
    hidden: Tensor,
    row_index: Tensor,
    uniform: Tensor,
    temperature: float,
    step: int,
) -> tuple[Tensor, Tensor]:
    """Draw one token per entry of `row_index` by inverting the cumulative distribution."""
    used, inverse = row_index.unique(return_inverse=True)
    logits = policy.model.logits(hidden[used])
    low, high = policy.answer_range
    probabilities = (logits[:, low:high].double() / temperature).softmax(dim=-1)
    cumulative = probabilities.cumsum(dim=-1)[inverse]
    _check_finite("log-probs", cumulative[:, -1], step)
    ids = torch.searchsorted(cumulative, uniform.double()[:, None]).squeeze(1)
    ids = ids.clamp(max=high - low - 1) + low
    logprobs = gather_logprobs(
        logits,
        ids,
        inverse,
        temperature=temperature,
        vocab_range=(low, high),
        backend=policy.backend,
    )
    return ids, logprobs


@torch.no_grad()
def sample_pictures(
    policy: Policy,
    examples: Sequence[Example],
    group_size: int,
    schedule: FlowSchedule,
    *,
    seed: int,
    step: int,
) -> Pictures:
    """Denoise `group_size` pictures for every drawing prompt.

    Raises:
        DivergedError: what the model drew is not finite.
    """
    builder = policy.builder()
    prompt_rows: list[int] = []
    for example in examples:
        first = builder.rows
        prompt = policy.add_prompt(builder, example)
        prompt_rows.extend(range(first, builder.rows))
        for _ in range(group_size):
            builder.noise(*policy.latent_grid, parent=prompt)
    layout = builder.build()
    run = CachedPass(policy, layout, torch.tensor(prompt_rows))
    rows = layout.latent_rows
    batch = take_rows(layout, rows)

    # One draw holds a sample's starting noise and then the noise of each step.
    drawn = random.normal(
        _streams("picture", examples, group_size, seed, step),
        (1 + schedule.num_steps, *policy.latent_shape),
    )
    x = drawn[:, 0]
    latents, velocities, noise, steps = [], [], [], []
    for k in range(schedule.num_steps):
        coefficients = schedule.coefficients(k)
        velocity = run.run_latents(batch, rows, x, float(schedule.times[k]))
        stochastic = k in schedule.stochastic_steps
        z = drawn[:, 1 + k] if stochastic else None
        if stochastic:
            latents.append(x)
            velocities.append(velocity)
            noise.append(drawn[:, 1 + k])
            steps.append(k)
        x, _ = flow_step(velocity, x, coefficients, z, backend=policy.backend)
    _check_finite("drawings", x, step)  # decoding clips to [0, 1] and would hide an infinity
    return Pictures(
        examples=list(examples),
        group_size=group_size,
        images=policy.autoencoder.decode(x).clamp(0, 1),
        latents=torch.stack(latents, dim=1) if latents else x.new_zeros(len(x), 0, *x.shape[1:]),
        velocities=torch.stack(velocities, dim=1) if latents else x.new_zeros(0),
        noise=torch.stack(noise, dim=1) if latents else x.new_zeros(0),
        steps=steps,
        fingerprint=schedule.fingerprint(),
    )


def _check_finite(what: str, values: Tensor, step: int) -> None:
    """Broken weights show here first: whoever looks at the samples next would be blamed."""
    if bool(values.isfinite().all()):
        return
    at = f"step {step}: " if step > 0 else ""
    raise DivergedError(
        f"{at}the policy's {what} are not finite: its weights have diverged; a lower optimizer.lr "
        "or optimizer.grad_clip may help; the checkpoints before it are kept"
    )


def _streams(
    kind: str, examples: Sequence[Example], group_size: int, seed: int, step: int
) -> list[np.random.Generator]:
    """One stream per sample; a prompt that comes twice goes on counting, so its samples differ."""
    streams = []
    taken: Counter[str] = Counter()
    for example in examples:
        for _ in range(group_size):
            streams.append(random.stream(seed, kind, step, example.uid, taken[example.uid]))
            taken[example.uid] += 1
    return streams
