"""Groups become packs: whole, in order, within their budget, and nothing is lost on the way."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from trainer.small_policy import prompts, small_policy

from lvrpo.data.example import Example
from lvrpo.models.packs import Pack, pack_groups
from lvrpo.models.unified.layout import PackBuilder

POLICY = small_policy()
QUESTIONS, DRAWINGS = prompts("understand", 4), prompts("generate", 4)
TOKENS, WIDTH = POLICY.latent_shape
LENGTHS = st.lists(st.integers(1, 9), min_size=1, max_size=6)


def prompt_rows(example: Example) -> int:
    words = 1 + len(example.prompt.split()) + (example.task == "generate")
    if example.image is None:
        return words
    patch = POLICY.module.config.image_patch
    return words + 2 + example.image[0].size // patch**2


def text_groups(lengths: list[list[int]]) -> list[tuple[Example, list[list[int]]]]:
    """Groups of completions of these lengths; all tokens different."""
    groups, first = [], 0
    for example, group in zip(QUESTIONS, lengths, strict=False):
        ends = [first + sum(group[: i + 1]) for i in range(len(group))]
        groups.append((example, [[*range(e - n, e)] for e, n in zip(ends, group, strict=True)]))
        first = ends[-1]
    return groups


def packs_of(
    lengths: list[list[int]], counts: list[int], max_rows: int = 1 << 20, **options: bool
) -> list[Pack]:
    total = sum(counts)
    latents = torch.arange(total * TOKENS * WIDTH).float().view(total, TOKENS, WIDTH)
    return list(
        pack_groups(
            POLICY,
            text_groups(lengths),
            list(zip(DRAWINGS, counts, strict=False)),
            latents,
            torch.arange(total) / max(total, 1),
            max_rows,
            **options,
        )
    )


def assert_complete(packs: list[Pack], lengths: list[list[int]], counts: list[int]) -> None:
    """Every completion, token and picture is in one pack, and in order."""
    flat, total = [n for group in lengths for n in group], sum(counts)
    for name, count in (("completions", len(flat)), ("tokens", sum(flat)), ("pictures", total)):
        slices = [getattr(pack, name) for pack in packs]
        assert [part.start for part in slices] == [0, *(part.stop for part in slices)][:-1]
        assert slices[-1].stop == count
    assert torch.cat([pack.token_ids for pack in packs]).tolist() == [*range(sum(flat))]
    assert torch.cat([pack.cu_seqlens.diff() for pack in packs]).tolist() == flat
    latents = torch.cat([pack.batch.latents for pack in packs])
    assert torch.equal(latents.flatten(), torch.arange(latents.numel()).float())
    times = torch.cat([pack.batch.timesteps for pack in packs])
    assert torch.equal(times, (torch.arange(total) / max(total, 1)).repeat_interleave(TOKENS))


def rows_of_groups(lengths: list[list[int]], counts: list[int]) -> list[int]:
    texts = [
        prompt_rows(example) + sum(group) - len(group)
        for example, group in zip(QUESTIONS, lengths, strict=False)
    ]
    return texts + [
        prompt_rows(example) + TOKENS * count
        for example, count in zip(DRAWINGS, counts, strict=False)
    ]


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(LENGTHS, min_size=1, max_size=4),
    counts=st.lists(st.integers(1, 5), max_size=4),
    max_rows=st.integers(1, 120),
    share=st.booleans(),
)
def test_packs_keep_their_budget_and_lose_nothing(lengths, counts, max_rows, share):
    packs = packs_of(lengths, counts, max_rows, share_prompts=share)
    assert_complete(packs, lengths, counts)
    for pack in packs:
        completions = len(pack.cu_seqlens) - 1 + len(pack.batch.latents) // TOKENS
        assert pack.batch.rows <= max_rows or completions == 1
        documents = len(pack.batch.mask.documents) - 1
        assert documents == completions if not share else documents <= completions
    for pack, following in pairwise(packs):
        # Nothing is closed that had room for all that follows in the next one.
        assert pack.batch.rows + following.batch.rows > max_rows
    groups = rows_of_groups(lengths, counts)
    laid_out = sum(len(pack.batch.mask.documents) - 1 for pack in packs)
    if share and max(groups) <= max_rows:
        assert laid_out == len(groups)  # every prompt once


def test_a_group_that_would_overflow_starts_the_next_pack():
    lengths, counts = [[5, 3], [4], [6, 6, 6]], [2, 3]
    groups = rows_of_groups(lengths, counts)
    assert [pack.batch.rows for pack in packs_of(lengths, counts)] == [sum(groups)]
    two, *others = packs_of(lengths, counts, sum(groups[:2]))
    assert two.batch.rows == groups[0] + groups[1]
    one, *_ = packs_of(lengths, counts, sum(groups[:2]) - 1)
    assert one.batch.rows == groups[0]
    assert sum(pack.batch.rows for pack in others) == sum(groups[2:])


def test_a_group_larger_than_a_pack_is_divided():
    (example,), lengths = QUESTIONS[:1], [6, 6, 6, 6, 6]
    prompt = prompt_rows(example)
    packs = packs_of([lengths], [], prompt + 2 * 5)
    assert [len(pack.cu_seqlens) - 1 for pack in packs] == [2, 2, 1]
    assert [pack.batch.rows for pack in packs] == [prompt + 10, prompt + 10, prompt + 5]
    whole, first = packs_of([lengths], [])[0], packs[0]
    assert torch.equal(first.batch.position_ids, whole.batch.position_ids[: prompt + 10])
    # A pack too small for any of them holds one at a time.
    assert [len(pack.cu_seqlens) - 1 for pack in packs_of([lengths], [], 1)] == [1] * 5


def test_the_last_part_of_a_group_shares_its_pack_with_the_next():
    prompt = prompt_rows(QUESTIONS[0])
    _, second = packs_of([[40, 40, 2], [2, 2]], [], prompt + 2 * 39)
    assert second.completions == slice(2, 5)


def test_a_row_that_predicts_several_tokens_is_a_predictor_once():
    (pack,) = packs_of([[3, 1, 2]], [])
    assert pack.row_index.tolist() == [0, 1, 2, 0, 0, 3]
    assert len(pack.predictors) == 4
    text_of_prompt = prompt_rows(QUESTIONS[0]) - len(pack.batch.patches)
    assert pack.predictors.tolist() == [text_of_prompt - 1 + i for i in range(4)]


def test_no_groups_make_no_packs():
    assert packs_of([], []) == []


def test_a_pack_moves_as_a_whole():
    (pack,) = packs_of([[3, 1]], [2])
    moved = pack.to("meta")
    tensors = {**vars(moved.batch.mask), **vars(moved.batch), **vars(moved)}
    assert all(x.is_meta for x in tensors.values() if isinstance(x, torch.Tensor))
    for name in ("completions", "tokens", "pictures"):
        assert getattr(moved, name) == getattr(pack, name)


LATENTS, TIMES = torch.zeros(2, TOKENS, WIDTH), torch.zeros(2)
BAD = {
    "no completions": ({"texts": [(QUESTIONS[0], [])]}, r"texts\[0\] \(.*\) has no completions"),
    "a completion without tokens": (
        {"texts": [(QUESTIONS[0], [[1]]), (QUESTIONS[1], [[1], []])]},
        r"completion 1 of texts\[1\] \(.*\) has no tokens",
    ),
    "no pictures": (
        {"pictures": [(DRAWINGS[0], 2), (DRAWINGS[1], 0)]},
        r"pictures\[1\] \(.*\) has 0 pictures, expected at least 1",
    ),
    "pictures without latents": (
        {"pictures": [(DRAWINGS[0], 2)], "latents": None},
        r"latents has shape None, expected \(2, 4, 3\)",
    ),
    "latents of fewer pictures": (
        {"pictures": [(DRAWINGS[0], 3)]},
        r"latents has shape \(2, 4, 3\), expected \(3, 4, 3\)",
    ),
    "latents without pictures": ({}, r"latents has shape \(2, 4, 3\), expected \(0, 4, 3\)"),
    "a time too few": (
        {"pictures": [(DRAWINGS[0], 2)], "timesteps": TIMES[:1]},
        r"timesteps has shape \(1,\), expected \(2,\)",
    ),
    "no room": ({"max_rows": 0}, "max_rows is 0, expected at least 1"),
}


@pytest.mark.parametrize(("changes", "message"), BAD.values(), ids=BAD.keys())
def test_bad_groups_are_named(changes, message):
    arguments = {"texts": [], "latents": LATENTS, "timesteps": TIMES} | changes
    with pytest.raises(ValueError, match=f"^pack_groups: {message}"):
        next(pack_groups(POLICY, **arguments))


def unbuilt(add: Callable[[PackBuilder], object]) -> Callable[[], object]:
    def build() -> object:
        builder = POLICY.builder()
        builder.text([1, 2])
        add(builder)
        return builder.build(torch.zeros(4, WIDTH), torch.zeros(4))

    return build


BAD_SPANS = {
    "nothing": (lambda: POLICY.builder().build(), "buffer without rows"),
    "a noisy picture without tokens": (
        unbuilt(lambda b: b.noise(0, 2, 0)),
        "picture of 0 x 2 patches has none",
    ),
    "a picture without pixels": (
        unbuilt(lambda b: b.picture(np.zeros((1, 0, 16), np.float32), 1, 2)),
        "picture of 0 x 2 patches has none",
    ),
    "a picture without channels": (
        unbuilt(lambda b: b.picture(np.zeros((16, 16), np.float32), 1, 2)),
        r"a picture is \[16, 16\], expected 1 channels",
    ),
    "latents of other rows": (
        unbuilt(lambda b: b.noise(2, 3, 0)),
        r"latents of a packed buffer have shape \(4, 3\), expected \(6, 3\)",
    ),
    "one time for all": (
        lambda: noisy().build(torch.zeros(4, WIDTH), torch.zeros(1)),
        r"timesteps of a packed buffer have shape \(1,\), expected \(4,\)",
    ),
    "text after noise": (
        lambda: noisy().text([1], 1),
        "span 1 is a noisy picture, which nothing can follow",
    ),
    "text after appended noise": (
        lambda: twice_noisy().text([1], 3),
        "span 3 is a noisy picture, which nothing can follow",
    ),
}


def noisy() -> PackBuilder:
    builder = POLICY.builder()
    builder.noise(2, 2, builder.text([1, 2]))
    return builder


def twice_noisy() -> PackBuilder:
    builder = noisy()
    builder.append(noisy())
    return builder


@pytest.mark.parametrize(("build", "message"), BAD_SPANS.values(), ids=BAD_SPANS.keys())
def test_bad_spans_are_named(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_appended_spans_are_those_that_were_added():
    one, parts = POLICY.builder(), POLICY.builder()
    for example in QUESTIONS[:2]:
        prompt = POLICY.add_prompt(one, example)
        assert parts.append(layout_of(example)) == prompt
        for builder in (one, parts):
            builder.noise(2, 2, builder.text([5, 6], prompt))
    batches = [builder.build() for builder in (one, parts)]
    for name, value in vars(batches[0]).items():
        other = getattr(batches[1], name)
        if name == "mask":
            value, other = value.to_dense(), other.to_dense()
        assert torch.equal(value, other), name


def layout_of(example: Example) -> PackBuilder:
    builder = POLICY.builder()
    POLICY.add_prompt(builder, example)
    return builder
