"""The answers of a batch, token by token: who goes on, what a token's log-prob was, why one ended.

A model family brings the logits of the next tokens; everything else of sampling texts is here. The
host reads once per position.

n samples that go on, V tokens of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lvrpo import random
from lvrpo.data.example import Example, FinishReason
from lvrpo.models.protocol import Answers, DivergedError, sample_streams
from lvrpo.models.sampling import Drawn, SampledFrom, Sampling, draw_tokens
from lvrpo.ops.gather_logprobs import gather_logprobs

#: More tokens of an answer's end than a stop string has bytes are decoded to look for it: what a
#: decoder does at the beginning of a text, such as leaving out a space, is over by then.
STOP_MARGIN = 8


class Continued(NamedTuple):
    """The samples that go on after a token, m of the n that it was drawn for."""

    ids: Tensor  # [m] int64, their tokens, on the device
    kept: Tensor  # [m] int64, ascending, which of the n they are, on the host


class AnswerSampler:
    """Draws the tokens of `group_size` answers to every prompt, sample g of prompt p at p * G + g.

    Call `draw` with the logits of the first tokens, then with those of the samples that go on until
    none does, then `answers`.

    Args:
        examples: the prompts, P of them.
        group_size: G, samples of each.
        sampling: how.
        prompt_ids: [P] tokens of every prompt, at least one, which a repetition penalty counts.
        vocab_range: [low, high) of the tokens that answers may hold.
        end_ids: tokens that end an answer, at least one.
        decode: the text of tokens, of which none has ended the answer.
        device: of the logits.
        seed: of the samples.
        step: keys their streams too.
        backend: of `gather_logprobs`.

    Raises:
        ValueError: a token of `sampling.stop_token_ids` is none that answers may hold.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        group_size: int,
        sampling: Sampling,
        *,
        prompt_ids: Sequence[Sequence[int]],
        vocab_range: tuple[int, int],
        end_ids: Collection[int],
        decode: Callable[[Sequence[int]], str],
        device: torch.device,
        seed: int,
        step: int,
        backend: str | None,
    ) -> None:
        low, high = vocab_range
        for token in sampling.stop_token_ids:
            if not low <= token < high:
                raise ValueError(
                    f"Sampling: stop_token_ids has {token}, expected tokens in [{low}, {high}), of "
                    "which answers are sampled"
                )
        self.examples, self.group_size, self.sampling = list(examples), group_size, sampling
        self.vocab_range, self.end_ids, self.decode = vocab_range, frozenset(end_ids), decode
        self.step, self.backend = step, backend
        streams = sample_streams("answer", examples, group_size, seed, step)
        self._uniform = random.uniform(streams, (sampling.max_tokens,)).to(device)
        ending = sorted({*end_ids, *sampling.stop_token_ids})
        self._ending = torch.tensor(ending, dtype=torch.int64).to(device)
        self._prompts = self._generated = None
        if sampling.repetition_penalty != 1:
            self._prompts = _padded(prompt_ids).repeat_interleave(group_size, dim=0).to(device)
        if sampling.repetition_penalty != 1 or sampling.logit_processors:
            self._generated = self._ending.new_empty(len(streams), 0)
        #: [n] int64 on the host, ascending: the samples that go on
        self.active = torch.arange(len(streams))
        self.position = 0  # tokens that they have
        self._token_ids: list[list[int]] = [[] for _ in streams]
        self._texts = [""] * len(streams)
        self._finish_reasons: list[FinishReason] = ["length"] * len(streams)
        self._places: list[Tensor] = []
        self._logprobs: list[Tensor] = []
        self._sampled_from: list[SampledFrom] = []

    def draw(self, logits: Tensor, row_index: Tensor) -> Continued:
        """Draw the next token of every sample that goes on.

        Args:
            logits: [R, V] floating.
            row_index: [n] int64, the row of each sample in `active`, on the device.

        Raises:
            DivergedError: the logits are not finite.
            ValueError: the logit processors leave a sample no token.
        """
        sampling, position = self.sampling, self.position
        at = self.active.to(logits.device)
        drawn = draw_tokens(
            logits[row_index],
            self._uniform[at, position],
            sampling,
            vocab_range=self.vocab_range,
            prompts=self._prompts,
            generated=self._generated,
            forbidden=self._ending if position < sampling.min_tokens else None,
        )
        ids = self._read(drawn)
        self._logprobs.append(
            gather_logprobs(
                logits,
                drawn.ids,
                row_index,
                temperature=sampling.temperature or 1.0,
                vocab_range=self.vocab_range,
                backend=self.backend,
            )
        )
        if drawn.sampled_from is not None:
            self._sampled_from.append(drawn.sampled_from)
        self._places.append(self.active * sampling.max_tokens + position)
        self.position += 1
        going_on = [
            not self._ends(sample, token)
            for sample, token in zip(self.active.tolist(), ids, strict=True)
        ]
        kept = torch.tensor(going_on).nonzero().flatten()
        self.active = self.active[kept]
        there = kept.to(logits.device)
        if self._generated is not None:
            self._generated = torch.cat([self._generated, drawn.ids[:, None]], dim=1)[there]
        if self._prompts is not None:
            self._prompts = self._prompts[there]
        return Continued(drawn.ids[there], kept)

    def answers(self) -> Answers:
        """All of them, when none goes on."""
        order = torch.cat(self._places).argsort()
        logprobs = torch.cat(self._logprobs)
        order = order.to(logprobs.device)
        sampled_from = None
        if self._sampled_from:
            sampled_logprobs, *others = map(torch.cat, zip(*self._sampled_from, strict=True))
            sampled_from = SampledFrom(sampled_logprobs.to(logprobs.dtype), *others)
            sampled_from = SampledFrom(*(values[order] for values in sampled_from))
        return Answers(
            examples=self.examples,
            group_size=self.group_size,
            token_ids=self._token_ids,
            texts=self._texts,
            logprobs=logprobs[order],
            finish_reasons=self._finish_reasons,
            sampled_from=sampled_from,
        )

    def _read(self, drawn: Drawn) -> list[int]:
        """The tokens, on the host; whoever looked at broken ones next would be blamed."""
        checks = torch.stack([drawn.are_finite, drawn.are_possible]).to(drawn.ids)
        *ids, are_finite, are_possible = torch.cat([drawn.ids, checks]).tolist()
        if not are_finite:
            raise DivergedError.of_samples("log-probs", self.step)
        if not are_possible:
            changes = ", ".join(self.sampling.changes)
            raise ValueError(
                f"Sampling: token {self.position} of an answer cannot be drawn: {changes} left no "
                "token with a finite logit; at least one has to stay"
            )
        return ids

    def _ends(self, sample: int, token: int) -> bool:
        """Append a token to an answer; whether that was its last one."""
        ids = self._token_ids[sample]
        ids.append(token)
        if token in self.end_ids or token in self.sampling.stop_token_ids:
            self._texts[sample] = self.decode(ids[:-1])
            self._finish_reasons[sample] = "end" if token in self.end_ids else "stop"
            return True
        text = self._before_stop(ids)
        if text is not None:
            self._texts[sample], self._finish_reasons[sample] = text, "stop"
            return True
        if self.position == self.sampling.max_tokens:
            self._texts[sample] = self.decode(ids)
            return True
        return False

    def _before_stop(self, ids: list[int]) -> str | None:
        """The text before the first stop string that ends after the first `min_tokens` tokens."""
        stops = self.sampling.stop
        if not stops:
            return None
        newest = self.decode(ids[-max(len(stop.encode()) for stop in stops) - STOP_MARGIN :])
        if not any(stop in newest for stop in stops):
            return None
        text = self.decode(ids)
        early = len(self.decode(ids[: self.sampling.min_tokens]))
        found = [text.find(stop, max(0, early - len(stop) + 1)) for stop in stops]
        return text[: min(at for at in found if at >= 0)] if max(found) >= 0 else None


def _padded(rows: Sequence[Sequence[int]]) -> Tensor:
    """[P, l] int64: every row, and then its first entry again up to the length of the longest."""
    longest = max(map(len, rows))
    return torch.tensor([[*row, *[row[0]] * (longest - len(row))] for row in rows])
