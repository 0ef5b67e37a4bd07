"""The formats that packed buffers come in, as spans; and spans as the tables of a `SpanMask`.

Everything here runs on the host. What spans cannot describe is a ValueError that says why.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lvrpo.masks.host import host_ints, on_the_host

#: (length, mode): one span of a prompt or of a completion.
Span = tuple[int, str]
#: (prompt, completions): a chain of spans, and the chains that continue it.
Group = tuple[Sequence[Span], Sequence[Sequence[Span]]]
#: (chain, children): a chain of spans, and the trees that continue it.
Tree = tuple[Sequence[Span], Sequence["Tree"]]

MODES = {"causal", "full"}


class Layout(NamedTuple):
    """Arguments of `SpanMask.from_spans`."""

    lengths: list[int]
    parents: list[int]
    modes: list[str]


def check_layout(lengths: Sequence[int], parents: Sequence[int], modes: Sequence[str]) -> Layout:
    """See `SpanMask.from_spans`; `tables` checks the order."""
    lengths = host_ints("lengths", lengths)
    parents = host_ints("parents", parents)
    if not len(lengths) == len(parents) == len(modes):
        counts = f"{len(lengths)} lengths, {len(parents)} parents and {len(modes)} modes"
        raise ValueError(f"SpanMask: {counts}, expected one of each per span")
    if min(lengths, default=0) < 0:
        span = next(span for span, length in enumerate(lengths) if length < 0)
        raise ValueError(f"SpanMask: span {span} has length {lengths[span]}, expected >= 0")
    if not set(modes) <= MODES:
        span = next(span for span, mode in enumerate(modes) if mode not in MODES)
        raise ValueError(
            f"SpanMask: span {span} has mode {modes[span]!r}, expected 'causal' or 'full'"
        )
    if (total := sum(lengths)) >= 1 << 31:
        raise ValueError(f"SpanMask: the spans add up to {total} tokens, expected < 2^31")
    return Layout(lengths, parents, list(modes))


def cu_seqlens_layout(cu_seqlens: Sequence[int] | Tensor, causal: bool) -> Layout:
    """See `SpanMask.from_cu_seqlens`."""
    offsets = host_ints("cu_seqlens", cu_seqlens)
    if not offsets or offsets[0] != 0:
        raise ValueError(f"SpanMask: cu_seqlens starts with {offsets[:1]}, expected [0]")
    lengths = [end - start for start, end in pairwise(offsets)]
    count = len(lengths)
    return Layout(lengths, [-1] * count, ["causal" if causal else "full"] * count)


def group_layout(groups: Iterable[Group]) -> Layout:
    """See `SpanMask.from_groups`."""
    layout = Layout([], [], [])
    for index, group in enumerate(groups):
        prompt, completions = _pair(f"group {index}", group, "(prompt, completions)")
        trunk = _append_chain(layout, prompt, -1, f"the prompt of group {index}")
        for completion in completions:
            _append_chain(layout, completion, trunk, f"a completion of group {index}")
    return layout


def tree_layout(trees: Iterable[Tree]) -> Layout:
    """See `SpanMask.from_tree`."""
    layout = Layout([], [], [])
    # A stack, for the trees of long conversations are deeper than Python's recursion.
    waiting = [(tree, -1) for tree in reversed(list(trees))]
    while waiting:
        tree, parent = waiting.pop()
        where = f"the chain at span {len(layout.lengths)}"
        chain, children = _pair(
            f"the tree at span {len(layout.lengths)}", tree, "(chain, children)"
        )
        last = _append_chain(layout, chain, parent, where)
        waiting += [(child, last) for child in reversed(children)]
    return layout


@on_the_host
def token_type_layout(
    token_types: Sequence[int] | Tensor, cu_seqlens: Sequence[int] | Tensor | None
) -> Layout:
    """See `SpanMask.from_token_types`."""
    types = torch.tensor(host_ints("token_types", token_types), dtype=torch.int64)
    length = len(types)
    if bool((types < 0).any()):
        at = int((types < 0).nonzero()[0])
        raise ValueError(f"SpanMask: token_types[{at}] is {int(types[at])}, expected >= 0")
    offsets = [0, length] if cu_seqlens is None else host_ints("cu_seqlens", cu_seqlens)
    if not offsets or offsets[0] != 0 or offsets[-1] != length:
        ends = f"from {offsets[0]} to {offsets[-1]}" if offsets else "nowhere"
        raise ValueError(f"SpanMask: cu_seqlens goes {ends}, token_types from 0 to {length}")
    for document, (start, end) in enumerate(pairwise(offsets)):
        if end < start:
            raise ValueError(
                f"SpanMask: document {document} of cu_seqlens has length {end - start}"
            )
    changes = torch.ones(length, dtype=torch.bool)
    changes[1:] = types[1:] != types[:-1]
    changes[[offset for offset in offsets if offset < length]] = True
    starts = changes.nonzero()[:, 0]
    lengths = starts.diff(append=torch.tensor([length])).tolist()
    roots = set(offsets)
    parents = [-1 if at in roots else span - 1 for span, at in enumerate(starts.tolist())]
    modes = ["full" if kind else "causal" for kind in types[starts].tolist()]
    return Layout(lengths, parents, modes)


def _pair(where: str, value: Sequence[object], names: str) -> tuple[Any, Any]:
    try:
        first, second = value
    except (TypeError, ValueError):
        raise ValueError(f"SpanMask: {where} is {value!r}, expected {names}") from None
    return first, second


def _append_chain(layout: Layout, chain: Sequence[Span], parent: int, where: str) -> int:
    """Append a chain under `parent`; returns its last span, or `parent` when it is empty."""
    lengths, parents, modes = layout
    try:
        spans = list(chain)
    except TypeError:
        raise ValueError(f"SpanMask: {where} is {chain!r}, expected (length, mode) spans") from None
    for span in spans:
        try:
            length, mode = span
        except (TypeError, ValueError):
            raise ValueError(
                f"SpanMask: a span of {where} is {span!r}, expected (length, mode)"
            ) from None
        parents.append(parent)
        parent = len(lengths)
        lengths.append(length)
        modes.append(mode)
    return parent
