"""SpanMask: which query sees which key in a packed buffer of texts, images and shared prompts.

Spans tile the buffer in depth-first preorder. A query sees a key iff the key's span is the query's
own span or one of its ancestors; inside a span the rule is causal or full. Every key is then seen
by one contiguous range of rows, `q_lo[k] <= q < q_hi[k]`, and two integers per token say it all.
What the builders encode, and why the claim holds: docs/masks.md.

L tokens of the packed buffer, Lq query rows, S spans.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lvrpo.masks import changes, exports, layouts
from lvrpo.masks.bagel import bagel_layout
from lvrpo.masks.flashmask import flashmask_layout
from lvrpo.masks.host import host_spans, move, on_the_host
from lvrpo.masks.layouts import Group, Tree
from lvrpo.masks.schedule import schedule
from lvrpo.masks.tables import SpanTables, tables

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask


#: Tables that kernels read.
_MOVED = ("q_lo", "q_hi", "rows", "spans", "runs", "positions")


def _on_the_host(change: Callable[..., SpanMask]) -> Callable[..., SpanMask]:
    """Of a mask on a device the one on the host is changed, and moved: nothing is read back.

    Tables that stay are not moved again.
    """

    @functools.wraps(change)
    @on_the_host
    def changed(self: SpanMask, *arguments: Any) -> SpanMask:
        host = self.host
        if host is None:
            return change(self, *arguments)
        result = change(host, *arguments)
        stay = [name for name in _MOVED if getattr(result, name) is getattr(host, name)]
        return _moved(result, self.rows.device, {name: getattr(self, name) for name in stay})

    return changed


def _moved(mask: SpanMask, device: torch.device, there: Mapping[str, Tensor | None]) -> SpanMask:
    """A mask of the host on a device that has some of its tables."""
    tables: dict[str, Any] = dict(there)
    for name in set(_MOVED) - set(there):
        table = getattr(mask, name)
        tables[name] = None if table is None else move(table, device)
    return dataclasses.replace(mask, **tables, schedule=schedule(mask).to(device), host=mask)


@dataclasses.dataclass(frozen=True, eq=False)
class SpanMask(SpanTables):
    """The visibility of a packed buffer; make one with a `from_...` builder."""

    if TYPE_CHECKING:
        host: SpanMask | None = None

    @classmethod
    def from_spans(
        cls, lengths: Sequence[int], parents: Sequence[int], modes: Sequence[str]
    ) -> SpanMask:
        """Build from spans in depth-first preorder: a span, then everything that descends from it.

        Args:
            lengths: tokens of each span; 0 is allowed.
            parents: index of the span that each one continues; -1 starts a new document.
            modes: "causal" or "full", the rule inside each span.

        Raises:
            ValueError: the sequences differ in length, a length is negative, a mode is unknown, or
                a parent is not an earlier span on the path to the span before; names the span.
        """
        return cls(**tables(layouts.check_layout(lengths, parents, modes)))

    @classmethod
    def from_cu_seqlens(cls, cu_seqlens: Sequence[int] | Tensor, causal: bool = True) -> SpanMask:
        """Documents of one span each, from their offsets: 0, ..., L.

        Raises:
            ValueError: the offsets do not start at 0, decrease, or are a tensor on a device.
        """
        return cls.from_spans(*layouts.cu_seqlens_layout(cu_seqlens, causal))

    @classmethod
    def from_groups(cls, groups: Iterable[Group]) -> SpanMask:
        """Prompts, each laid out once and followed by the completions that continue it.

        Spans come in the order given: a group's prompt spans, then the spans of its completions.

        Args:
            groups: one (prompt, completions) pair per group, of (length, mode) spans. A prompt is a
                chain of spans; so is each completion, which sees the prompt and itself and no other
                completion: text is [(n, "causal")], a noisy image [(n, "full")].

        Example:
            >>> question = ([(64, "full"), (12, "causal")], [[(5, "causal")], [(3, "causal")]])
            >>> drawing = ([(9, "causal")], [[(16, "full")]] * 8)
            >>> SpanMask.from_groups([question, drawing]).length
            221
        """
        return cls.from_spans(*layouts.group_layout(groups))

    @classmethod
    def from_tree(cls, trees: Iterable[Tree]) -> SpanMask:
        """Chains of spans that branch at their ends, to any depth; spans come in preorder.

        Args:
            trees: one (chain, children) pair per document: a chain of (length, mode) spans, and the
                trees that continue it, which see it and not each other.

        Example:
            >>> turn = ([(3, "causal")], [([(2, "causal")], []), ([(5, "causal")], [])])
            >>> SpanMask.from_tree([([(8, "causal")], [turn, turn])]).parents
            (-1, 0, 1, 1, 0, 4, 4)
        """
        return cls.from_spans(*layouts.tree_layout(trees))

    @classmethod
    def from_bagel(
        cls,
        split_lens: Sequence[int] | Tensor,
        attn_modes: Sequence[str],
        sample_lens: Sequence[int] | Tensor,
        sample_splits: Sequence[int] | Tensor | None = None,
    ) -> SpanMask:
        """The mask of a BAGEL training pack.

        Args:
            split_lens: tokens of each split: a text, or an image with its two delimiters; 0 for an
                image that was dropped for guidance, which `bagel_position_ids` still counts.
            attn_modes: per split, "causal" (text), "full" (a clean image) or "noise" (a noisy
                image, hidden from every other split).
            sample_lens: tokens of each sample; a sample is whole splits.
            sample_splits: how many splits each sample has. Only a split of 0 tokens where two
                samples meet needs it: without, it ends the first of them.

        Raises:
            ValueError: a mode is unknown, or the splits of a sample do not add up to it.
        """
        return cls.from_spans(*bagel_layout(split_lens, attn_modes, sample_lens, sample_splits))

    @classmethod
    def from_token_types(
        cls,
        token_types: Sequence[int] | Tensor,
        cu_seqlens: Sequence[int] | Tensor | None = None,
    ) -> SpanMask:
        """Causal text with bidirectional images, from a type per token (as Gemma 3 has them).

        Args:
            token_types: [L], 0 for text; a run of one other value within a document is an image.
            cu_seqlens: offsets of the documents, 0, ..., L; None: one document.

        Raises:
            ValueError: a type is negative, or the offsets do not tile the buffer.
        """
        return cls.from_spans(*layouts.token_type_layout(token_types, cu_seqlens))

    @classmethod
    def from_flashmask(cls, startend_row_indices: Tensor, causal: bool = False) -> SpanMask:
        """The mask that FlashMask's column-wise row indices describe, if spans can.

        Args:
            startend_row_indices: [1, heads, L, n] integers on the host: per key the rows that do
                not see it. With `causal`, from the first bound on (n = 1) or between the two
                (n = 2), below the diagonal; otherwise from the first on and before the last
                (n = 2), or within two pairs of bounds (n = 4).
            causal: see above.

        Raises:
            ValueError: spans cannot describe it: masks per head, a key seen by two ranges of rows,
                a sliding window (`with_window`), interleaved branches, a branch that splits a full
                span, a key hidden from its own row (trailing padding may be).
        """
        layout, length = flashmask_layout(startend_row_indices, causal)
        return cls.from_spans(*layout).pad_to(length)

    @_on_the_host
    def select_queries(self, rows: Tensor | Sequence[int]) -> SpanMask:
        """The same keys for fewer queries: q holds only these rows of the buffer.

        For decoding and denoising with a cache: lay the buffer out at its full size, fill k and v
        as the rows come, and query the newest. Keys that no selected row sees are never read.

        Args:
            rows: [Lq] buffer rows, strictly ascending, on the host; q row i is buffer row rows[i].

        Raises:
            ValueError: a row is outside the buffer, or the rows do not ascend.
        """
        return changes.select_queries(self, rows)

    @on_the_host
    def select_spans(self, spans: Sequence[int]) -> SpanMask:
        """`select_queries` with all rows of the given spans (ascending indices)."""
        chosen = torch.tensor(host_spans(spans, self.num_spans), dtype=torch.int64)
        edges = torch.tensor(self.span_offsets)
        lengths = edges.diff()[chosen]
        # Row j of the result is j rows after the start of its span, less those of earlier spans.
        shift = edges[chosen] - (lengths.cumsum(0) - lengths)
        rows = torch.repeat_interleave(shift, lengths)
        return self.select_queries(rows + torch.arange(len(rows)))

    @_on_the_host
    def freeze(self, spans: Sequence[int]) -> SpanMask:
        """The same mask whose keys and values in these spans are constants to the backward pass.

        As if k and v were detached there: their gradients are 0, and nothing is spent on them. For
        prompts that are not trained on, or experts of a model that are not trained. The queries of
        these spans keep their gradients.

        Args:
            spans: indices; those already frozen stay frozen.

        Raises:
            ValueError: there is no such span.
        """
        return changes.freeze(self, spans)

    @_on_the_host
    def packing_invariant(self) -> SpanMask:
        """The same mask for results that do not depend on what a span is packed with, to the bit.

        Without it that holds for documents. With it the rows of a completion have the same bits
        whichever siblings it has, with a shared prompt as with a copy of its own: tiles of rows
        then begin anew with every span, which costs half a tile per span. Gradients of k and v are
        sums over what else is there, and have no such promise.
        """
        return changes.packing_invariant(self)

    @_on_the_host
    def with_window(self, window: int | None) -> SpanMask:
        """The same mask, in which a query sees no key that is `window` positions behind it or more.

        For layers with a sliding window (Gemma 2 to 4, Mistral, gpt-oss), on top of the rule for
        spans. Positions are those of `position_ids`: a completion continues its prompt, so that
        each of a group has the window that it would have in a sequence of its own. Keys further on,
        which a full span shows, stay visible however far they are, as in transformers' Gemma 3.

        Args:
            window: how many positions up to and with the query's own it sees, transformers'
                `sliding_window`; None: all. It takes the place of an earlier one.

        Returns:
            The mask; without a window where no path is longer than it.

        Raises:
            ValueError: the window is not an integer >= 1.

        Example:
            >>> mask = SpanMask.from_groups([([(3, "causal")], [[(2, "causal")], [(1, "causal")]])])
            >>> mask.with_window(2).to_dense()[5].int().tolist()
            [0, 0, 1, 0, 0, 1]
        """
        return changes.with_window(self, window)

    @_on_the_host
    def pad_to(self, length: int) -> SpanMask:
        """The mask of a longer buffer whose last rows see nothing and are seen by nobody."""
        return changes.pad_to(self, length)

    @on_the_host
    def to(self, device: torch.device | str) -> SpanMask:
        """The same mask with its tensors on `device`, and on a GPU with the schedule of kernels."""
        host = self.host or self
        if torch.device(device).type == "cpu":
            return host
        return _moved(host, torch.device(device), {})

    def tile_bounds(self, block: int) -> Tensor:
        """Who sees the keys of each tile of `block` keys, as four query indices.

        Returns:
            [ceil(L / block), 4] int32 (lo_min, lo_max, hi_min, hi_max). The queries from lo_min to
            hi_max, and no others, see a key of the tile; those from lo_max to hi_min see them all.

        Raises:
            ValueError: the mask has a window, under which those that see a tile are no one range.
        """
        return exports.tile_bounds(self, block)

    def tiles(self, block: int | tuple[int, int]) -> Tensor:
        """What every tile of queries sees of every tile of keys; exact.

        Args:
            block: queries and keys of a tile, or one number for both.

        Returns:
            [ceil(Lq / queries), ceil(L / keys)] int8 of `Tile`: SKIP 0, PARTIAL 1, FULL 2.
        """
        return exports.tiles(self, block)

    def to_dense(self) -> Tensor:
        """Bool [Lq, L]: whether query row i sees key k. For tests and small buffers."""
        return self.visible()

    def to_block_mask(self, block: int | tuple[int, int] = 128) -> BlockMask:
        """For torch's `flex_attention`, one batch and all heads; no [Lq, L] mask is formed.

        Args:
            block: queries and keys of a block, or one number for both; powers of two for kernels.
        """
        return exports.block_mask(self, block)

    def to_row_intervals(self) -> Tensor:
        """The keys that each query sees, as ranges.

        Returns:
            [Lq, N, 2] int32 (begin, end): disjoint, ascending, not touching. N is the most that a
            query has; the others end with empty ranges, whose begin is their end.
        """
        return exports.row_intervals(self)

    def to_flashmask(self) -> Tensor:
        """[1, 1, L, 2] int32: FlashMask's bidirectional row indices; see `from_flashmask`.

        Raises:
            ValueError: queries were selected, or a window hides a key from some rows between those
                that see it, as from the end of a completion but not from the start of the next.
        """
        changes.check_all_queries(self, "export the mask")
        return exports.flashmask_indices(self)
