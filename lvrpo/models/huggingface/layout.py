"""From prompts and answers to one buffer as a model of transformers takes it: a `TokenBatch`.

A prompt stands once, with its pictures, and its answers hang below it. Positions are the model's
own: D = 1 of a model that counts tokens, D = 3 of one that numbers pictures in three directions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from lvrpo.masks import SpanMask

ROOT = -1


@dataclass(frozen=True)
class Prompt:
    """A prompt of P tokens.

    Attributes:
        token_ids: [P], those of pictures included.
        spans: (length, mode) of the chain that it is, see `SpanMask.from_groups`.
        position_ids: [D, P] int64.
        next_position: of the token that continues it, in all directions.
        types: other inputs of the model with a number per token, by name, [P] each.
        pictures: inputs of the model that belong to its pictures, by name.
    """

    token_ids: list[int]
    spans: list[tuple[int, str]]
    position_ids: Tensor
    next_position: int
    types: Mapping[str, Tensor] = field(default_factory=dict)
    pictures: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class TokenBatch:
    """A packed buffer of L rows; see `lvrpo.models.packs.Batch`."""

    token_ids: Tensor  # [L] int64
    position_ids: Tensor  # [D, L] int64
    mask: SpanMask
    types: Mapping[str, Tensor]  # [L] each
    pictures: Mapping[str, Tensor]  # of all prompts, in their order

    @property
    def rows(self) -> int:
        """L."""
        return len(self.token_ids)

    @property
    def text_rows(self) -> Tensor:
        """[L] int64: all of them, for every row has a hidden state."""
        return torch.arange(self.rows)

    @property
    def patch_rows(self) -> Tensor:
        """[0]: pictures are tokens of the text model, and patches are no rows."""
        return torch.arange(0)

    latent_rows = patch_rows

    def to(self, device: torch.device | str) -> TokenBatch:
        """The same batch with its tensors on `device`."""
        return TokenBatch(
            self.token_ids.to(device),
            self.position_ids.to(device),
            self.mask.to(device),
            {name: values.to(device) for name, values in self.types.items()},
            {name: values.to(device) for name, values in self.pictures.items()},
        )

    def inputs(self, dtype: torch.dtype) -> dict[str, Any]:
        """Keyword arguments of the model, for a batch of one sequence; pictures are of `dtype`."""
        return {
            "input_ids": self.token_ids[None],
            "position_ids": shaped_positions(self.position_ids),
            "span_mask": self.mask,
            **{name: values[None] for name, values in self.types.items()},
            **{
                name: values.to(dtype) if values.is_floating_point() else values
                for name, values in self.pictures.items()
            },
        }


def shaped_positions(position_ids: Tensor) -> Tensor:
    """[D, n] as models take them: [1, n], or [3, 1, n]."""
    return position_ids if len(position_ids) == 1 else position_ids[:, None]


@dataclass
class PromptBuilder:
    """Collects spans; `build` lays them out. See `lvrpo.models.packs.Builder`.

    Attributes:
        placeholders: tokens that hold the places of pictures. One that is sampled stands for no
            picture: the model reads `instead`, in the rollout as in the update.
        instead: see above.
    """

    placeholders: frozenset[int] = frozenset()
    instead: int = 0
    lengths: list[int] = field(default_factory=list)
    parents: list[int] = field(default_factory=list)
    modes: list[str] = field(default_factory=list)
    _token_ids: list[int] = field(default_factory=list)
    _positions: list[Tensor] = field(default_factory=list)
    _types: list[Mapping[str, Tensor]] = field(default_factory=list)
    _pictures: list[Mapping[str, Tensor]] = field(default_factory=list)
    _next: list[int] = field(default_factory=list)  # by span, the position of what continues it

    @property
    def rows(self) -> int:
        """Rows laid out so far."""
        return len(self._token_ids)

    def prompt(self, prompt: Prompt) -> int:
        """A prompt as a document of its own; returns the last of its spans."""
        parent, start = ROOT, 0
        for length, mode in prompt.spans:
            rows = slice(start, start + length)
            types = {name: values[rows] for name, values in prompt.types.items()}
            ids, positions = prompt.token_ids[rows], prompt.position_ids[:, rows]
            parent = self._add(ids, positions, types, parent, mode, prompt.next_position)
            start += length
        if prompt.pictures:
            self._pictures.append(prompt.pictures)
        return parent

    def text(self, token_ids: Sequence[int], parent: int) -> int:
        """A causal span of tokens."""
        count, first = len(token_ids), self._next[parent]
        ids = [self.instead if token in self.placeholders else token for token in token_ids]
        positions = torch.arange(first, first + count)[None]
        return self._add(ids, positions, {}, parent, "causal", first + count)

    def noise(self, height: int, width: int, parent: int) -> int:
        """Refused: there are no drawings.

        Raises:
            ValueError: always.
        """
        raise ValueError("a policy of transformers cannot draw, expected no groups of pictures")

    def append(self, other: PromptBuilder) -> int:
        """Everything that another builder holds, as documents of its own.

        Returns:
            The last of its spans, which is what completions of a prompt hang below.
        """
        span = len(self.lengths)
        self.lengths += other.lengths
        self.parents += [parent if parent == ROOT else span + parent for parent in other.parents]
        self.modes += other.modes
        self._token_ids += other._token_ids
        self._positions += other._positions
        self._types += other._types
        self._pictures += other._pictures
        self._next += other._next
        return len(self.lengths) - 1

    def build(self, latents: Tensor | None = None, timesteps: Tensor | None = None) -> TokenBatch:
        """Lay out everything that was added; without drawings there are no latents and no times.

        Raises:
            ValueError: nothing was added.
        """
        if not self.rows:
            raise ValueError("a packed buffer without rows: nothing was added to it")
        names = sorted({name for types in self._types for name in types})
        return TokenBatch(
            token_ids=torch.tensor(self._token_ids, dtype=torch.int64),
            position_ids=self.position_ids(),
            mask=self.mask(),
            types={name: self._type(name) for name in names},
            pictures=join_pictures(self._pictures),
        )

    def position_ids(self) -> Tensor:
        """[D, L] int64."""
        directions = max(len(positions) for positions in self._positions)
        return torch.cat([p.expand(directions, -1) for p in self._positions], dim=1)

    def mask(self) -> SpanMask:
        """Who sees whom."""
        return SpanMask.from_spans(self.lengths, self.parents, self.modes)

    def _type(self, name: str) -> Tensor:
        """[L]; an answer is text, whose type is 0."""
        parts = zip(self._types, self.lengths, strict=True)
        return torch.cat(
            [
                types[name] if name in types else torch.zeros(length, dtype=torch.int64)
                for types, length in parts
            ]
        )

    def _add(
        self,
        token_ids: Sequence[int],
        positions: Tensor,
        types: Mapping[str, Tensor],
        parent: int,
        mode: str,
        next_position: int,
    ) -> int:
        self.lengths.append(len(token_ids))
        self.parents.append(parent)
        self.modes.append(mode)
        self._token_ids.extend(token_ids)
        self._positions.append(positions)
        self._types.append(types)
        self._next.append(next_position)
        return len(self.lengths) - 1


def join_pictures(parts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The pictures of several prompts as those of one; the first dimension of each is counted.

    Where sizes differ, zeros fill up as the processors of transformers do between the prompts of a
    batch: what tells the model of them (a mask, the size of each picture) is among the inputs.
    """
    joined = {}
    for name in dict.fromkeys(name for part in parts for name in part):
        values = [part[name] for part in parts if name in part]
        largest = [max(sizes) for sizes in zip(*(value.shape[1:] for value in values), strict=True)]
        joined[name] = torch.cat([_filled(value, largest) for value in values])
    return joined


def _filled(values: Tensor, sizes: Sequence[int]) -> Tensor:
    """Zeros at the end of every dimension but the first, up to `sizes`."""
    missing = [size - there for size, there in zip(sizes, values.shape[1:], strict=True)]
    if not any(missing):
        return values
    return pad(values, [n for size in reversed(missing) for n in (0, size)])
