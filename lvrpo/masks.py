"""SpanMask: which query sees which key in a packed buffer of texts, images and shared prompts.

Spans tile the buffer in depth-first preorder. A query sees a key iff the key's span is the query's
own span or one of its ancestors; inside a span the rule is causal or full. Every key is then seen
by one contiguous range of rows, `q_lo[k] <= q < q_hi[k]`, and two integers per token say it all.
What the builders encode, and why the claim holds: docs/masks.md.

L tokens of the packed buffer, Lq query rows, S spans.
"""

from __future__ import annotations

import dataclasses
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from itertools import accumulate, pairwise

import torch
from torch import Tensor

#: (length, mode): one span of a prompt or of a completion.
Span = tuple[int, str]
#: (prompt, completions): a chain of spans, and the chains that continue it.
Group = tuple[Sequence[Span], Sequence[Sequence[Span]]]


@dataclasses.dataclass(frozen=True, eq=False)
class SpanMask:
    """The visibility of a packed buffer; make one with a `from_...` builder.

    Attributes:
        length: L, the rows of keys and values.
        q_lo, q_hi: [L] int32. Key k is seen by the buffer rows q_lo[k] <= q < q_hi[k]. q_lo never
            decreases; both are equal for a key that nobody sees (padding).
        rows: [Lq] int32, ascending: the buffer row of each query; every row unless selected.
        spans: [S, 7] int32, one span a row: first token, end, causal (0 or 1), its slice of `runs`
            (begin, end), its slice of `rows` (begin, end).
        runs: [N, 2] int32: maximal contiguous token ranges (begin, end). A span's slice lists all
            its ancestors' tokens, which every row of the span sees. Siblings share one slice.
        span_offsets: S + 1 token offsets: span s is the rows span_offsets[s]:span_offsets[s + 1].
        documents: offsets of the parts that never see each other; the last part may be padding.
        document_rows: the same boundaries as offsets into `rows`.
    """

    length: int
    q_lo: Tensor
    q_hi: Tensor
    rows: Tensor
    spans: Tensor
    runs: Tensor
    span_offsets: tuple[int, ...]
    documents: tuple[int, ...]
    document_rows: tuple[int, ...]

    @property
    def num_queries(self) -> int:
        """Lq, the rows of q."""
        return self.rows.shape[0]

    @property
    def num_spans(self) -> int:
        """S."""
        return len(self.span_offsets) - 1

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
        if not len(lengths) == len(parents) == len(modes):
            counts = f"{len(lengths)} lengths, {len(parents)} parents and {len(modes)} modes"
            raise ValueError(f"SpanMask: {counts}, expected one of each per span")
        for span, length in enumerate(lengths):
            if length < 0:
                raise ValueError(f"SpanMask: span {span} has length {length}, expected >= 0")
        for span, mode in enumerate(modes):
            if mode not in ("causal", "full"):
                raise ValueError(
                    f"SpanMask: span {span} has mode {mode!r}, expected 'causal' or 'full'"
                )
        offsets = list(accumulate(lengths, initial=0))
        ends = _subtree_ends(offsets, parents)
        runs, run_slices = _ancestor_runs(offsets, parents)
        return cls._from_tables(
            offsets, ends, [mode == "causal" for mode in modes], runs, run_slices
        )

    @classmethod
    def from_cu_seqlens(cls, cu_seqlens: Sequence[int] | Tensor, causal: bool = True) -> SpanMask:
        """Documents of one span each, from their offsets: 0, ..., L.

        Raises:
            ValueError: the offsets do not start at 0, or decrease.
        """
        offsets = cu_seqlens.tolist() if isinstance(cu_seqlens, Tensor) else list(cu_seqlens)
        if not offsets or offsets[0] != 0:
            raise ValueError(f"SpanMask: cu_seqlens starts with {offsets[:1]}, expected [0]")
        lengths = [end - start for start, end in pairwise(offsets)]
        count = len(lengths)
        return cls.from_spans(lengths, [-1] * count, ["causal" if causal else "full"] * count)

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
        spans: list[Span] = []
        parents: list[int] = []
        for prompt, completions in groups:
            trunk = _append_chain(prompt, -1, spans, parents)
            for completion in completions:
                _append_chain(completion, trunk, spans, parents)
        return cls.from_spans([n for n, _ in spans], parents, [mode for _, mode in spans])

    @classmethod
    def from_bagel(
        cls, split_lens: Sequence[int], attn_modes: Sequence[str], sample_lens: Sequence[int]
    ) -> SpanMask:
        """The mask of a BAGEL training pack.

        Args:
            split_lens: tokens of each split: a text, or an image with its two delimiters.
            attn_modes: per split, "causal" (text), "full" (a clean image) or "noise" (a noisy
                image, hidden from every other split).
            sample_lens: tokens of each sample; a sample is whole splits.

        Raises:
            ValueError: a mode is unknown, or a split crosses the end of its sample.
        """
        if len(split_lens) != len(attn_modes):
            counts = f"{len(split_lens)} split_lens, {len(attn_modes)} attn_modes"
            raise ValueError(f"SpanMask: {counts}, expected one of each per split")
        parents: list[int] = []
        sample_ends = list(accumulate(sample_lens))
        sample, position, last_visible = -1, 0, -1
        for split, (length, mode) in enumerate(zip(split_lens, attn_modes, strict=True)):
            if (own := bisect_right(sample_ends, position)) != sample:
                sample, last_visible = own, -1
            position += length
            if sample < len(sample_ends) and position > sample_ends[sample]:
                raise ValueError(
                    f"SpanMask: split {split} ends at {position}, beyond its sample {sample}, "
                    f"which ends at {sample_ends[sample]}"
                )
            parents.append(last_visible)
            if mode != "noise":
                last_visible = split
        if position != sum(sample_lens):
            total = f"{position} tokens, the samples to {sum(sample_lens)}"
            raise ValueError(f"SpanMask: the splits add up to {total}")
        modes = ["full" if mode == "noise" else mode for mode in attn_modes]
        return cls.from_spans(split_lens, parents, modes)

    def select_queries(self, rows: Tensor | Sequence[int]) -> SpanMask:
        """The same keys for fewer queries: q holds only these rows of the buffer.

        For decoding and denoising with a cache: lay the buffer out at its full size, fill k and v
        as the rows come, and query the newest. Keys that no selected row sees are never read.

        Args:
            rows: [Lq] buffer rows, strictly ascending, on the host; q row i is buffer row rows[i].

        Raises:
            ValueError: a row is outside the buffer, or the rows do not ascend.
        """
        chosen = torch.as_tensor(rows, dtype=torch.int64, device="cpu").contiguous()
        if chosen.dim() != 1:
            raise ValueError(f"SpanMask: rows has shape {tuple(chosen.shape)}, expected [Lq]")
        if len(chosen):
            if not bool((chosen.diff() > 0).all()):
                raise ValueError("SpanMask: rows must be strictly ascending")
            first, last = int(chosen[0]), int(chosen[-1])
            if first < 0 or last >= self.length:
                went = f"rows go from {first} to {last}"
                raise ValueError(f"SpanMask: {went}, expected [0, {self.length})")
        spans = self.spans.cpu().clone()
        edges = torch.tensor(self.span_offsets)
        spans[:, 5] = torch.searchsorted(chosen, edges[:-1])
        spans[:, 6] = torch.searchsorted(chosen, edges[1:])
        document_rows = torch.searchsorted(chosen, torch.tensor(self.documents))
        return dataclasses.replace(
            self,
            rows=chosen.int().to(self.rows.device),
            spans=spans.to(self.spans.device),
            document_rows=tuple(document_rows.tolist()),
        )

    def select_spans(self, spans: Sequence[int]) -> SpanMask:
        """`select_queries` with all rows of the given spans (ascending indices)."""
        chosen = torch.as_tensor(spans, dtype=torch.int64)
        edges = torch.tensor(self.span_offsets)
        lengths = edges.diff()[chosen]
        # Row j of the result is j rows after the start of its span, less those of earlier spans.
        shift = edges[chosen] - (lengths.cumsum(0) - lengths)
        rows = torch.repeat_interleave(shift, lengths)
        return self.select_queries(rows + torch.arange(len(rows)))

    def pad_to(self, length: int) -> SpanMask:
        """The mask of a longer buffer whose last rows see nothing and are seen by nobody."""
        extra = length - self.length
        if extra < 0:
            raise ValueError(f"SpanMask: cannot pad {self.length} rows to {length}")
        if self.num_queries != self.length:
            raise ValueError("SpanMask: pad the mask before selecting its queries")
        if extra == 0:
            return self
        nobody = self.q_hi.new_full((extra,), self.length)
        return dataclasses.replace(
            self,
            length=length,
            q_lo=torch.cat([self.q_lo, nobody]),
            q_hi=torch.cat([self.q_hi, nobody]),
            rows=torch.arange(length, dtype=torch.int32, device=self.rows.device),
            documents=(*self.documents, length),
            document_rows=(*self.document_rows, length),
        )

    def to(self, device: torch.device | str) -> SpanMask:
        """The same mask with its tensors on `device`."""
        names = ("q_lo", "q_hi", "rows", "spans", "runs")
        moved = {name: getattr(self, name).to(device, non_blocking=True) for name in names}
        return dataclasses.replace(self, **moved)

    def visible(self, queries: slice = slice(None), keys: slice = slice(None)) -> Tensor:
        """Bool [queries, keys]: a block of `to_dense()`."""
        row = self.rows[queries, None]
        return (self.q_lo[keys] <= row) & (row < self.q_hi[keys])

    def to_dense(self) -> Tensor:
        """Bool [Lq, L]: whether query row i sees key k. For tests and small buffers."""
        return self.visible()

    @classmethod
    def _from_tables(
        cls,
        offsets: list[int],
        subtree_ends: list[int],
        causal: list[bool],
        runs: list[tuple[int, int]],
        run_slices: list[tuple[int, int]],
    ) -> SpanMask:
        length = offsets[-1]
        edges = torch.tensor(offsets, dtype=torch.int32)
        starts, ends = edges[:-1], edges[1:]
        is_causal = torch.tensor(causal, dtype=torch.int32)
        slices = torch.tensor(run_slices, dtype=torch.int32).view(-1, 2)
        span_of = torch.repeat_interleave(
            torch.arange(len(causal)), (ends - starts).long(), output_size=length
        )
        token = torch.arange(length, dtype=torch.int32)
        # A span without ancestor tokens shares nothing with what came before.
        roots = [
            start
            for (start, end), (first, last) in zip(pairwise(offsets), run_slices, strict=True)
            if first == last and end > start
        ]
        documents = (*roots, length) if roots else (0, 0)
        return cls(
            length=length,
            q_lo=torch.where(is_causal.bool()[span_of], token, starts[span_of]),
            q_hi=torch.tensor(subtree_ends, dtype=torch.int32)[span_of],
            rows=token,
            spans=torch.cat(
                [
                    torch.stack([starts, ends, is_causal], dim=1),
                    slices,
                    torch.stack([starts, ends], dim=1),
                ],
                dim=1,
            ),
            runs=torch.tensor(runs, dtype=torch.int32).view(-1, 2),
            span_offsets=tuple(offsets),
            documents=documents,
            document_rows=documents,
        )


def _append_chain(chain: Sequence[Span], parent: int, spans: list[Span], parents: list[int]) -> int:
    """Append a chain under `parent`; returns its last span, or `parent` when it is empty."""
    for span in chain:
        parents.append(parent)
        parent = len(spans)
        spans.append(span)
    return parent


def _subtree_ends(offsets: list[int], parents: Sequence[int]) -> list[int]:
    """Per span, the token after its last descendant; checks the order on the way."""
    ends = [offsets[-1]] * len(parents)
    path: list[int] = []
    for span, parent in enumerate(parents):
        if not -1 <= parent < span:
            raise ValueError(
                f"SpanMask: span {span} has parent {parent}, expected -1 or an earlier span"
            )
        while path and path[-1] != parent:
            ends[path.pop()] = offsets[span]
        if parent >= 0 and not path:
            raise ValueError(
                f"SpanMask: span {span} has parent {parent}, whose descendants ended before span "
                f"{span - 1}; spans must be in depth-first preorder"
            )
        path.append(span)
    return ends


def _ancestor_runs(
    offsets: list[int], parents: Sequence[int]
) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """All ancestors' tokens as merged ranges, and each span's slice of them."""
    runs: list[tuple[int, int]] = []
    slices: list[tuple[int, int]] = []
    of_children: dict[int, tuple[int, int]] = {-1: (0, 0)}
    for parent in parents:
        found = of_children.get(parent)
        if found is None:
            begin, end = slices[parent]
            path = runs[begin:end]
            start, stop = offsets[parent], offsets[parent + 1]
            if path and path[-1][1] == start:
                path[-1] = (path[-1][0], stop)
            elif stop > start:
                path.append((start, stop))
            found = (len(runs), len(runs) + len(path))
            of_children[parent] = found
            runs += path
        slices.append(found)
    return runs, slices
