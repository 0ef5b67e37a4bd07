"""Attention over groups that share a prompt: prompts of text and image, completions of either.

And what the layout costs: the mask itself, what follows from it, and its form for FlexAttention.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from _providers import Case, Peer
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from lvrpo.masks import SpanMask
from lvrpo.positions import position_ids, target_index

# groups, completions, prompt tokens (text, image), completion tokens (text, image), heads, width
SHAPES = {
    "small": {"two groups of 8": (2, 8, (24, 16), (12, 16), (4, 2), 32)},
    "full": {
        "8 groups of 8, tiny heads": (8, 8, (24, 36), (12, 36), (4, 2), 32),
        "2 groups of 8, wide heads": (2, 8, (128, 256), (64, 256), (8, 2), 128),
    },
}


def make_mask(
    groups: int, completions: int, prompt: tuple[int, int], completion: tuple[int, int]
) -> SpanMask:
    """Half of the completions of a group are texts, half are noisy images."""
    trunk = [(prompt[1], "full"), (prompt[0], "causal")]
    texts = [[(completion[0], "causal")]] * (completions // 2)
    images = [[(completion[1], "full")]] * (completions - len(texts))
    return SpanMask.from_groups([(trunk, texts + images)] * groups)


def sdpa(q: Tensor, k: Tensor, v: Tensor, mask: SpanMask) -> Tensor:
    """torch's attention with a dense mask, which is what a packed group costs without SpanMask."""
    heads_first = (x.transpose(0, 1)[None] for x in (q, k, v))
    out = scaled_dot_product_attention(*heads_first, attn_mask=mask.to_dense(), enable_gqa=True)
    return out[0].transpose(0, 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def bench_packed_attention(measure, direction, shape, dtype):
    *layout, (q_heads, kv_heads), width = shape
    mask = make_mask(*layout)

    def call(functional: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return functional(q, k, v, mask)

    length = mask.length
    inputs = {
        name: torch.randn(length, heads, width).to(dtype)
        for name, heads in {"q": q_heads, "k": kv_heads, "v": kv_heads}.items()
    }
    pairs = int((mask.q_hi - mask.q_lo).sum())
    flops = 4 * pairs * q_heads * width
    moved = sum(x.nbytes for x in inputs.values()) + inputs["q"].nbytes
    # A sum over a head's width of upstream values of order 1 / outputs. The backward reads the
    # output as it was stored, rounded in a narrow dtype, which costs a few units more.
    of_gradients = (4.0 if dtype == torch.float32 else 32.0) * width**0.5 / (length * q_heads)
    case = Case(
        "packed_attention",
        inputs,
        ("q", "k", "v"),
        call=call,
        # Two products per visible pair; the backward has five.
        flops={"forward": flops, "forward+backward": 7 * flops // 2},
        bytes_moved={"forward": moved, "forward+backward": 3 * moved},
        peers={"sdpa": Peer(lambda: sdpa)},
        scales={"out0": 4.0, **{f"d{name}": of_gradients for name in inputs}},
    )
    measure(case, direction)


#: 10 groups of 18 completions: 200 spans, 16,640 tokens.
GROUPS = [([(400, "full"), (112, "causal")], [[(64, "causal")]] * 18)] * 10
COMPLETIONS = [span for span in range(200) if span % 20 > 1]
LAYOUT: dict[str, Callable[[SpanMask], Any]] = {
    "mask": lambda mask: SpanMask.from_groups(GROUPS),
    "position_ids": position_ids,
    "target_index": lambda mask: target_index(mask, COMPLETIONS),
    "tiles of 128 x 64": lambda mask: mask.tiles((128, 64)),
    "BlockMask of 128 x 128": lambda mask: mask.to_block_mask(128),
    "row intervals": lambda mask: mask.to_row_intervals(),
    "to FlashMask and back": lambda mask: SpanMask.from_flashmask(mask.to_flashmask()),
}


@pytest.mark.parametrize("build", LAYOUT.values(), ids=LAYOUT.keys())
def bench_layout(benchmark, build):
    benchmark.group = "layout of 200 spans, 16,640 tokens"
    benchmark(build, SpanMask.from_groups(GROUPS))
