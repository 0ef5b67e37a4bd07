"""Other people's attention, as the benchmark of packed attention calls it."""

from __future__ import annotations

import importlib.util
from itertools import pairwise

import bench_packed_attention
import pytest
import torch
from harness.measure import Gate
from harness.providers import Case
from peers import attention, sdpa, unshared
from torch.nn.functional import scaled_dot_product_attention

from lvrpo.masks import SpanMask

TEXT, IMAGE = "causal", "full"
LAYOUTS = {
    "an image, texts of several lengths": SpanMask.from_groups(
        [([(5, IMAGE), (3, TEXT)], [[(2, TEXT)], [(6, TEXT)], [(1, TEXT)]])]
    ),
    "texts and drawings in two groups": SpanMask.from_groups(
        [([(4, TEXT)], [[(3, IMAGE)], [(5, TEXT)]]), ([(2, IMAGE)], [[(4, TEXT), (3, IMAGE)]])]
    ),
    "text of two groups": SpanMask.from_groups(
        [([(4, TEXT)], [[(3, TEXT)], [(5, TEXT)]]), ([(7, TEXT)], [[(2, TEXT)]])]
    ),
    "a conversation that branches twice": SpanMask.from_spans(
        [3, 4, 2, 5, 1], [-1, 0, 1, 1, 0], [TEXT, IMAGE, TEXT, TEXT, IMAGE]
    ),
    "plain text": SpanMask.from_groups([([(9, TEXT)], [])]),
}


def varlen_by_sdpa(q, k, v, cu_q, cu_k, max_q, max_k, causal):
    """What a varlen kernel does, sequence by sequence."""
    assert max_q == cu_q.diff().max()
    assert max_k == cu_k.diff().max()
    assert cu_q.dtype == cu_k.dtype == torch.int32
    outs = []
    for (q0, q1), (k0, k1) in zip(pairwise(cu_q.tolist()), pairwise(cu_k.tolist()), strict=True):
        visible = torch.ones(q1 - q0, k1 - k0, dtype=torch.bool)
        visible = visible.tril(k1 - k0 - (q1 - q0)) if causal else visible
        rows = (x.transpose(0, 1) for x in (q[q0:q1], k[k0:k1], v[k0:k1]))
        out = scaled_dot_product_attention(*rows, attn_mask=visible, enable_gqa=True)
        outs.append(out.transpose(0, 1))
    return torch.cat(outs)


EVERYWHERE = {
    "sdpa built": sdpa.built,
    "unshared sdpa": unshared.padded,
    "unshared varlen": unshared.varlen(varlen_by_sdpa),
}


def gate(mask):
    inputs = {n: torch.randn(mask.length, h, 8) for n, h in {"q": 4, "k": 2, "v": 2}.items()}
    case = Case(
        "packed_attention",
        inputs | {"mask": mask},
        ("q", "k", "v"),
        # Sums over a head's width of terms of order 1, and of upstream values of order 1 / outputs.
        scales={"out0": 4.0, **dict.fromkeys(("dq", "dk", "dv"), 4 / inputs["q"].numel())},
    )
    return Gate(case, "forward+backward")


@pytest.mark.parametrize("name", LAYOUTS)
def test_peers_attend_as_the_mask_says(name):
    mask = LAYOUTS[name]
    rule = gate(mask)
    for attend in (sdpa.given, *EVERYWHERE.values()):
        assert rule.grade(attend) == ("float32", "")
    if mask.modes == (TEXT,):
        assert rule.grade(sdpa.plain_text) == ("float32", "")
    installed = importlib.util.find_spec("prefix_grouper")
    if installed and not attention.why_not_prefix_grouper(mask):
        for varlen in (None, varlen_by_sdpa):
            assert rule.grade(attention.prefix_grouper(varlen)) == ("float32", "")


def test_a_peer_that_forgets_an_image_is_found_out():
    mask = LAYOUTS["an image, texts of several lengths"]
    rule = gate(mask)

    def all_causal(q, k, v, mask):
        lengths = [end - start for start, end in pairwise(mask.span_offsets)]
        text = SpanMask.from_spans(lengths, mask.parents, [TEXT] * mask.num_spans)
        return unshared.padded(q, k, v, text)

    assert rule.grade(all_causal)[0] is None


def test_what_a_peer_builds_is_kept_for_one_mask():
    masks = [LAYOUTS[name] for name in list(LAYOUTS)[:2]]
    first = unshared._padded(masks[0])
    assert unshared._padded(masks[0]) is first
    unshared._padded(masks[1])
    assert unshared._padded(masks[0]) is not first


def test_prefix_grouper_is_offered_where_it_applies():
    reasons = {n: attention.why_not_prefix_grouper(mask) for n, mask in LAYOUTS.items()}
    assert [name for name, reason in reasons.items() if not reason] == ["text of two groups"]
    assert "causal" in reasons["an image, texts of several lengths"]
    assert "completion" in reasons["plain text"]


@pytest.mark.parametrize("size", bench_packed_attention.SHAPES)
def test_layouts_of_the_benchmark(size):
    for shape in bench_packed_attention.SHAPES[size].values():
        masks = [SpanMask.from_groups(groups) for groups in shape.layouts()]
        assert len({mask.length for mask in masks}) == shape.turns == len(masks)
        again = [SpanMask.from_groups(groups).length for groups in shape.layouts()]
        assert [mask.length for mask in masks] == again
        expected = shape.groups * (
            shape.image + shape.text + shape.completions[0] * shape.completions[1]
        )
        assert all(0.5 * expected < mask.length < 1.5 * expected for mask in masks)
