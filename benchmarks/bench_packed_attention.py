"""Attention over groups that share a prompt: prompts of text and image, completions of either.

    pytest benchmarks/bench_packed_attention.py --benchmark-only --size=full     minutes on 2 cores
    pytest benchmarks/bench_packed_attention.py --benchmark-only --size=gpu      a model's heads

Rates count visible pairs: 4 x width x query heads FLOP each forward, 2.5 times that backward.
Completions are 0.5 to 1.5 times as long as their mean, from a fixed seed. The correctness gate sees
the whole layout, of some of the heads.

With one layout, whatever a provider makes of the SpanMask is made before the clock starts, except
by those called "built". In "new lengths" every round has a layout of other lengths than all before,
the same for all providers, and its SpanMask and all that is made of it are in the time. Compilers
have the gate and three such calls to warm up with; what they compile after that is in the time.

    torch              SDPA with a dense additive mask, given
    sdpa built         the same with a dense boolean mask, built in every call
    sdpa causal        SDPA without a mask, for the plain text
    flex given         FlexAttention, dynamic=True, with its BlockMask given
    flex built         ... with create_block_mask, compiled, in every call
    flex built by us   ... with SpanMask.to_block_mask in every call
    unshared sdpa      a copy of the prompt for every completion, as a padded batch; the copies are
                       made and their gradients added up in the call
    unshared varlen    ... without padding, by torch's varlen_attn
    unshared fa2 to 4  ... by flash-attn, where one is installed
    prefix-grouper     PrefixGrouper, for prompts and completions of text

And what the layout costs: the mask itself, what follows from it, and its form for FlexAttention.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from harness.providers import DEVICE, Case
from peers import sdpa
from peers.attention import peers
from torch import Tensor

from lvrpo.masks import Group, SpanMask
from lvrpo.masks.positions import position_ids, target_index
from lvrpo.masks.schedule import schedule


@dataclass(frozen=True)
class Shape:
    """Groups of one prompt and its completions.

    Attributes:
        image, text: tokens of the prompt's image, which comes first, and of its text.
        completions: of each group, (count, mean tokens); none for plain text.
        kind: "text" or "image" completions; an image is noise that only its own tokens see.
        groups: in the buffer.
        heads: of queries and of keys; width of each.
        turns: layouts, one per round, each with other lengths; 1 keeps the lengths.
    """

    image: int
    text: int
    completions: tuple[int, int] = (0, 0)
    kind: str = "text"
    groups: int = 1
    heads: tuple[int, int] = (8, 2)
    width: int = 64
    dtype: torch.dtype = torch.float32
    turns: int = 1

    def layouts(self) -> list[list[Group]]:
        """`turns` layouts, no two of one length."""
        found: dict[int, list[Group]] = {}
        draw = random.Random(0)
        while len(found) < self.turns:
            groups = [self._group(draw) for _ in range(self.groups)]
            chains = [chain for prompt, others in groups for chain in (prompt, *others)]
            found.setdefault(sum(length for chain in chains for length, _ in chain), groups)
        return list(found.values())

    def _group(self, draw: random.Random) -> Group:
        def ragged(mean: int, spread: float) -> int:
            return round(mean * draw.uniform(1 - spread, 1 + spread))

        spread = 0.25 if self.turns > 1 else 0.0
        prompt = [(ragged(self.image, spread), "full"), (ragged(self.text, spread), "causal")]
        prompt = [span for span in prompt if span[0]]
        count, mean = self.completions
        if self.kind == "image":
            return prompt, [[(ragged(mean, spread), "full")]] * count
        return prompt, [[(ragged(mean, 0.5), "causal")] for _ in range(count)]


TINY = Shape(24, 16, (4, 12), groups=2, heads=(4, 2), width=32)
#: Two heads, so that what grows with the square of the length is not lost in what does not.
PLAIN = Shape(0, 2048, heads=(2, 1))
IMAGE = Shape(384, 96, (8, 200))
#: Of a 7B model with 28 layers; prompts of 1, 2 and 4 thousand tokens of image.
LARGE = Shape(2048, 256, (16, 512), heads=(28, 4), width=128, dtype=torch.bfloat16)
SMALL_IMAGE, LARGE_IMAGE = (replace(LARGE, image=i, text=t) for i, t in ((1024, 128), (4096, 256)))
SHAPES = {
    "small": {
        "an image": TINY,
        "text": replace(TINY, image=0, text=24, dtype=torch.bfloat16),
        "new lengths": replace(TINY, turns=12),
    },
    "full": {
        "an image": IMAGE,
        "an image, bf16": replace(IMAGE, dtype=torch.bfloat16),
        "a large image": Shape(1024, 64, (8, 384), heads=(4, 1)),
        "text": Shape(0, 512, (8, 192)),
        "drawings": Shape(0, 64, (8, 256), kind="image"),
        "plain text": PLAIN,
        "plain text, twice as long": replace(PLAIN, text=4096),
        "plain text, four times": replace(PLAIN, text=8192),
        "new lengths": replace(IMAGE, turns=16),
    },
    "gpu": {
        "1152 + 8 x 256": replace(SMALL_IMAGE, completions=(8, 256)),
        "1152 + 16 x 256": replace(SMALL_IMAGE, completions=(16, 256)),
        "1152 + 8 x 1024": replace(SMALL_IMAGE, completions=(8, 1024)),
        "2304 + 8 x 512": replace(LARGE, completions=(8, 512)),
        "2304 + 16 x 512": LARGE,
        "4352 + 16 x 256": replace(LARGE_IMAGE, completions=(16, 256)),
        "4352 + 8 x 512": replace(LARGE_IMAGE, completions=(8, 512)),
        "4352 + 16 x 1024": replace(LARGE_IMAGE, completions=(16, 1024)),
        "32 heads": replace(LARGE, heads=(32, 8)),
        "width 64": replace(LARGE, width=64),
        "width 256": replace(LARGE, width=256),
        "text": replace(LARGE, image=0, text=512, completions=(8, 1024)),
        "drawings": replace(LARGE, image=900, text=128, completions=(8, 1024), kind="image"),
        "plain text": replace(LARGE, image=0, text=8192, completions=(0, 0)),
        "new lengths": replace(LARGE, turns=24),
    },
}


def attend_to_groups(
    functional: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor, groups: list[Group]
) -> Tensor:
    """The call of a step that has met its lengths for the first time."""
    return functional(q, k, v, SpanMask.from_groups(groups).to(DEVICE))


def make_case(shape: Shape, name: str, direction: str) -> Case:
    layouts = shape.layouts()
    masks = [SpanMask.from_groups(groups).to(DEVICE) for groups in layouts]
    steady = shape.turns == 1

    def inputs(turn: int, q_heads: int, kv_heads: int) -> dict[str, Any]:
        heads = {"q": q_heads, "k": kv_heads, "v": kv_heads}
        rows = {n: tensors[n][: masks[turn].length, :h] for n, h in heads.items()}
        return rows | ({"mask": masks[turn]} if steady else {"groups": layouts[turn]})

    longest = max(mask.length for mask in masks)
    q_heads, kv_heads = shape.heads
    tensors = {
        n: torch.randn(longest, heads, shape.width, device=DEVICE).to(shape.dtype)
        for n, heads in {"q": q_heads, "k": kv_heads, "v": kv_heads}.items()
    }
    pairs = sum(int((mask.q_hi - mask.q_lo).sum()) for mask in masks) // len(masks)
    flops = 4 * pairs * q_heads * shape.width
    tokens = sum(mask.length for mask in masks) // len(masks)
    moved = tokens * 2 * (q_heads + kv_heads) * shape.width * shape.dtype.itemsize
    # Scores of all heads in fp64 would be many GiB; these still tell one head from another.
    kept = min(2, kv_heads)
    gate = inputs(0, kept * min(2, q_heads // kv_heads), kept)
    gate_heads = gate["q"].shape[1]
    # A sum over a head's width of upstream values of order 1 / outputs. The backward reads the
    # output as it was stored, rounded in a narrow dtype, which costs a few units more.
    unit = shape.width**0.5 / (masks[0].length * gate_heads)
    of_gradients = (4.0 if shape.dtype == torch.float32 else 32.0) * unit
    many = "" if steady else f", {shape.turns} layouts"
    first = inputs(0, q_heads, kv_heads)
    return Case(
        "packed_attention",
        first,
        ("q", "k", "v"),
        call=None if steady else attend_to_groups,
        plain=sdpa.given,
        compile_plain=False,
        # Two products per visible pair; the backward has five.
        flops={"forward": flops, "forward+backward": 7 * flops // 2},
        bytes_moved={"forward": moved, "forward+backward": 3 * moved},
        peers=peers(
            masks[0], first["q"], first["k"], steady=steady, gradients=direction != "forward"
        ),
        scales={"out0": 4.0, **dict.fromkeys(("dq", "dk", "dv"), of_gradients)},
        gate=gate,
        turns=() if steady else [inputs(turn, q_heads, kv_heads) for turn in range(shape.turns)],
        shape=f"{name}: {tokens} tokens{many}, heads {q_heads}/{kv_heads} x {shape.width}",
    )


@pytest.fixture(autouse=True)
def _layouts_on_the_host() -> None:
    """Where they are built before they are moved."""
    torch.set_default_device(None)


def bench_packed_attention(measure, direction, shape):
    name = next(name for shapes in SHAPES.values() for name, s in shapes.items() if s is shape)
    measure(make_case(shape, name, direction), direction)


#: 10 groups of 18 completions: 200 spans, 16,640 tokens.
GROUPS = [([(400, "full"), (112, "causal")], [[(64, "causal")]] * 18)] * 10
COMPLETIONS = [span for span in range(200) if span % 20 > 1]
LAYOUT: dict[str, Callable[[SpanMask], Any]] = {
    "mask": lambda mask: SpanMask.from_groups(GROUPS),
    "schedule of kernels": schedule,
    "position_ids": position_ids,
    "target_index": lambda mask: target_index(mask, COMPLETIONS),
    "tiles of 128 x 64": lambda mask: mask.tiles((128, 64)),
    "BlockMask of 128 x 128": lambda mask: mask.to_block_mask(128),
    "row intervals": lambda mask: mask.to_row_intervals(),
    "to FlashMask and back": lambda mask: SpanMask.from_flashmask(mask.to_flashmask()),
}


@pytest.mark.benchmark(max_time=0.3)
@pytest.mark.parametrize("build", LAYOUT.values(), ids=LAYOUT.keys())
def bench_layout(benchmark, build):
    benchmark.group = "layout of 200 spans, 16,640 tokens"
    benchmark(build, SpanMask.from_groups(GROUPS))
