from __future__ import annotations

import math
from itertools import chain

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from masks.layouts import Layout, forests, paths
from torch import Tensor

from lvrpo import (
    SpanMask,
    bagel_position_ids,
    gather_logprobs,
    mrope_position_ids,
    position_ids,
    target_index,
)

Grids = dict[int, tuple[int, int, int]]
Part = int | tuple[tuple[int, int, int], float | None]
#: What follows a video, and the release of transformers that goes on there.
RELEASES = {"after_largest": "4.49", "after_frame": "5.24"}


def rows_of(mask: SpanMask, spans: list[int]) -> list[int]:
    offsets = mask.span_offsets
    return [row for span in spans for row in range(offsets[span], offsets[span + 1])]


def bagel_alone(lengths: list[int], modes: list[str]) -> list[int]:
    """The ids of one sequence, counted as it is read."""
    ids, position = [], 0
    for length, mode in zip(lengths, modes, strict=True):
        if mode == "causal":
            ids += range(position, position + length)
            position += length
        else:
            ids += [position] * length
            position += mode == "full"
    return ids


def mrope_alone(lengths: list[int], grids: list[tuple[int, int, int] | None]) -> list[list[int]]:
    """Each part starts one after the largest id so far."""
    ids: list[list[int]] = []
    for length, grid in zip(lengths, grids, strict=True):
        start = max((max(token) for token in ids), default=-1) + 1
        if grid is None:
            ids += [[start + token] * 3 for token in range(length)]
        else:
            frames, height, width = (range(start, start + n) for n in grid)
            ids += [[t, h, w] for t in frames for h in height for w in width]
    return ids


@st.composite
def forests_with_grids(draw: st.DrawFn) -> tuple[Layout, Grids]:
    lengths, parents, modes = draw(forests())
    grids = {}
    for span, length in enumerate(lengths):
        choices = [
            (t, h, length // (t * h))
            for t in range(1, length + 1)
            for h in range(1, length + 1)
            if length % (t * h) == 0
        ]
        if choices and draw(st.booleans()):
            grids[span] = draw(st.sampled_from(choices))
    return (lengths, parents, modes), grids


def qwen_alone(parts: list[Part], rate: float, release: str) -> list[list[int]]:
    """Qwen2.5-VL's get_rope_index: that of transformers 4.49 or of 5.24, for one sequence.

    A part is a text's length, or a grid of merged patches and the seconds between its frames, None
    for an image. Both compute times in fp32 and round them down; only 4.49 goes on after them.
    """
    ids: list[list[int]] = []
    current = 0
    for part in parts:
        if isinstance(part, int):
            ids += [[current + token] * 3 for token in range(part)]
            current += part
            continue
        (frames, height, width), seconds = part
        frame = numpy.arange(frames, dtype=numpy.float32)
        if seconds is None:
            times = numpy.arange(frames) if release == "5.24" else 0 * frame
        elif release == "5.24":
            times = frame * (numpy.float32(rate) * numpy.float32(seconds))
        else:
            times = frame * numpy.float32(seconds) * numpy.float32(rate)
        largest = int(times.astype(numpy.int64).max())
        ids += [
            [current + int(t), current + h, current + w]
            for t in times
            for h in range(height)
            for w in range(width)
        ]
        current += max(height, width) if release == "5.24" else max(largest + 1, height, width)
    return ids


@st.composite
def videos(draw: st.DrawFn) -> tuple[list[Part], float]:
    """Texts, images of one frame, and videos with seconds."""
    size = st.integers(1, 4)
    image = st.tuples(st.tuples(st.just(1), size, size), st.none())
    seconds = st.sampled_from([0.1, 0.28, 0.5, 1.0, 1.1, 2.0, 7 / 3])
    video = st.tuples(st.tuples(st.integers(1, 12), size, size), seconds)
    parts = draw(st.lists(st.one_of(st.integers(0, 5), image, video), max_size=7))
    return parts, draw(st.sampled_from([1.0, 2.0, 4.0, 25.0]))


@pytest.mark.parametrize(("resume", "release"), RELEASES.items())
@given(videos())
@settings(max_examples=200, deadline=None)
def test_videos_have_the_times_of_each_release(resume, release, drawn):
    parts, rate = drawn
    lengths = [part if isinstance(part, int) else math.prod(part[0]) for part in parts]
    mask = SpanMask.from_spans(lengths, range(-1, len(parts) - 1), ["causal"] * len(parts))
    grids = {span: part[0] for span, part in enumerate(parts) if not isinstance(part, int)}
    seconds = {span: parts[span][1] for span in grids if parts[span][1] is not None}
    ids = mrope_position_ids(
        mask, grids, seconds_per_frame=seconds, tokens_per_second=rate, resume=resume
    )
    assert ids.T.tolist() == qwen_alone(parts, rate, release)


# What transformers itself gave for 3 tokens of text, a video of 6 x 2 x 2, 2 tokens of text: the
# time of every frame, and the position where text goes on.
RECORDED = {
    ("after_largest", 1.0, 2.0): ([3, 5, 7, 9, 11, 13], 14),
    ("after_frame", 1.0, 2.0): ([3, 5, 7, 9, 11, 13], 5),
    ("after_largest", 0.28, 25.0): ([3, 10, 17, 24, 31, 38], 39),
    ("after_largest", 0.1, 25.0): ([3, 5, 8, 10, 13, 15], 16),
    ("after_frame", 0.1, 25.0): ([3, 5, 8, 10, 13, 15], 5),
}


@pytest.mark.parametrize(("call", "found"), RECORDED.items(), ids=str)
def test_recorded_positions_of_a_video(call, found):
    resume, seconds, rate = call
    mask = SpanMask.from_spans([3, 24, 2], [-1, 0, 1], ["causal"] * 3)
    ids = mrope_position_ids(
        mask,
        {1: (6, 2, 2)},
        seconds_per_frame={1: seconds},
        tokens_per_second=rate,
        resume=resume,
    )
    assert ids[0, 3:27:4].tolist() == found[0]
    assert ids[:, 27].tolist() == [found[1]] * 3


@given(forests_with_grids())
@settings(max_examples=150, deadline=None)
def test_every_path_has_the_ids_of_a_sequence_of_its_own(drawn):
    (lengths, parents, modes), grids = drawn
    mask = SpanMask.from_spans(lengths, parents, modes)
    plain, bagel = position_ids(mask), bagel_position_ids(mask)
    mrope = mrope_position_ids(mask, grids)
    assert plain.dtype == bagel.dtype == mrope.dtype == torch.int64
    assert mrope.shape == (3, mask.length)
    for path in paths(parents):
        rows, sizes = rows_of(mask, path), [lengths[span] for span in path]
        assert plain[rows].tolist() == list(range(len(rows)))
        assert bagel[rows].tolist() == bagel_alone(sizes, [modes[span] for span in path])
        expected = mrope_alone(sizes, [grids.get(span) for span in path])
        assert mrope[:, rows].T.tolist() == expected


Splits = list[tuple[int, str]]


def bagel_pack_ids(samples: list[Splits]) -> list[int]:
    """The ids that BAGEL's pack_sequence gives to the splits, (length, mode), of its samples.

    Its count goes from item to item of a sample, and starts anew with the next one. A clean image
    that is dropped for guidance advances it and leaves no token behind: its length is 0.
    """
    return [i for splits in samples for i in bagel_alone(*map(list, zip(*splits, strict=True)))]


@st.composite
def bagel_samples(draw: st.DrawFn) -> list[Splits]:
    """Half of the clean images are dropped, at the ends of samples too."""
    lengths = st.integers(1, 4)
    split = st.one_of(
        st.tuples(lengths, st.sampled_from(["causal", "full", "noise"])),
        st.just((0, "full")),
    )
    return draw(st.lists(st.lists(split, min_size=1, max_size=5), min_size=1, max_size=4))


@given(bagel_samples())
@settings(max_examples=400, deadline=None)
def test_bagel_ids_of_a_pack(samples):
    lengths, modes = zip(*chain.from_iterable(samples), strict=True)
    sizes = [sum(length for length, _ in splits) for splits in samples]
    ids = bagel_pack_ids(samples)
    mask = SpanMask.from_bagel(lengths, modes, sizes, [len(splits) for splits in samples])
    assert bagel_position_ids(mask).tolist() == ids
    # Where two samples meet, an empty split is the first one's, unless the counts say otherwise.
    if all(sizes) and all(splits[0][0] for splits in samples[1:]):
        unsaid = SpanMask.from_bagel(lengths, modes, sizes)
        assert unsaid.parents == mask.parents
        assert bagel_position_ids(unsaid).tolist() == ids


def test_a_dropped_image_where_two_samples_meet():
    splits = [3, 0, 2], ["causal", "full", "causal"], [3, 2]
    assert bagel_position_ids(SpanMask.from_bagel(*splits)).tolist() == [0, 1, 2, 0, 1]
    last, first = (SpanMask.from_bagel(*splits, counts) for counts in ([2, 1], [1, 2]))
    assert bagel_position_ids(last).tolist() == [0, 1, 2, 0, 1]
    assert bagel_position_ids(first).tolist() == [0, 1, 2, 1, 2]
    for counts, message in (
        ([3], "sample_splits has 1 samples with 3 splits, expected 2 with 3"),
        ([1, 1], "2 samples with 2 splits, expected 2 with 3"),
        ([0, 3], "the 0 splits of sample 0 have 0 tokens, sample_lens.0. is 3"),
        ([4, -1], "the 3 splits of sample 0|sample_splits.1. is -1|the 4 splits"),
    ):
        with pytest.raises(ValueError, match=message):
            SpanMask.from_bagel(*splits, counts)


def test_an_image_that_was_dropped_still_counts():
    mask = SpanMask.from_spans([2, 0, 3], [-1, 0, 1], ["causal", "full", "causal"])
    assert bagel_position_ids(mask).tolist() == [0, 1, 3, 4, 5]


def test_padding_and_selection_keep_the_ids():
    mask = SpanMask.from_groups([([(3, "causal")], [[(2, "causal")]] * 2)])
    padded = mask.pad_to(9)
    assert position_ids(padded).tolist() == [0, 1, 2, 3, 4, 3, 4, 0, 0]
    assert torch.equal(position_ids(mask.select_spans([2])), position_ids(mask))
    assert mrope_position_ids(padded, {}).shape == (3, 9)


def test_helpers_read_nothing_from_a_device():
    mask = SpanMask.from_groups([([(3, "causal")], [[(2, "causal")]] * 2)]).to("meta")
    tensors = [
        position_ids(mask),
        bagel_position_ids(mask),
        mrope_position_ids(mask, {1: (1, 1, 2)}),
    ]
    tensors += vars(target_index(mask, [1, 2])).values()
    assert {tensor.device.type for tensor in tensors} == {"meta"}


@given(forests(), st.booleans(), st.data())
@settings(max_examples=150, deadline=None)
def test_a_target_is_predicted_by_the_row_before_it_on_its_path(layout, last_has_row, data):
    lengths, parents, modes = layout
    mask = SpanMask.from_spans(*layout)
    spans = [s for s, mode in enumerate(modes) if mode == "causal" and data.draw(st.booleans())]
    spans = data.draw(st.permutations(spans))
    targets = target_index(mask, spans, last_has_row=last_has_row)
    row_index, token_rows, cu_seqlens = [], [], [0]
    for span in spans:
        path = rows_of(mask, paths(parents)[span])
        if not last_has_row:
            path.append(-1)
        tokens = range(len(path) - lengths[span] - (not last_has_row), len(path))
        row_index += [path[token - 1] for token in tokens if token > 0]
        token_rows += [path[token] for token in tokens if token > 0]
        cu_seqlens.append(len(row_index))
    assert targets.row_index.tolist() == row_index
    assert targets.token_rows.tolist() == token_rows
    assert targets.cu_seqlens.tolist() == cu_seqlens
    assert targets.row_index.dtype == targets.token_rows.dtype == torch.int64


def test_log_probs_of_a_group_are_those_of_its_sequences():
    """One row of logits per buffer row; the prompt's last row serves the whole group."""
    vocabulary, prompt, completions = 11, [3, 1, 4], [[1, 5], [9], [2, 6, 5]]
    mask = SpanMask.from_groups([([(3, "causal")], [[(len(c), "causal")] for c in completions])])
    buffer = torch.tensor([*prompt, *chain.from_iterable(completions)])
    table = torch.randn(vocabulary, vocabulary)  # a bigram model: logits depend on the token alone
    targets = target_index(mask, [1, 2, 3])
    found = gather_logprobs(table[buffer], buffer[targets.token_rows], targets.row_index)
    for completion, logprobs in zip(
        completions, found.split(targets.cu_seqlens.diff().tolist()), strict=True
    ):
        sequence = torch.tensor(prompt + completion)
        alone = gather_logprobs(table[sequence[:-1]], sequence[1:])
        assert torch.equal(logprobs, alone[-len(completion) :])
    # The same without rows for the last tokens, as a trainer lays them out.
    short = SpanMask.from_groups(
        [([(3, "causal")], [[(len(c) - 1, "causal")] for c in completions])]
    )
    rows = torch.tensor([*prompt, *chain.from_iterable(c[:-1] for c in completions)])
    targets = target_index(short, [1, 2, 3], last_has_row=False)
    again: Tensor = gather_logprobs(
        table[rows], torch.tensor([*chain.from_iterable(completions)]), targets.row_index
    )
    assert torch.equal(again, found)


def test_bad_helpers_input():
    mask = SpanMask.from_spans([4, 2], [-1, 0], ["full", "causal"])
    with pytest.raises(ValueError, match="span 0 is full"):
        target_index(mask, [1, 0])
    with pytest.raises(ValueError, match="there is no span 2 among 2"):
        target_index(mask, [2])
    with pytest.raises(ValueError, match="there is no span -1"):
        target_index(mask, [-1])
    with pytest.raises(ValueError, match="grids has span 2, the mask has 2 spans"):
        mrope_position_ids(mask, {2: (1, 1, 1)})
    with pytest.raises(ValueError, match="grid of span 0 is 1 x 2 x 3, the span has 4 tokens"):
        mrope_position_ids(mask, {0: (1, 2, 3)})
    with pytest.raises(ValueError, match="grid of span 0 is -1 x -2 x 2"):
        mrope_position_ids(mask, {0: (-1, -2, 2)})
    grids = {0: (1, 2, 2)}
    for options, message in (
        ({"seconds_per_frame": {1: 1.0}}, "seconds_per_frame has span 1, which has no grid"),
        ({"seconds_per_frame": {0: 0.0}}, r"seconds_per_frame\[0\] is 0.0, expected a number > 0"),
        ({"seconds_per_frame": {0: math.nan}}, r"seconds_per_frame\[0\] is nan"),
        ({"tokens_per_second": math.inf}, "tokens_per_second is inf, expected a number > 0"),
        ({"resume": "after"}, "resume is 'after', expected 'after_largest' or 'after_frame'"),
    ):
        with pytest.raises(ValueError, match=message):
            mrope_position_ids(mask, grids, **options)


def test_what_a_rollout_laid_out_serves_a_backward_pass():
    mask = SpanMask.from_groups([([(3, "causal")], [[(2, "causal")]] * 2)])
    with torch.inference_mode():
        ids, targets = position_ids(mask), target_index(mask, [1, 2])
    table = torch.randn(9, 4, requires_grad=True)
    rows = torch.nn.functional.embedding(ids, table)
    rows.index_select(0, targets.row_index).sum().backward()
    assert table.grad.isfinite().all()
