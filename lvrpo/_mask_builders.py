"""The formats that packed buffers come in, as spans; and spans as the tables of a `SpanMask`.

Everything here runs on the host. What spans cannot describe is a ValueError that says why.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Iterable, Sequence
from itertools import accumulate, pairwise
from typing import Any, NamedTuple, ParamSpec, TypeVar

import torch
from torch import Tensor

#: (length, mode): one span of a prompt or of a completion.
Span = tuple[int, str]
#: (prompt, completions): a chain of spans, and the chains that continue it.
Group = tuple[Sequence[Span], Sequence[Sequence[Span]]]
#: (chain, children): a chain of spans, and the trees that continue it.
Tree = tuple[Sequence[Span], Sequence["Tree"]]

MODES = {"causal", "full"}

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


def on_the_host(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """Lay out on the host, whatever torch's default device is, and not in inference mode.

    A mask that was made during a rollout serves a later backward pass, too.
    """

    @functools.wraps(function)
    def on_host(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        with torch.inference_mode(False), torch.device("cpu"):
            return function(*args, **kwargs)

    return on_host


def move(table: Tensor, device: torch.device | str) -> Tensor:
    """On `device`, without waiting for what it is doing."""
    on_gpu = torch.device(device).type == "cuda"
    return (table.pin_memory() if on_gpu else table).to(device, non_blocking=True)


class Layout(NamedTuple):
    """Arguments of `SpanMask.from_spans`."""

    lengths: list[int]
    parents: list[int]
    modes: list[str]


def host_ints(name: str, values: Sequence[int] | Tensor) -> list[int]:
    """Plain integers; refuses a tensor on another device, which would have to be waited for."""
    if isinstance(values, Tensor):
        check_on_host(name, values, 1)
        return values.tolist()  # type: ignore[no-any-return]
    try:
        values = list(values)
    except TypeError:
        raise ValueError(f"SpanMask: {name} is {values!r}, expected integers") from None
    for i, value in enumerate(values):
        if isinstance(value, bool) or not hasattr(value, "__index__"):
            raise ValueError(f"SpanMask: {name}[{i}] is {value!r}, expected an integer")
    return list(map(operator.index, values))


def host_spans(spans: Sequence[int], count: int) -> list[int]:
    """Indices of spans that a mask of `count` spans has."""
    found = host_ints("spans", spans)
    for span in found:
        if not 0 <= span < count:
            raise ValueError(f"SpanMask: there is no span {span} among {count}")
    return found


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


def check_on_host(name: str, tensor: Tensor, dims: int) -> None:
    """Refuse a tensor of another device, and anything but integers in `dims` dimensions."""
    if tensor.device.type != "cpu":
        raise ValueError(
            f"SpanMask: {name} is on {tensor.device}; a mask is laid out on the host and then "
            "moved with `to`"
        )
    if tensor.dim() != dims or tensor.is_floating_point() or tensor.dtype == torch.bool:
        shape = f"{tensor.dtype} of shape {tuple(tensor.shape)}"
        raise ValueError(f"SpanMask: {name} is {shape}, expected integers with {dims} dimensions")


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


@on_the_host
def tables(layout: Layout) -> dict[str, Any]:
    """The fields of a `SpanMask`."""
    offsets = list(accumulate(layout.lengths, initial=0))
    subtree_ends = _subtree_ends(offsets, layout.parents)
    runs, run_slices = ancestor_runs(offsets, layout.parents)
    length = offsets[-1]
    edges = torch.tensor(offsets, dtype=torch.int32)
    starts, ends = edges[:-1], edges[1:]
    causal = torch.tensor([mode == "causal" for mode in layout.modes], dtype=torch.int32)
    slices = torch.tensor(run_slices, dtype=torch.int32).view(-1, 2)
    span_of = torch.repeat_interleave(edges.diff(), output_size=length)
    token = torch.arange(length, dtype=torch.int32)
    # A span without ancestor tokens shares nothing with what came before.
    roots = [
        start
        for (start, end), (first, last) in zip(pairwise(offsets), run_slices, strict=True)
        if first == last and end > start
    ]
    documents = (*roots, length) if roots else (0, 0)
    return {
        "length": length,
        "q_lo": torch.where(causal.bool()[span_of], token, starts[span_of]),
        "q_hi": torch.tensor(subtree_ends, dtype=torch.int32)[span_of],
        "rows": token,
        "spans": torch.cat(
            [
                torch.stack([starts, ends, causal], 1),
                slices,
                torch.stack([starts, ends], 1),
                slices.new_zeros(len(slices), 2),
            ],
            dim=1,
        ),
        "runs": torch.tensor(runs, dtype=torch.int32).view(-1, 2),
        "span_offsets": tuple(offsets),
        "parents": tuple(layout.parents),
        "modes": tuple(layout.modes),
        "documents": documents,
        "document_rows": documents,
    }


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
                f"{span - 1}; spans must be in depth-first preorder (interleaved completions have "
                "to be permuted)"
            )
        path.append(span)
    return ends


def ancestor_runs(
    offsets: Sequence[int], parents: Sequence[int], *, merged: bool = True
) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """All ancestors' tokens as ranges, and each span's slice of them.

    Merged where they touch; or one range per ancestor, wherever it is.
    """
    runs: list[tuple[int, int]] = []
    slices: list[tuple[int, int]] = []
    of_children: dict[int, tuple[int, int]] = {-1: (0, 0)}
    for parent in parents:
        found = of_children.get(parent)
        if found is None:
            begin, end = slices[parent]
            path = runs[begin:end]
            start, stop = offsets[parent], offsets[parent + 1]
            if merged and path and path[-1][1] == start:
                path[-1] = (path[-1][0], stop)
            elif stop > start:
                path.append((start, stop))
            found = (len(runs), len(runs) + len(path))
            of_children[parent] = found
            runs += path
        slices.append(found)
    return runs, slices
