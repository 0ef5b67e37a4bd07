from __future__ import annotations

import dataclasses
import functools

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from masks.layouts import (
    MODES,
    Layout,
    bagel_packs,
    dense_forest,
    dense_token_types,
    forests,
    masks,
    paths,
)

from lvrpo.masks import SpanMask, Tree
from lvrpo.ops.packed_attention import packed_attention

CHAINS = st.lists(st.tuples(st.integers(0, 3), MODES), max_size=3)
TREES = st.recursive(
    st.tuples(CHAINS, st.just([])),
    lambda children: st.tuples(CHAINS, st.lists(children, max_size=3)),
    max_leaves=8,
)


def spans_of(tree: Tree, parent: int, layout: Layout) -> None:
    """The definition of a tree, by recursion."""
    chain, children = tree
    for length, mode in chain:
        for values, value in zip(layout, (length, parent, mode), strict=True):
            values.append(value)
        parent = len(layout[0]) - 1
    for child in children:
        spans_of(child, parent, layout)


@given(st.lists(TREES, max_size=3))
@settings(max_examples=100, deadline=None)
def test_tree_matches_its_definition(trees):
    layout: Layout = ([], [], [])
    for tree in trees:
        spans_of(tree, -1, layout)
    mask = SpanMask.from_tree(trees)
    assert mask.parents == tuple(layout[1])
    assert torch.equal(mask.to_dense(), dense_forest(*layout))


@given(st.lists(st.tuples(CHAINS, st.lists(CHAINS, max_size=3)), max_size=3))
@settings(max_examples=50, deadline=None)
def test_groups_are_trees_of_depth_two(groups):
    trees = [(prompt, [(completion, []) for completion in rest]) for prompt, rest in groups]
    ours, expected = SpanMask.from_groups(groups), SpanMask.from_tree(trees)
    assert ours.parents == expected.parents
    assert torch.equal(ours.spans, expected.spans)


def test_tree_may_be_deeper_than_recursion():
    tree: Tree = ([(1, "causal")], [])
    for _ in range(3000):
        tree = ([(1, "causal")], [tree])
    mask = SpanMask.from_tree([tree])
    assert mask.parents == tuple(range(-1, 3000))
    assert mask.runs.tolist()[-1] == [0, 3000]


@given(st.lists(st.lists(st.sampled_from([0, 0, 1, 1, 2]), max_size=8), max_size=4))
@settings(max_examples=100, deadline=None)
def test_token_types_match_their_definition(documents):
    token_types = [kind for document in documents for kind in document]
    cu_seqlens = [0]
    for document in documents:
        cu_seqlens.append(cu_seqlens[-1] + len(document))
    expected = dense_token_types(token_types, cu_seqlens)
    for types, offsets in (
        (token_types, cu_seqlens),
        (torch.tensor(token_types, dtype=torch.int32), torch.tensor(cu_seqlens)),
    ):
        mask = SpanMask.from_token_types(types, offsets)
        assert torch.equal(mask.to_dense(), expected)


def test_token_types_name_the_spans():
    # The images of two packed samples touch and do not join; neighbours of another type are others.
    mask = SpanMask.from_token_types([0, 1, 1, 1, 2, 0, 0], [0, 3, 3, 7])
    assert mask.span_offsets == (0, 1, 3, 4, 5, 7)
    assert mask.parents == (-1, 0, -1, 2, 3)
    assert mask.modes == ("causal", "full", "full", "full", "causal")
    assert SpanMask.from_token_types([0, 1]).span_offsets == (0, 1, 2)
    assert SpanMask.from_token_types([]).length == 0


@given(masks().filter(lambda mask: mask.num_queries == mask.length))
@settings(max_examples=200, deadline=None)
def test_flashmask_round_trip(mask):
    indices = mask.to_flashmask()
    again = SpanMask.from_flashmask(indices)
    assert torch.equal(again.to_dense(), mask.to_dense())
    # Documents as well, up to their emptiness: they are what the reference computes at once.
    for begin, end in zip(again.documents, again.documents[1:], strict=False):
        assert not mask.to_dense()[begin:end, :begin].any()
    # FlashMask's other forms of the same mask: rows [hi, L) and [0, lo) hidden, and every head.
    hi, lo = indices[0, 0].unbind(-1)
    four = torch.stack([hi, torch.full_like(hi, mask.length), torch.zeros_like(hi), lo], dim=-1)
    other = SpanMask.from_flashmask(four.expand(1, 3, -1, -1))
    assert torch.equal(other.to_dense(), mask.to_dense())


@given(forests())
@settings(max_examples=50, deadline=None)
def test_causal_flashmask(layout):
    lengths, parents, _ = layout
    mask = SpanMask.from_spans(lengths, parents, ["causal"] * len(lengths))
    hidden_from = mask.q_hi[None, None, :, None]
    again = SpanMask.from_flashmask(hidden_from, causal=True)
    assert torch.equal(again.to_dense(), mask.to_dense())
    until_the_end = torch.cat([hidden_from, torch.full_like(hidden_from, mask.length)], dim=-1)
    again = SpanMask.from_flashmask(until_the_end, causal=True)
    assert torch.equal(again.to_dense(), mask.to_dense())


def flashmask(*columns: list[int]) -> torch.Tensor:
    return torch.tensor(columns, dtype=torch.int32).T[None, None]


REFUSED = {
    "sliding window": (flashmask([2, 3, 4, 4]), True, "key 0 is seen until row 2, key 1.*sliding"),
    "two-way window": (flashmask([2, 3, 4, 4], [0, 0, 1, 2]), False, "key 2.*sliding window"),
    "interleaved": (flashmask([3, 4, 3, 4]), True, "key 0 is seen until row 3, key 1.*interleaved"),
    "masks per head": (torch.tensor([[[[2], [2]], [[1], [2]]]]), True, "differs by head"),
    "hole": (flashmask([1, 3, 3, 4], [2, 4, 4, 4]), True, "key 0 is seen again.*two ranges"),
    "upper hole": (
        flashmask([3, 3, 3], [3, 3, 3], [0, 0, 1], [0, 0, 2]),
        False,
        "key 2 is also seen before.*two ranges",
    ),
    "branch in an image": (flashmask([3, 2, 3], [0, 0, 2]), False, "keys 0 and 1 of one full span"),
    "not its own row": (flashmask([1, 2, 3], [0, 1, 0]), False, "earlier rows see key 2"),
    "blind to itself": (flashmask([3, 3, 3], [0, 2, 2]), False, "key 1 is not seen by its own row"),
    "hidden key": (flashmask([3, 0, 3], [0, 0, 2]), False, "key 1 is seen by no row"),
    "padding that sees": (flashmask([3, 3, 0], [0, 1, 0]), False, "key 0 is seen by row 2"),
    "one bound": (flashmask([3, 3, 3]), False, "has 1 bounds per key, expected 2 or 4"),
    "four bounds": (flashmask(*[[1]] * 4), True, "has 4 bounds per key, expected 1 or 2"),
    "batch": (torch.zeros(2, 1, 3, 2, dtype=torch.int32), False, "batch of 2"),
    "matrix": (torch.zeros(3, 2, dtype=torch.int32), False, r"shape \(3, 2\)"),
    "floats": (torch.zeros(1, 1, 3, 2), False, "torch.float32"),
    "on a device": (torch.zeros(1, 1, 3, 2, device="meta").int(), False, "is on meta"),
}


@pytest.mark.parametrize(("indices", "causal", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_what_flashmask_says_and_spans_cannot(indices, causal, message):
    with pytest.raises(ValueError, match=message):
        SpanMask.from_flashmask(indices, causal)


def dense_flashmask(bounds: torch.Tensor, causal: bool) -> torch.Tensor:
    """By FlashMask's rule: bounds [L, n] of the rows that do not see each key."""
    row, key = torch.arange(len(bounds))[:, None], torch.arange(len(bounds))
    columns = list(bounds.unbind(1))
    everything, nothing = torch.full_like(columns[0], len(bounds)), torch.zeros_like(columns[0])
    if causal:
        below, above = [*columns, everything][:2], (nothing, key)
    elif len(columns) == 2:
        below, above = (columns[0], everything), (nothing, columns[1])
    else:
        below, above = columns[:2], columns[2:]
    hidden = [(begin <= row) & (row < end) for begin, end in (below, above)]
    return ~(hidden[0] | hidden[1])


@pytest.mark.parametrize(("count", "causal"), [(1, True), (2, True), (2, False), (4, False)])
@given(data=st.data())
@settings(max_examples=150, deadline=None)
def test_flashmask_is_exact_or_refused(count, causal, data):
    """Whatever the numbers, a mask that is not refused is the one they describe."""
    length = data.draw(st.integers(0, 5))
    numbers = st.lists(
        st.sampled_from([0, 0, length, length, *range(length)]),
        min_size=count * length,
        max_size=count * length,
    )
    bounds = torch.tensor(data.draw(numbers), dtype=torch.int64).view(length, count)
    try:
        mask = SpanMask.from_flashmask(bounds[None, None], causal)
    except ValueError:
        return
    assert torch.equal(mask.to_dense(), dense_flashmask(bounds, causal))


@given(bagel_packs())
@settings(max_examples=50, deadline=None)
def test_bagel_parents_are_the_last_span_that_stays_visible(pack):
    mask = SpanMask.from_bagel(*pack)
    for path in paths(list(mask.parents)):
        assert all(pack[1][span] != "noise" for span in path[:-1])


BAD = {
    "completion is no list of spans": (
        lambda: SpanMask.from_groups([([(2, "causal")], [(5, "causal")])]),
        r"a span of a completion of group 0 is 5, expected \(length, mode\)",
    ),
    "no completions": (
        lambda: SpanMask.from_groups([([], []), ([(2, "causal")],)]),
        r"group 1 is .*, expected \(prompt, completions\)",
    ),
    "length without a mode": (
        lambda: SpanMask.from_groups([([2], [])]),
        "a span of the prompt of group 0 is 2",
    ),
    "negative length in a group": (
        lambda: SpanMask.from_groups([([(3, "full")], [[(-1, "full")]])]),
        "span 1 has length -1",
    ),
    "leaf without children": (
        lambda: SpanMask.from_tree([([(1, "full")], [[(1, "full")]])]),
        r"the tree at span 1 is .*, expected \(chain, children\)",
    ),
    "unknown mode in a tree": (
        lambda: SpanMask.from_tree([([(1, "window")], [])]),
        "span 0 has mode 'window'",
    ),
    "documents beyond the buffer": (
        lambda: SpanMask.from_token_types([0, 0, 1], [0, 4]),
        "cu_seqlens goes from 0 to 4, token_types from 0 to 3",
    ),
    "no documents": (
        lambda: SpanMask.from_token_types([0], []),
        "cu_seqlens goes nowhere, token_types from 0 to 1",
    ),
    "documents backwards": (
        lambda: SpanMask.from_token_types([0, 0, 1], [0, 2, 1, 3]),
        "document 1 of cu_seqlens has length -1",
    ),
    "negative type": (
        lambda: SpanMask.from_token_types([0, -1]),
        r"token_types\[1\] is -1",
    ),
    "types on a device": (
        lambda: SpanMask.from_token_types(torch.zeros(3, device="meta").long()),
        "token_types is on meta.*moved with `to`",
    ),
    "types of a batch": (
        lambda: SpanMask.from_token_types(torch.zeros(1, 3).long()),
        r"token_types is torch.int64 of shape \(1, 3\)",
    ),
    "offsets on a device": (
        lambda: SpanMask.from_cu_seqlens(torch.zeros(3, device="meta").long()),
        "cu_seqlens is on meta",
    ),
    "fractional split": (
        lambda: SpanMask.from_bagel([2.0], ["full"], [2]),
        r"split_lens\[0\] is 2.0, expected an integer",
    ),
}


@pytest.mark.parametrize(("build", "message"), BAD.values(), ids=BAD.keys())
def test_bad_input_is_named(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_mask_of_a_rollout_serves_a_backward_pass():
    with torch.inference_mode():
        mask = SpanMask.from_groups([([(3, "causal")], [[(2, "causal")]] * 2)]).pad_to(9).to("cpu")
        selected = SpanMask.from_cu_seqlens([0, 4]).select_queries([1, 3])
    q, k, v = (torch.randn(9, 1, 8, requires_grad=True) for _ in range(3))
    packed_attention(q, k, v, mask).sum().backward()
    packed_attention(q[:2], k[:4], v[:4], selected).sum().backward()
    assert v.grad is not None


FORMS = {
    "list": list,
    "tuple": tuple,
    "int16": functools.partial(torch.tensor, dtype=torch.int16),
    "int32": functools.partial(torch.tensor, dtype=torch.int32),
    "int64": functools.partial(torch.tensor, dtype=torch.int64),
    "numpy": functools.partial(numpy.array, dtype=numpy.int32),
    "list of tensors": lambda values: [torch.tensor(value) for value in values],
}

CALLS = {
    "from_spans": lambda of: SpanMask.from_spans(of([3, 0, 2]), of([-1, 0, 0]), ["causal"] * 3),
    "from_cu_seqlens": lambda of: SpanMask.from_cu_seqlens(of([0, 3, 3, 7])),
    "from_bagel": lambda of: SpanMask.from_bagel(of([3, 2]), ["causal", "full"], of([5]), of([2])),
    "from_token_types": lambda of: SpanMask.from_token_types(of([0, 1, 1, 0]), of([0, 2, 4])),
    "from_groups": lambda of: SpanMask.from_groups(
        [([(of([4])[0], "full")], [[(of([2])[0], "causal")]] * 2)]
    ),
    "from_tree": lambda of: SpanMask.from_tree(
        [([(of([4])[0], "causal")], [([(of([2])[0], "full")], [])])]
    ),
    "select_queries": lambda of: SpanMask.from_cu_seqlens([0, 3, 7]).select_queries(of([1, 5])),
    "select_spans": lambda of: SpanMask.from_cu_seqlens([0, 3, 7]).select_spans(of([1])),
    "freeze": lambda of: SpanMask.from_cu_seqlens([0, 3, 7]).freeze(of([1])),
    "pad_to": lambda of: SpanMask.from_cu_seqlens([0, 3, 7]).pad_to(of([9])[0]),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS.keys())
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS.keys())
def test_integers_come_in_any_form(call, form):
    expected = call(list)
    with torch.inference_mode():
        of_a_rollout = call(form)
    for found in (call(form), of_a_rollout):
        for field in dataclasses.fields(SpanMask):
            value, right = getattr(found, field.name), getattr(expected, field.name)
            if isinstance(value, torch.Tensor):
                assert torch.equal(value, right)
                assert value.dtype == torch.int32
                assert not value.is_inference()
            else:
                assert value == right
                assert type(value) is type(right)
