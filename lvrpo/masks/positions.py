"""Position ids and targets of a packed buffer whose completions share their prompts.

A span continues the positions of its parent, not of the span before it in the buffer: every
completion of a group starts where the prompt ends, as it would in a sequence of its own. All
results are for the whole buffer, on the mask's device; index them with `mask.rows` where a mask has
selected queries. Nothing is read from a device.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

from lvrpo.masks.host import host_spans, move, on_the_host
from lvrpo.masks.tables import SpanTables


def first_ids(mask: SpanTables, advances: Sequence[int]) -> list[int]:
    """Per span, the sum of its ancestors' advances."""
    after = [0]  # by span + 1, so that parent -1 finds a zero
    for parent, advance in zip(mask.parents, advances, strict=True):
        after.append(after[parent + 1] + advance)
    return [after[parent + 1] for parent in mask.parents]


@on_the_host
def position_ids(mask: SpanTables) -> Tensor:
    """Every token advances the position by one, in texts and in images.

    Returns:
        [L] int64; 0 in padding.
    """
    lengths = [end - start for start, end in pairwise(mask.span_offsets)]
    ids = _ids(mask, first_ids(mask, lengths), [True] * mask.num_spans)
    return move(ids, mask.q_lo.device)


@on_the_host
def bagel_position_ids(mask: SpanTables) -> Tensor:
    """BAGEL's: text advances by one per token, an image (a full span) shares one id.

    A noisy image is a leaf, so nothing counts its id and its clean copy gets the same one. An image
    that was dropped for guidance still counts, in its own sample: leave it as a full span of length
    0; `SpanMask.from_bagel` says which sample that is where two meet.

    Returns:
        [L] int64; 0 in padding.
    """
    text = [mode == "causal" for mode in mask.modes]
    advances = [
        end - start if causal else 1
        for (start, end), causal in zip(pairwise(mask.span_offsets), text, strict=True)
    ]
    return move(_ids(mask, first_ids(mask, advances), text), mask.q_lo.device)


@on_the_host
def mrope_position_ids(
    mask: SpanTables,
    grids: Mapping[int, tuple[int, int, int]],
    *,
    seconds_per_frame: Mapping[int, float] | None = None,
    tokens_per_second: float = 1.0,
    resume: Literal["after_largest", "after_frame"] = "after_largest",
) -> Tensor:
    """M-RoPE (time, height, width) ids, as Qwen-VL numbers them.

    Text has three equal ids that advance by one per token. The tokens of an image or a video are
    numbered in each direction from the position that it starts at. Frames of a video whose seconds
    are given are `tokens_per_second` ids a second apart, rounded down (Qwen2.5-VL); all others one.

    Args:
        mask: its image tokens are spans of their own, whatever their mode.
        grids: by span, the image's frames, rows and columns of tokens, after merging of patches.
        seconds_per_frame: by span, the seconds from one frame of a grid to the next; > 0.
            transformers: `second_per_grid_ts`.
        tokens_per_second: of the model's vision config.
        resume: where what follows a span of `grids` starts. "after_largest": after its largest id,
            as in transformers up to 4.49. "after_frame": after its largest height and width, as in
            transformers 5.24, where the ids of a video's later frames recur. Images do not differ.

    Returns:
        [3, L] int64; 0 in padding.

    Raises:
        ValueError: a span is not in the mask, its grid has another number of tokens, or its seconds
            have no grid (named); a number is not finite or not above 0; `resume` is unknown.
    """
    if resume not in ("after_largest", "after_frame"):
        raise ValueError(f"resume is {resume!r}, expected 'after_largest' or 'after_frame'")
    if not 0 < tokens_per_second < math.inf:
        raise ValueError(f"tokens_per_second is {tokens_per_second}, expected a number > 0")
    advances = [end - start for start, end in pairwise(mask.span_offsets)]
    for span, (frames, height, width) in grids.items():
        if not 0 <= span < mask.num_spans:
            raise ValueError(f"grids has span {span}, the mask has {mask.num_spans} spans")
        if min(frames, height, width) < 1 or frames * height * width != advances[span]:
            raise ValueError(
                f"the grid of span {span} is {frames} x {height} x {width}, the span has "
                f"{advances[span]} tokens"
            )
    seconds = dict(seconds_per_frame or {})
    for span, value in seconds.items():
        if span not in grids:
            raise ValueError(f"seconds_per_frame has span {span}, which has no grid")
        if not 0 < value < math.inf:
            raise ValueError(f"seconds_per_frame[{span}] is {value}, expected a number > 0")
    times: dict[int, Tensor] = {}
    for span, (frames, height, width) in grids.items():
        times[span] = torch.arange(frames)
        if span in seconds:
            times[span] = _time_ids(frames, seconds[span], tokens_per_second, resume)
        last_time = int(times[span][-1]) + 1 if resume == "after_largest" else 0
        advances[span] = max(last_time, height, width)
    first = first_ids(mask, advances)
    ids = _ids(mask, first, [True] * mask.num_spans).repeat(3, 1)
    for span, (_, height, width) in grids.items():
        directions = times[span], torch.arange(height), torch.arange(width)
        start, end = mask.span_offsets[span : span + 2]
        grid = torch.stack(torch.meshgrid(*directions, indexing="ij"))
        ids[:, start:end] = grid.flatten(1) + first[span]
    return move(ids, mask.q_lo.device)


def _time_ids(frames: int, seconds: float, tokens_per_second: float, resume: str) -> Tensor:
    """[frames] int64, in fp32 and in the order of each release, for rounding down shows it."""
    frame = torch.arange(frames, dtype=torch.float32)
    per_frame, rate = torch.tensor([seconds, tokens_per_second], dtype=torch.float32)
    after_largest = resume == "after_largest"
    time: Tensor = frame * per_frame * rate if after_largest else frame * (per_frame * rate)
    return time.long()


@dataclass(frozen=True, eq=False)
class TargetIndex:
    """Which row predicts each token of some spans; make one with `target_index`.

    T targets, span after span.

    Attributes:
        row_index: [T] int64, the buffer row that predicts each target.
        token_rows: [T] int64, the buffer row that holds each target; -1: none does.
        cu_seqlens: [n + 1] int64, where the targets of each span begin and end.
    """

    row_index: Tensor
    token_rows: Tensor
    cu_seqlens: Tensor


@on_the_host
def target_index(
    mask: SpanTables, spans: Sequence[int], *, last_has_row: bool = True
) -> TargetIndex:
    """The targets of text spans, for `gather_logprobs(logits, token_ids, row_index)`.

    A token is predicted by the row before it on its own path. The first tokens of all completions
    of a prompt are predicted by the one last row of the prompt, which then has many targets. The
    first token of a document has no such row and is left out.

    Args:
        mask: of the buffer.
        spans: causal spans whose tokens are targets, in any order.
        last_has_row: False when each of these spans was laid out without its last token, which no
            later token has to see: it is a target all the same, of the last row.

    Raises:
        ValueError: a span is not in the mask, or is full: its rows see what they would predict.

    Example:
        >>> import torch
        >>> mask = SpanMask.from_groups([([(3, "causal")], [[(2, "causal")], [(2, "causal")]])])
        >>> targets = target_index(mask, [1, 2])
        >>> targets.row_index.tolist(), targets.token_rows.tolist()
        ([2, 3, 2, 5], [3, 4, 5, 6])
    """
    spans = host_spans(spans, mask.num_spans)
    for span in spans:
        if mask.modes[span] != "causal":
            raise ValueError(f"span {span} is full: its rows see the tokens they would predict")
    offsets = mask.span_offsets
    last_rows = [-1]  # of every span, or of its nearest ancestor that has rows; [-1] for a root
    for (start, end), parent in zip(pairwise(offsets), mask.parents, strict=True):
        last_rows.append(end - 1 if end > start else last_rows[parent + 1])
    before, starts, ends = (
        torch.tensor(values, dtype=torch.int64)
        for values in (
            [last_rows[mask.parents[span] + 1] for span in spans],
            [offsets[span] for span in spans],
            [offsets[span + 1] for span in spans],
        )
    )
    left_out = (before < 0).long()
    counts = (ends - starts + (not last_has_row) - left_out).clamp(min=0)
    cu_seqlens = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    span_of = torch.repeat_interleave(counts)
    token = torch.arange(len(span_of)) - (cu_seqlens[:-1] - left_out)[span_of]
    rows = starts[span_of] + token
    found = TargetIndex(
        row_index=torch.where(token > 0, rows - 1, before[span_of]),
        token_rows=torch.where(rows < ends[span_of], rows, -1),
        cu_seqlens=cu_seqlens,
    )
    return TargetIndex(*(move(x, mask.q_lo.device) for x in vars(found).values()))


def _ids(mask: SpanTables, first: Sequence[int], counting: Sequence[bool]) -> Tensor:
    """[L] ids from the first of every span, that count up or stay; 0 in padding."""
    ids = torch.zeros(mask.length, dtype=torch.int64)
    edges = torch.tensor(mask.span_offsets)
    span_of = torch.repeat_interleave(edges.diff())
    counts = torch.tensor(counting, dtype=torch.int64)
    tokens = torch.arange(len(span_of))
    start_ids = torch.tensor(first, dtype=torch.int64) - counts * edges[:-1]
    ids[: len(span_of)] = start_ids[span_of] + counts[span_of] * tokens
    return ids
