"""Lay groups out for training: each prompt once, its completions as its children.

Text: the last prompt row predicts the first token of all completions, and row t of a child predicts
its token t + 1. Pictures: every noisy picture (a denoising step of a sample, or a draw of noise in
supervised training) is a leaf under the prompt, so one forward pass evaluates all of them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol, get_args

import torch
from torch import Tensor

from lvrpo.data.example import Example
from lvrpo.masks import SpanMask
from lvrpo.masks.positions import target_index
from lvrpo.ops.guided_velocity import guided_velocity
from lvrpo.params.flow import GuidanceParams

#: A prompt and the tokens of each of its completions.
TextGroup = tuple[Example, Sequence[Sequence[int]]]
#: A prompt and how many noisy pictures hang below it.
PictureGroup = tuple[Example, int]
#: What of its prompt a noisy picture hangs below: guidance takes some away.
Branch = Literal["whole", "without words", "without pictures"]
#: The number of a noisy picture, and the branch that it is laid out in.
LaidOut = tuple[int, Branch]


class GuidedPictures(NamedTuple):
    """Noisy pictures whose velocity is guided, by those of the same picture with less before it.

    That is without its words, and where `guided_by_image` says so without its input images, too.
    """

    params: GuidanceParams
    which: Tensor  # [M_total] bool, on the host


def guided_by_image(params: GuidanceParams, example: Example) -> bool:
    """Whether guidance takes the velocity without input images: there are some, and a scale."""
    return params.image_scale != 1 and bool(example.images)


class Batch(Protocol):
    """A packed buffer as the model of its family takes it."""

    @property
    def rows(self) -> int:
        """L."""

    def to(self, device: torch.device | str) -> Batch:
        """The same batch with its tensors on `device`."""


class SpanBatch(Batch, Protocol):
    """A buffer of spans, each visible to what hangs below it."""

    @property
    def text_rows(self) -> Tensor:
        """[n_text] int64, ascending: the rows with a text hidden state."""

    @property
    def mask(self) -> SpanMask:
        """Who sees whom."""


class Builder(Protocol):
    """A packed buffer; every span that is added has a number, and a parent that it continues."""

    @property
    def rows(self) -> int:
        """Rows laid out so far."""

    def append(self, other: Any) -> int:
        """Everything another builder of the family holds; returns the last of its spans."""

    def text(self, token_ids: Sequence[int], parent: int) -> int:
        """A causal span of tokens."""

    def noise(self, height: int, width: int, parent: int) -> int:
        """A full span of height * width noisy latent tokens; a leaf."""

    def build(self, latents: Tensor | None = None, timesteps: Tensor | None = None) -> SpanBatch:
        """Lay out everything, with [n_latent, c] latents and [n_latent] times of the noise."""


class Layout(Protocol):
    """How a model family lays prompts out."""

    @property
    def latent_grid(self) -> tuple[int, int]:
        """Rows and columns of latent tokens of a picture."""

    @property
    def latent_shape(self) -> tuple[int, int]:
        """(tokens, numbers per token) of one picture."""

    def builder(self) -> Builder:
        """An empty buffer."""

    def prompt(self, example: Example) -> Builder:
        """A buffer with one prompt in it, whose last span its completions continue."""

    def without_words(self, example: Example) -> Builder:
        """A request to draw without its words, but with its pictures; may be empty."""

    def without_pictures(self, example: Example) -> Builder:
        """A request to draw with its words, but without its pictures; may be empty."""


@dataclass(frozen=True)
class Pack:
    """One packed buffer: S completions with T tokens, and M noisy pictures.

    R text hidden states predict the targets. The slices say which completions, tokens and pictures,
    counted over all groups in order.
    """

    batch: Batch
    token_ids: Tensor  # [T] int64 targets
    predictors: Tensor  # [R] int64, ascending: the text hidden states that predict a target
    row_index: Tensor  # [T] int64: which of the predictors each target has
    cu_seqlens: Tensor  # [S + 1] int64 into T
    completions: slice
    tokens: slice
    pictures: slice
    guided: GuidedRows | None = None

    def to(self, device: torch.device | str) -> Pack:
        """The same pack with its tensors on `device`."""
        names = ("batch", "token_ids", "predictors", "row_index", "cu_seqlens")
        moved = {name: getattr(self, name).to(device) for name in names}
        guided = self.guided and self.guided.to(device)
        return dataclasses.replace(self, **moved, guided=guided)


class Branches(NamedTuple):
    """Pictures that are guided by the same branches, [m] of the M of `GuidedRows`."""

    which: Tensor  # [m] int64, ascending, of the M
    without_words: Tensor  # [m] int64
    without_pictures: Tensor | None  # [m] int64; None: by the words alone

    def to(self, device: torch.device | str) -> Branches:
        """The same with its tensors on `device`."""
        edits = self.without_pictures
        moved = None if edits is None else edits.to(device)
        return Branches(self.which.to(device), self.without_words.to(device), moved)


@dataclass(frozen=True)
class GuidedRows:
    """Where a pack has the velocities that guidance needs, counted over the pictures laid out."""

    params: GuidanceParams
    pictures: Tensor  # [M] int64, each picture with all that is before it
    branches: tuple[Branches, ...]

    @classmethod
    def of(cls, params: GuidanceParams, laid_out: Sequence[LaidOut]) -> GuidedRows:
        """Those of M pictures laid out in any order, each once with all that is before it."""
        place = {its: place for place, its in enumerate(laid_out)}

        def places(numbers: Sequence[int], branch: Branch) -> Tensor:
            return torch.tensor([place[number, branch] for number in numbers])

        whole, words, edits = (
            sorted(number for number, its in laid_out if its == branch)
            for branch in get_args(Branch)
        )
        words = sorted(set(words) - set(edits))
        branches = []
        if words:
            branches.append(Branches(torch.tensor(words), places(words, "without words"), None))
        if edits:
            without = places(edits, "without words"), places(edits, "without pictures")
            branches.append(Branches(torch.tensor(edits), *without))
        return cls(params, places(whole, "whole"), tuple(branches))

    def to(self, device: torch.device | str) -> GuidedRows:
        """The same with its tensors on `device`."""
        branches = (branch.to(device) for branch in self.branches)
        return GuidedRows(self.params, self.pictures.to(device), tuple(branches))

    def velocity(self, laid_out: Tensor, backend: str | None) -> Tensor:
        """[M, n, c] velocities, guided where they are, of those of all pictures laid out."""
        guided = velocity = laid_out[self.pictures]
        for which, words, pictures in self.branches:
            pushed = guided_velocity(
                velocity[which],
                laid_out[words],
                None if pictures is None else laid_out[pictures],
                params=self.params,
                backend=backend,
            )
            guided = guided.index_copy(0, which, pushed.to(velocity.dtype))
        return guided


def pack_groups(
    layout: Layout,
    texts: Sequence[TextGroup],
    pictures: Sequence[PictureGroup] = (),
    latents: Tensor | None = None,
    timesteps: Tensor | None = None,
    max_rows: int = 1 << 30,
    *,
    share_prompts: bool = True,
    guided: GuidedPictures | None = None,
) -> Iterator[Pack]:
    """Fill packs with groups, in order, up to `max_rows` rows each.

    A group stays whole if it fits into one pack: the pack before it is closed where it would
    overflow. A larger group is divided between its completions, and each part has the prompt again.
    So only a completion that is too long on its own, with its prompt, makes a pack too long.

    Args:
        layout: of the model family.
        texts: groups of completions; a completion has at least one token.
        pictures: groups of noisy pictures.
        latents: [M_total, tokens, latent_dim], all noisy pictures in order.
        timesteps: [M_total], their times.
        max_rows: token budget.
        share_prompts: False lays the prompt out again for every completion, as trainers without
            shared prefixes do: what sharing is compared with.
        guided: pictures that are laid out without their words, too, and without the pictures
            before them, where they are guided by these; None: none.

    Raises:
        ValueError: a group is empty, a completion has no tokens, or the latents or their times are
            not those of the pictures; names it.
    """
    _check(layout, texts, pictures, latents, timesteps, max_rows)
    pack = _OpenPack(layout, 0, 0, 0, guided)
    for part in _parts(layout, texts, pictures, max_rows if share_prompts else 0, guided):
        if pack.builder.rows and pack.builder.rows + part.rows > max_rows:
            yield pack.close(latents, timesteps)
            pack = pack.next()
        pack.add(part)
    if pack.builder.rows:
        yield pack.close(latents, timesteps)


@dataclass(frozen=True)
class _Part:
    """A prompt with as many of its completions as a pack has room for."""

    prompt: Builder
    rows: int
    texts: Sequence[Sequence[int]] = ()
    pictures: int = 0
    branches: Sequence[tuple[Branch, Builder]] = ()  # that guided pictures have beside the whole


def _parts(
    layout: Layout,
    texts: Sequence[TextGroup],
    pictures: Sequence[PictureGroup],
    most: int,
    guided: GuidedPictures | None,
) -> Iterator[_Part]:
    for example, completions in texts:
        prompt = layout.prompt(example)
        lengths = [len(tokens) - 1 for tokens in completions]
        for some, rows in _divide(prompt.rows, lengths, most):
            yield _Part(prompt, rows, texts=completions[some])
    per_picture = _rows_of_a_picture(layout) if pictures else 0
    which = [False] * sum(count for _, count in pictures)
    if guided is not None:
        which = guided.which.tolist()
    for example, count in pictures:
        prompt = layout.prompt(example)
        branches: list[tuple[Branch, Builder]] = []
        if guided is not None:
            branches.append(("without words", layout.without_words(example)))
            if guided_by_image(guided.params, example):
                branches.append(("without pictures", layout.without_pictures(example)))
        shared = prompt.rows + sum(builder.rows for _, builder in branches)
        lengths = [per_picture * (1 + len(branches) * is_guided) for is_guided in which[:count]]
        del which[:count]
        for some, rows in _divide(shared, lengths, most):
            number = some.stop - some.start
            yield _Part(prompt, rows, pictures=number, branches=branches)


def _rows_of_a_picture(layout: Layout) -> int:
    """Those of its latents, and of the markers around them if the family has some."""
    builder = layout.builder()
    builder.noise(*layout.latent_grid, parent=-1)
    return builder.rows


def _divide(prompt: int, lengths: Sequence[int], most: int) -> Iterator[tuple[slice, int]]:
    """Which completions, one at least, fit below a prompt into `most` rows, and their rows."""
    first, rows = 0, prompt
    for i, length in enumerate(lengths):
        if i > first and rows + length > most:
            yield slice(first, i), rows
            first, rows = i, prompt
        rows += length
    yield slice(first, len(lengths)), rows


class _OpenPack:
    def __init__(
        self,
        layout: Layout,
        completion: int,
        token: int,
        picture: int,
        guided: GuidedPictures | None,
    ) -> None:
        self.layout, self.guided = layout, guided
        self.builder = layout.builder()
        self.first = completion, token, picture
        self.laid_out: list[LaidOut] = []
        self.token_ids: list[int] = []
        self.text_spans: list[int] = []
        self.pictures = 0

    def add(self, part: _Part) -> None:
        prompt = self.builder.append(part.prompt)
        for tokens in part.texts:
            self.text_spans.append(self.builder.text(tokens[:-1], prompt))
            self.token_ids.extend(tokens)
        numbers = range(self.pictures, self.pictures + part.pictures)
        for number in numbers:
            self.builder.noise(*self.layout.latent_grid, parent=prompt)
            self.laid_out.append((number, "whole"))
        self.pictures += part.pictures
        if self.guided is None:
            return
        which = self.guided.which[self.first[2] :]
        for branch, before in part.branches:
            root = self.builder.append(before) if before.rows else -1
            for number in numbers:
                if which[number]:
                    self.builder.noise(*self.layout.latent_grid, parent=root)
                    self.laid_out.append((number, branch))

    def _end(self) -> tuple[int, int, int]:
        completion, token, picture = self.first
        return (
            completion + len(self.text_spans),
            token + len(self.token_ids),
            picture + self.pictures,
        )

    def next(self) -> _OpenPack:
        return _OpenPack(self.layout, *self._end(), self.guided)

    def _guided_rows(self) -> GuidedRows | None:
        if self.guided is None or len(self.laid_out) == self.pictures:
            return None
        return GuidedRows.of(self.guided.params, self.laid_out)

    def close(self, latents: Tensor | None, timesteps: Tensor | None) -> Pack:
        completions, tokens, pictures = map(slice, self.first, self._end())
        if self.pictures:
            assert latents is not None
            assert timesteps is not None
            per_picture = self.layout.latent_shape[0]
            latents, timesteps = latents[pictures], timesteps[pictures]
            if self.guided is not None:
                order = torch.tensor([number for number, _ in self.laid_out])
                latents, timesteps = latents[order.to(latents.device)], timesteps[order]
            batch = self.builder.build(
                latents.flatten(0, 1), timesteps.repeat_interleave(per_picture)
            )
        else:
            batch = self.builder.build()
        targets = target_index(batch.mask, self.text_spans, last_has_row=False)
        # A row that predicts several completions' tokens is projected on the vocabulary once.
        rows, row_index = targets.row_index.unique(return_inverse=True)
        return Pack(
            batch=batch,
            token_ids=torch.tensor(self.token_ids, dtype=torch.int64),
            predictors=torch.searchsorted(batch.text_rows, rows),
            row_index=row_index,
            cu_seqlens=targets.cu_seqlens,
            completions=completions,
            tokens=tokens,
            pictures=pictures,
            guided=self._guided_rows(),
        )


def _check(
    layout: Layout,
    texts: Sequence[TextGroup],
    pictures: Sequence[PictureGroup],
    latents: Tensor | None,
    timesteps: Tensor | None,
    max_rows: int,
) -> None:
    if max_rows < 1:
        raise ValueError(f"pack_groups: max_rows is {max_rows}, expected at least 1")
    for i, (example, completions) in enumerate(texts):
        if not len(completions):
            raise ValueError(f"pack_groups: texts[{i}] ({example.uid}) has no completions")
        for j, tokens in enumerate(completions):
            if not len(tokens):
                where = f"completion {j} of texts[{i}] ({example.uid})"
                raise ValueError(f"pack_groups: {where} has no tokens, not even an end token")
    for i, (example, count) in enumerate(pictures):
        if count < 1:
            where = f"pictures[{i}] ({example.uid})"
            raise ValueError(f"pack_groups: {where} has {count} pictures, expected at least 1")
    total = sum(count for _, count in pictures)
    for name, tensor, shape in (
        ("latents", latents, (total, *layout.latent_shape)),
        ("timesteps", timesteps, (total,)),
    ):
        found = None if tensor is None else tuple(tensor.shape)
        if found != shape and (total or found is not None):
            raise ValueError(f"pack_groups: {name} has shape {found}, expected {shape}")
