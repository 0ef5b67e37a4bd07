"""How a token is drawn from logits: greedily, by temperature, from a truncated distribution.

The order is that of transformers' `generate`: repetition penalty, logit processors, tokens that may
not come yet, temperature, top-k, top-p, min-p. A uniform number then picks the token by the inverse
of the cumulative distribution, so that a draw depends on its own row and number alone. Nothing is
read on the host.

n rows to draw for, V tokens of the vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from lvrpo.dtypes import widen

#: (ids [n, t] int64 that a row has so far, without its prompt; logits [n, V]) -> logits [n, V].
LogitProcessor: TypeAlias = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How answers are sampled. The defaults sample the policy's own distribution.

    Attributes:
        max_tokens: of an answer, the end token included.
        min_tokens: that come before an answer may end or be stopped.
        temperature: that logits are divided by. 0 is greedy: the likeliest token, of equal ones
            that with the lowest id, whatever the seed.
        top_k: the k likeliest tokens are kept, and those as likely as the last of them; 0: all.
        top_p: the fewest tokens are kept whose probabilities add up to this, the likeliest first
            and of equal ones that with the lowest id; 1: all.
        min_p: tokens are kept that are at least this times as likely as the likeliest; 0: all.
        repetition_penalty: of a token that the prompt or the answer has already: a positive logit
            is divided by it, a negative one multiplied (https://arxiv.org/abs/1909.05858); 1: none.
        stop: strings that end an answer, whose text is cut before them.
        stop_token_ids: tokens that end an answer as its end token does, beside that.
        logit_processors: see `LogitProcessor`, applied in this order. A token whose logit becomes
            -inf is not drawn.

    Raises:
        ValueError: a value is outside its range; names it.
    """

    max_tokens: int
    min_tokens: int = 0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    logit_processors: tuple[LogitProcessor, ...] = ()

    def __post_init__(self) -> None:
        for name, holds, expected in (
            ("max_tokens", self.max_tokens >= 1, "at least 1"),
            (
                "min_tokens",
                0 <= self.min_tokens <= self.max_tokens,
                f"0 to max_tokens = {self.max_tokens}",
            ),
            ("temperature", 0 <= self.temperature < math.inf, "a finite number, 0 or more"),
            ("top_k", self.top_k >= 0, "0 for all tokens, or how many to keep"),
            ("top_p", 0 < self.top_p <= 1, "a number in (0, 1]"),
            ("min_p", 0 <= self.min_p <= 1, "a number in [0, 1]"),
            (
                "repetition_penalty",
                0 < self.repetition_penalty < math.inf,
                "a finite number above 0",
            ),
            ("stop", _is_tuple(self.stop, str) and "" not in self.stop, "a tuple of strings"),
            ("stop_token_ids", _is_tuple(self.stop_token_ids, int), "a tuple of token ids"),
            (
                "logit_processors",
                isinstance(self.logit_processors, tuple)
                and all(map(callable, self.logit_processors)),
                "a tuple of functions of (ids, logits)",
            ),
        ):
            if not holds:
                found = getattr(self, name)
                raise ValueError(f"Sampling: {name} is {found!r}, expected {expected}")

    @property
    def changes(self) -> tuple[str, ...]:
        """Options by which a sampled token is not one of softmax(logits / temperature)."""
        off = {"min_tokens": 0, "repetition_penalty": 1.0, "logit_processors": ()}
        if self.temperature:
            off |= {"top_k": 0, "top_p": 1.0, "min_p": 0.0}
        return tuple(name for name, value in off.items() if getattr(self, name) != value)


class SampledFrom(NamedTuple):
    """Of T tokens, the distribution they were drawn from, next to softmax(logits / temperature)."""

    logprobs: Tensor  # [T] nats, of the drawn tokens in the distribution they were drawn from
    kept_mass: Tensor  # [T] probability, before it was changed, of the tokens that could be drawn
    differs: Tensor  # [T] bool, whether it was changed at all


class Drawn(NamedTuple):
    """A token per row."""

    ids: Tensor  # [n] int64
    are_finite: Tensor  # [] bool, whether softmax(logits / temperature) is a distribution
    are_possible: Tensor  # [] bool, whether options left every row a token to draw
    sampled_from: SampledFrom | None  # None for greedy tokens, and where no option changes it


def draw_tokens(
    logits: Tensor,
    uniform: Tensor,
    sampling: Sampling,
    *,
    vocab_range: tuple[int, int],
    prompts: Tensor | None = None,
    generated: Tensor | None = None,
    forbidden: Tensor | None = None,
) -> Drawn:
    """Draw a token for every row.

    Args:
        logits: [n, V] floating.
        uniform: [n] in [0, 1).
        sampling: how.
        vocab_range: [low, high) of the tokens that may be drawn.
        prompts: [n, l] int64, tokens that count as repeated; any of them may stand twice. Needed
            for a repetition penalty.
        generated: [n, t] int64, tokens of the answer so far; needed for a repetition penalty and
            for logit processors.
        forbidden: [e] int64, tokens that may not be drawn now.

    Raises:
        ValueError: a logit processor returned logits of another shape.
    """
    low, high = vocab_range
    temperature = sampling.temperature or 1.0
    plain = logits[:, low:high].double() / temperature
    scores = plain
    if sampling.changes or forbidden is not None:
        changed = process_logits(logits, sampling, prompts, generated, forbidden)
        scores = changed[:, low:high].double() / temperature
    if not sampling.temperature:
        are_possible = scores.amax(dim=-1).isfinite().all()
        are_finite = plain.softmax(dim=-1).sum(dim=-1).isfinite().all()
        return Drawn(scores.argmax(dim=-1) + low, are_finite, are_possible, None)
    kept = truncate_logits(scores, sampling)
    probs = kept.softmax(dim=-1)
    cumulative = probs.cumsum(dim=-1)
    total = cumulative[:, -1:]
    # A token of probability 0 has no width: to its right is the next one. The product is below the
    # last sum, which rounding may have put below the number.
    at = torch.searchsorted(cumulative, uniform.double()[:, None] * total, right=True)
    at = at.clamp(max=high - low - 1)
    ids, are_possible = at.squeeze(1) + low, total.isfinite().all()
    if kept is plain:
        return Drawn(ids, are_possible, are_possible, None)
    before = plain.softmax(dim=-1)
    sampled_from = SampledFrom(
        kept.log_softmax(dim=-1).gather(1, at).squeeze(1),
        before.where(kept > -math.inf, 0.0).sum(dim=-1),
        (kept != plain).any(dim=-1),
    )
    return Drawn(ids, before.sum(dim=-1).isfinite().all(), are_possible, sampled_from)


def process_logits(
    logits: Tensor,
    sampling: Sampling,
    prompts: Tensor | None,
    generated: Tensor | None,
    forbidden: Tensor | None,
) -> Tensor:
    """What comes before the temperature: [n, V] in fp32 or fp64, see `draw_tokens`."""
    scores = widen(logits)
    if sampling.repetition_penalty != 1:
        assert prompts is not None
        assert generated is not None
        scores = penalize_repetition(
            scores, torch.cat([prompts, generated], dim=1), sampling.repetition_penalty
        )
    for processor in sampling.logit_processors:
        assert generated is not None
        processed = processor(generated, scores)
        if processed.shape != scores.shape:
            raise ValueError(
                f"Sampling: a logit processor returned logits {list(processed.shape)}, expected "
                f"{list(scores.shape)}"
            )
        scores = processed
    return scores if forbidden is None else scores.index_fill(1, forbidden, -math.inf)


def penalize_repetition(scores: Tensor, ids: Tensor, penalty: float) -> Tensor:
    """Divide positive logits [n, V] of the tokens `ids` [n, t] by `penalty`, multiply others."""
    seen = scores.gather(1, ids)
    return scores.scatter(1, ids, torch.where(seen < 0, seen * penalty, seen / penalty))


def truncate_logits(scores: Tensor, sampling: Sampling) -> Tensor:
    """Logits [n, V] with -inf for what top-k, top-p and min-p leave out, one after the other.

    The likeliest token is always kept. With all three off it is `scores` itself.
    """
    if 0 < sampling.top_k < scores.shape[-1]:
        last = scores.topk(sampling.top_k, dim=-1).values[:, -1:]
        scores = scores.masked_fill(scores < last, -math.inf)
    if sampling.top_p < 1:
        probs, order = scores.softmax(dim=-1).sort(dim=-1, descending=True, stable=True)
        before = probs.cumsum(dim=-1) - probs
        left_out = before >= sampling.top_p
        scores = scores.masked_fill(left_out.scatter(1, order, left_out), -math.inf)
    if sampling.min_p > 0:
        probs = scores.softmax(dim=-1)
        least = sampling.min_p * probs.amax(dim=-1, keepdim=True)
        scores = scores.masked_fill(probs < least, -math.inf)
    return scores


def _is_tuple(values: object, kind: type) -> bool:
    return isinstance(values, tuple) and all(isinstance(value, kind) for value in values)
