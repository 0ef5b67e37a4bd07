"""Answers of a group, token by token: the keys and values of a prompt serve all of them.

All prompts and answers are one buffer. An answer has room for a block of tokens; when a block is
full the buffer is laid out anew, without the answers that came to their end. A position costs work
that grows with the answers that go on, beside the attention to what they have.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lvrpo.masks.positions import bagel_position_ids
from lvrpo.models.unified.cache import take_rows
from lvrpo.models.unified.layout import PackBuilder
from lvrpo.models.unified.model import KVCache, PackedModel

#: Tokens that an answer has room for before the buffer is laid out anew.
BLOCK = 64


class Decoding:
    """Hidden states of answers that grow together.

    Args:
        model: evaluates the rows.
        new_builder: makes an empty buffer.
        prompts: P of them, each a buffer of its own; computed at once.
        group_size: answers of each, that of prompt p and sample g at p * group_size + g.
        max_tokens: of an answer.
        backend: of `packed_attention`.

    Attributes:
        hidden: [R, hidden] of the rows that predict the next tokens.
        row_index: [n] int64, the row of `hidden` of every answer that goes on.
    """

    hidden: Tensor
    row_index: Tensor

    def __init__(
        self,
        model: PackedModel,
        new_builder: Callable[[], PackBuilder],
        prompts: Sequence[PackBuilder],
        group_size: int,
        max_tokens: int,
        backend: str | None,
    ) -> None:
        self.model, self.new_builder = model, new_builder
        self.prompts, self.group_size = prompts, group_size
        self.max_tokens, self.backend = max_tokens, backend
        weight = model.head.weight
        self.device = weight.device
        lengths = [prompt.rows for prompt in prompts]
        self._prompt_starts = [0, *itertools.accumulate(lengths[:-1])]  # by prompt, its first row
        builder = new_builder()
        for prompt in prompts:
            builder.append(prompt)
        layout = builder.build()
        self.cache = KVCache(model.config, layout.rows, weight)
        rows = torch.arange(layout.rows)
        text, _ = model(layout.to(self.device), self.cache, rows.to(self.device), backend=backend)
        last = torch.tensor(lengths).cumsum(0) - 1
        self.hidden = text[torch.searchsorted(layout.text_rows, last).to(self.device)]
        self.row_index = torch.arange(len(prompts)).repeat_interleave(group_size).to(self.device)
        #: A batch of no rows, to be replaced by those of tokens.
        self._nothing = take_rows(layout, rows[:0]).to(self.device)
        self._position = 0  # tokens that every answer has in the cache
        self._room = 0  # tokens that every answer has rows for
        self._starts = torch.zeros(len(prompts) * group_size, dtype=torch.int64)  # by answer

    def append(self, ids: Tensor, active: Tensor) -> None:
        """A token for every answer that goes on, and the hidden states of the next ones.

        Args:
            ids: [n] int64, on the device.
            active: [n] int64, ascending, on the host: which answers those are.
        """
        if self._position == self._room:
            self._lay_out(active.tolist())
        rows = self._starts[active] + self._position
        there = rows.to(self.device)
        self.row_index = torch.arange(len(ids), device=self.device)
        batch = dataclasses.replace(
            self._nothing,
            token_ids=ids,
            text_rows=self.row_index,
            position_ids=self._position_ids[there],
            mask=self._mask.select_queries(rows),
        )
        self.hidden, _ = self.model(batch, self.cache, there, backend=self.backend)
        self._position += 1

    def _lay_out(self, active: Sequence[int]) -> None:
        """Room for a block more, for the answers that go on and their prompts."""
        self._room = min(self._room + BLOCK, self.max_tokens)
        builder, old, new = self.new_builder(), [], []

        def keep(first: int, count: int) -> None:
            """The rows from `first` on, as those that are laid out next."""
            old.append(torch.arange(first, first + count))
            new.append(torch.arange(builder.rows, builder.rows + count))

        for number, answers in itertools.groupby(active, lambda answer: answer // self.group_size):
            prompt = self.prompts[number]
            keep(self._prompt_starts[number], prompt.rows)
            self._prompt_starts[number] = builder.rows
            parent = builder.append(prompt)
            for answer in answers:
                keep(int(self._starts[answer]), self._position)
                self._starts[answer] = builder.rows
                builder.text([0] * self._room, parent)
        there, here = (torch.cat(rows).to(self.device) for rows in (old, new))
        self.cache.move(there, here, builder.rows)
        mask = builder.mask()
        self._position_ids = bagel_position_ids(mask).to(self.device)
        self._mask = mask.to(self.device)
