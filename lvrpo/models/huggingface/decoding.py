"""Answers of a group, token by token: the keys and values of a prompt serve all of them.

All prompts and answers are one buffer. An answer has room for a block of tokens; when a block is
full the buffer is laid out anew, without the answers that came to their end.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from lvrpo.integrations.transformers.completions import CompletionStates, completion_states
from lvrpo.models.huggingface.layout import Prompt, PromptBuilder, shaped_positions

#: Tokens that an answer has room for before the buffer is laid out anew.
BLOCK = 64


class Decoding:
    """Logits of answers that grow together.

    Args:
        model: of transformers, with the attention "lvrpo".
        new_builder: makes an empty buffer.
        prompts: P of them; computed at once.
        group_size: answers of each, that of prompt p and sample g at p * group_size + g.

    Attributes:
        logits: [R, V] of the next tokens.
        row_index: [n] int64, the row of `logits` of every answer that goes on.
    """

    logits: Tensor
    row_index: Tensor

    def __init__(
        self,
        model: Any,
        new_builder: Callable[[], PromptBuilder],
        prompts: Sequence[Prompt],
        group_size: int,
    ) -> None:
        from lvrpo.integrations.transformers.cache import RowCache

        self.model, self.new_builder = model, new_builder
        self.prompts, self.group_size = prompts, group_size
        weight = model.get_input_embeddings().weight
        self.device = weight.device
        builder, starts = new_builder(), []
        for prompt in prompts:
            starts.append(builder.rows)
            builder.prompt(prompt)
        self.cache = RowCache(builder.rows)
        self.cache.rows = torch.arange(builder.rows, device=self.device)
        ends = torch.tensor([*starts[1:], builder.rows]).to(self.device)
        self.logits = self._run(builder.build().to(self.device).inputs(weight.dtype), ends - 1)
        placeholders = torch.tensor([*builder.placeholders], dtype=torch.int64)
        self._placeholders = placeholders.to(self.device)
        self._instead = builder.instead
        each = torch.arange(len(prompts), device=self.device)
        self.row_index = each.repeat_interleave(group_size)
        self._position = 0  # tokens that every answer has in the cache
        self._room = 0  # tokens that every answer has rows for
        self._prompt_starts = starts  # by prompt, its first row
        self._starts = torch.zeros(len(prompts) * group_size, dtype=torch.int64)  # by answer

    def append(self, ids: Tensor, active: Tensor) -> None:
        """A token for every answer that goes on, and the logits of the next ones.

        Args:
            ids: [n] int64, on the device.
            active: [n] int64, ascending, on the host: which answers those are.
        """
        if self._position == self._room:
            self._lay_out(active.tolist())
        rows = self._starts[active] + self._position
        self.cache.rows = rows.to(self.device)
        read = ids.masked_fill(torch.isin(ids, self._placeholders), self._instead)
        inputs = {
            "input_ids": read[None],
            "position_ids": shaped_positions(self._position_ids[:, self.cache.rows]),
            "span_mask": self._mask.select_queries(rows).to(self.device),
        }
        self.row_index = torch.arange(len(ids), device=self.device)
        self.logits = self._run(inputs, self.row_index)
        self._position += 1

    def _lay_out(self, active: Sequence[int]) -> None:
        """Room for a block more, for the answers that go on and their prompts."""
        self._room += BLOCK
        builder, old, new = self.new_builder(), [], []

        def keep(first: int, count: int) -> None:
            """The rows from `first` on, as those that are laid out next."""
            old.append(torch.arange(first, first + count))
            new.append(torch.arange(builder.rows, builder.rows + count))

        for number, answers in itertools.groupby(active, lambda answer: answer // self.group_size):
            prompt = self.prompts[number]
            keep(self._prompt_starts[number], len(prompt.token_ids))
            self._prompt_starts[number] = builder.rows
            parent = builder.prompt(prompt)
            for answer in answers:
                keep(int(self._starts[answer]), self._position)
                self._starts[answer] = builder.rows
                builder.text([0] * self._room, parent)
        there, here = (torch.cat(rows).to(self.device) for rows in (old, new))
        self.cache.move(there, here, builder.rows)
        self._position_ids = builder.position_ids().to(self.device)
        self._mask = builder.mask()

    def _run(self, inputs: dict[str, Any], rows: Tensor) -> Tensor:
        """Logits of some of the rows that a forward computes."""
        states = completion_states(self.model, {**inputs, "cache": self.cache, "use_cache": True})
        return logits_of(states, states.hidden[0, rows])


def logits_of(states: CompletionStates, hidden: Tensor) -> Tensor:
    """[n, V] of hidden states [n, H], as the model itself would have them."""
    logits = torch.nn.functional.linear(hidden, states.weight, states.bias) * states.logit_scale
    if states.softcap is None:
        return logits
    return states.softcap * torch.tanh(logits / states.softcap)
