"""A BAGEL training pack as spans.

Everything here runs on the host. What spans cannot describe is a ValueError that says why.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from itertools import accumulate

from torch import Tensor

from lvrpo.masks.host import host_ints
from lvrpo.masks.layouts import Layout


def bagel_layout(
    split_lens: Sequence[int] | Tensor,
    attn_modes: Sequence[str],
    sample_lens: Sequence[int] | Tensor,
    sample_splits: Sequence[int] | Tensor | None,
) -> Layout:
    """See `SpanMask.from_bagel`."""
    split_lens = host_ints("split_lens", split_lens)
    sample_lens = host_ints("sample_lens", sample_lens)
    for sample, length in enumerate(sample_lens):
        if length < 0:
            raise ValueError(f"SpanMask: sample {sample} has length {length}, expected >= 0")
    if len(split_lens) != len(attn_modes):
        counts = f"{len(split_lens)} split_lens, {len(attn_modes)} attn_modes"
        raise ValueError(f"SpanMask: {counts}, expected one of each per split")
    if sample_splits is None:
        sample_of = _samples_by_length(split_lens, sample_lens)
    else:
        sample_of = _samples_by_count(
            split_lens, sample_lens, host_ints("sample_splits", sample_splits)
        )
    parents: list[int] = []
    last_visible: dict[int, int] = {}
    for split, (sample, mode) in enumerate(zip(sample_of, attn_modes, strict=True)):
        parents.append(last_visible.get(sample, -1))
        if mode != "noise":
            last_visible[sample] = split
    return Layout(split_lens, parents, ["full" if mode == "noise" else mode for mode in attn_modes])


def _samples_by_length(split_lens: list[int], sample_lens: list[int]) -> list[int]:
    """The sample of each split; an empty one where two samples meet ends the first of them."""
    samples = []
    sample_ends = list(accumulate(sample_lens))
    position = 0
    for split, length in enumerate(split_lens):
        sample = (bisect_right if length else bisect_left)(sample_ends, position)
        position += length
        if sample < len(sample_ends) and position > sample_ends[sample]:
            raise ValueError(
                f"SpanMask: split {split} ends at {position}, beyond its sample {sample}, "
                f"which ends at {sample_ends[sample]}"
            )
        samples.append(sample)
    if position != sum(sample_lens):
        total = f"{position} tokens, the samples to {sum(sample_lens)}"
        raise ValueError(f"SpanMask: the splits add up to {total}")
    return samples


def _samples_by_count(
    split_lens: list[int], sample_lens: list[int], sample_splits: list[int]
) -> list[int]:
    """The sample of each split, from how many splits every sample has."""
    if len(sample_splits) != len(sample_lens) or sum(sample_splits) != len(split_lens):
        counts = f"{len(sample_splits)} samples with {sum(sample_splits)} splits"
        expected = f"{len(sample_lens)} with {len(split_lens)}"
        raise ValueError(f"SpanMask: sample_splits has {counts}, expected {expected}")
    first = 0
    for sample, (count, length) in enumerate(zip(sample_splits, sample_lens, strict=True)):
        if count < 0:
            raise ValueError(f"SpanMask: sample_splits[{sample}] is {count}, expected >= 0")
        if (total := sum(split_lens[first : first + count])) != length:
            raise ValueError(
                f"SpanMask: the {count} splits of sample {sample} have {total} tokens, "
                f"sample_lens[{sample}] is {length}"
            )
        first += count
    return [sample for sample, count in enumerate(sample_splits) for _ in range(count)]
