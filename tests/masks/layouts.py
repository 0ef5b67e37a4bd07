"""Random layouts, and what each lets a query see, straight from the definitions."""

from __future__ import annotations

from hypothesis import strategies as st
from torch import Tensor, arange, int64, tensor, zeros

from lvrpo.masks import SpanMask

Layout = tuple[list[int], list[int], list[str]]
BagelPack = tuple[list[int], list[str], list[int]]


@st.composite
def forests(draw: st.DrawFn, spans: int = 14, lengths: tuple[int, ...] = (0, 1, 1, 2, 3, 6)):
    """Spans in depth-first preorder, to depth 7, with empty and one-token spans."""
    layout: Layout = ([], [], [])
    path: list[int] = []
    for span in range(draw(st.integers(0, spans))):
        path = path[: draw(st.integers(0, min(len(path), 7)))]
        drawn = st.sampled_from(lengths), st.just(path[-1] if path else -1), MODES
        for values, strategy in zip(layout, drawn, strict=True):
            values.append(draw(strategy))
        path.append(span)
    return layout


@st.composite
def bagel_packs(draw: st.DrawFn):
    """Samples of splits; half of those are noise, so that consecutive ones are common."""
    modes = st.lists(st.sampled_from(["causal", "full", "noise", "noise"]), min_size=1, max_size=6)
    pack: BagelPack = ([], [], [])
    for _ in range(draw(st.integers(1, 3))):
        drawn = draw(modes)
        lengths = draw(st.lists(st.integers(0, 5), min_size=len(drawn), max_size=len(drawn)))
        pack[0].extend(lengths)
        pack[1].extend(drawn)
        pack[2].append(sum(lengths))
    return pack


@st.composite
def masks(draw: st.DrawFn, windows: bool = False):
    """Of every kind: forests and packs, some padded, some with selected queries."""
    if draw(st.booleans()):
        mask = SpanMask.from_spans(*draw(forests()))
    else:
        mask = SpanMask.from_bagel(*draw(bagel_packs()))
    if windows:
        mask = mask.with_window(draw(st.integers(1, 12)))
    if draw(st.booleans()):
        mask = mask.pad_to(mask.length + draw(st.integers(1, 9)))
    if draw(st.booleans()):
        chosen = draw(st.sets(st.integers(0, mask.length - 1))) if mask.length else ()
        mask = mask.select_queries(sorted(chosen))
    return mask


MODES = st.sampled_from(["causal", "full"])


def paths(parents: list[int]) -> list[list[int]]:
    """Per span, its ancestors from the root on, and itself."""
    found: list[list[int]] = []
    for span, parent in enumerate(parents):
        found.append([*(found[parent] if parent >= 0 else []), span])
    return found


def dense_forest(lengths: list[int], parents: list[int], modes: list[str]) -> Tensor:
    """The definition: the key's span is the query's or its ancestor; causal or full inside."""
    span_of = [s for s, length in enumerate(lengths) for _ in range(length)]
    dense = zeros(len(span_of), len(span_of)).bool()
    seen_by = paths(parents)
    for q, query_span in enumerate(span_of):
        for k, key_span in enumerate(span_of):
            inside = modes[key_span] == "full" or k <= q
            dense[q, k] = key_span in seen_by[query_span] and (key_span != query_span or inside)
    return dense


def path_positions(lengths: list[int], parents: list[int]) -> list[int]:
    """Of every token, how many of its span and of the span's ancestors come before it."""
    seen_by = paths(parents)
    return [
        sum(lengths[ancestor] for ancestor in seen_by[span][:-1]) + token
        for span, length in enumerate(lengths)
        for token in range(length)
    ]


def dense_window(lengths: list[int], parents: list[int], modes: list[str], window: int) -> Tensor:
    """The definition: what the spans show, of positions less than `window` behind the query."""
    position = tensor(path_positions(lengths, parents), dtype=int64)
    behind = position[:, None] - position
    return dense_forest(lengths, parents, modes) & (behind < window)


def dense_bagel(split_lens: list[int], attn_modes: list[str], sample_lens: list[int]) -> Tensor:
    """BAGEL's own rule, from per-token sample and split labels."""
    sizes = tensor(split_lens)
    split = arange(len(sizes)).repeat_interleave(sizes)
    sample = arange(len(sample_lens)).repeat_interleave(tensor(sample_lens))
    noise = tensor([mode == "noise" for mode in attn_modes])[split]
    block = tensor([mode != "causal" for mode in attn_modes])[split]
    same_split = split[:, None] == split[None, :]
    position = arange(len(split))
    earlier = position[:, None] >= position[None, :]
    return (
        (sample[:, None] == sample[None, :])
        & (earlier | (same_split & block[None, :]))
        & ~(noise[None, :] & ~same_split)
    )


def dense_token_types(token_types: list[int], cu_seqlens: list[int]) -> Tensor:
    """Causal within a document, and both ways within an image."""
    document = [d for d in range(len(cu_seqlens) - 1) for _ in range(*cu_seqlens[d : d + 2])]
    labels = list(zip(document, token_types, strict=True))
    image, images = [], 0
    for token, label in enumerate(labels):
        images += token == 0 or label != labels[token - 1]
        image.append(images if label[1] else -token)
    length = range(len(labels))
    dense = zeros(len(labels), len(labels)).bool()
    for q in length:
        for k in length:
            dense[q, k] = document[q] == document[k] and (k <= q or image[q] == image[k])
    return dense
