"""batch_mask says what transformers' own dense mask says, of every function that spans can say."""

from __future__ import annotations

import gc
import itertools
import random
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from lvrpo import SpanMask
from lvrpo.integrations.transformers import attention, evaluated, masks
from lvrpo.integrations.transformers.masks import BatchMask, batch_mask
from lvrpo.integrations.transformers.rules import read

masking = pytest.importorskip(
    "transformers.masking_utils", reason="pip install 'lvrpo[transformers]'"
)

B = 3


def dense(found: BatchMask, queries: int, keys: int) -> Tensor:
    """[B, queries, keys]: what the parts of a BatchMask say together."""
    seen = torch.zeros(B * queries, B * keys, dtype=torch.bool)
    columns = torch.arange(B * keys) if found.keys is None else found.keys
    for mask, rows in ((found.mask, found.queries), *found.padding):
        rows = torch.arange(B * queries) if rows is None else rows
        seen[rows[:, None], columns] = mask.to_dense()
    blocks = seen.view(B, queries, B, keys)
    for one, other in itertools.permutations(range(B), 2):
        assert not blocks[one, :, other].any()
    return torch.stack([blocks[one, :, one] for one in range(B)])


def theirs(queries: int, keys: int, **how: Any) -> Tensor:
    how = {"device": "cpu", **how, "allow_is_causal_skip": False}
    found = masking.sdpa_mask(batch_size=B, q_length=queries, kv_length=keys, **how)
    return found.expand(B, 1, queries, keys)[:, 0]


def runs(rng: random.Random, length: int, longest: int) -> list[int]:
    """The number of a run per token."""
    numbers = itertools.chain.from_iterable(
        [n] * rng.randint(1, longest) for n in itertools.count()
    )
    return list(itertools.islice(numbers, length))


def blocks(rng: random.Random, length: int) -> Tensor:
    """[B, length]: every other run is a block, numbered as Gemma 3's images are."""
    rows = [[n // 2 if n % 2 else -1 for n in runs(rng, length, 5)] for _ in range(B)]
    return torch.tensor(rows)


def padding(rng: random.Random, length: int, kind: str) -> Tensor | None:
    if kind == "none":
        return None
    mask = torch.ones(B, length, dtype=torch.bool)
    for row in mask:
        count = rng.randint(0, length // 2)
        if kind == "left":
            row[:count] = False
        elif kind == "right":
            row[length - count :] = False
        else:
            row[rng.sample(range(length), count)] = False
    return mask


def packed(rng: random.Random, length: int) -> tuple[Tensor, Tensor]:
    """Which document each token is of, and its position there."""
    documents = torch.tensor([runs(rng, length, 6) for _ in range(B)])
    positions = torch.zeros_like(documents)
    for row, of in zip(positions, documents, strict=True):
        for index in range(1, length):
            row[index] = row[index - 1] + 1 if of[index] == of[index - 1] else 0
    return documents, positions


def unknown(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same function, of which nothing can be read."""
    return lambda *indices: function(*indices)


def check(function: Callable[..., Any], queries: int, keys: int, *, spans: bool = True, **how: Any):
    """Read and evaluated, a batch and one index at a time."""
    mask, offset = how.get("attention_mask"), how.get("q_offset", 0) - how.get("kv_offset", 0)
    expected = theirs(queries, keys, mask_function=function, **how)
    is_query = torch.ones(B, queries, dtype=torch.bool)
    if mask is not None:
        first = how.get("kv_offset", 0)
        valid = torch.nn.functional.pad(mask, (0, max(0, first + keys - mask.shape[1])))
        is_query = valid[:, first + offset : first + offset + queries]
    assert read(function) is not None
    # An unknown function of a window is one that spans cannot say.
    for ours in (function,) if read(function).window else (function, unknown(function)):
        for use_vmap in (False, True):
            options = {**how, "mask_function": ours, "use_vmap": use_vmap}
            if ours is function and use_vmap:
                continue
            found = dense(batch_mask(B, queries, keys, **options), queries, keys)
            # What padding sees is what a tower's sees, and of no account in a text.
            if ours is function and not read(function).causal:
                some = expected.any(dim=2)
                assert torch.equal(found[some], expected[some])
            assert torch.equal(found[is_query], expected[is_query])


@pytest.fixture(autouse=True)
def _some_queries_at_a_time(monkeypatch):
    monkeypatch.setattr(evaluated, "PAIRS", 5 * 7)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("kind", ["none", "left", "right", "anywhere"])
def test_causal_padded_with_blocks(kind, seed):
    rng = random.Random(seed)
    length = rng.randint(1, 14)
    mask = padding(rng, length, kind)
    check(masking.causal_mask_function, length, length, attention_mask=mask)
    if kind == "anywhere":
        return  # padding may split a block
    overlay = masking.blockwise_overlay(blocks(rng, length))
    function = masking.or_masks(masking.causal_mask_function, overlay)
    check(function, length, length, attention_mask=mask)


@pytest.mark.parametrize("seed", range(8))
def test_packed_with_blocks(seed):
    rng = random.Random(seed)
    length = rng.randint(1, 14)
    documents, positions = packed(rng, length)
    remapped = masking.remap_positions_for_packed_sequence(masking.causal_mask_function, positions)
    apart = masking.packed_sequence_mask_function(documents)
    check(masking.and_masks(remapped, apart), length, length)
    overlay = masking.blockwise_overlay(blocks(rng, length))
    check(masking.and_masks(masking.or_masks(remapped, overlay), apart), length, length)


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("kind", ["none", "left", "right"])
def test_sliding_windows(kind, seed):
    rng = random.Random(seed)
    length, window = rng.randint(1, 14), rng.randint(1, 8)
    mask, overlay = padding(rng, length, kind), masking.blockwise_overlay(blocks(rng, length))
    causal, near = masking.causal_mask_function, masking.sliding_window_overlay(window)
    check(masking.and_masks(near, causal), length, length, attention_mask=mask)
    # As Gemma 3 has them, and as PaliGemma 2 has them, whose blocks see themselves whole.
    of_gemma = masking.and_masks(masking.or_masks(causal, overlay), near)
    check(of_gemma, length, length, attention_mask=mask)
    whole = masking.or_masks(masking.and_masks(near, causal), overlay)
    if window >= 5:
        check(whole, length, length, attention_mask=mask)
    if kind == "none":
        documents, positions = packed(rng, length)
        remapped = masking.remap_positions_for_packed_sequence(
            masking.sliding_window_causal_mask_function(window), positions
        )
        apart = masking.packed_sequence_mask_function(documents)
        check(masking.and_masks(remapped, apart), length, length)


@pytest.mark.parametrize("seed", range(12))
def test_a_cache_that_keeps_a_window(seed):
    """Its first key is the first that the first query sees."""
    rng = random.Random(seed)
    window, queries, seen = rng.randint(2, 6), rng.randint(1, 3), rng.randint(0, 12)
    kv_offset = max(0, seen - window + 1)
    how = {"q_offset": seen, "kv_offset": kv_offset}
    how["attention_mask"] = padding(rng, seen + queries, rng.choice(["none", "left"]))
    function = masking.sliding_window_causal_mask_function(window)
    check(function, queries, seen + queries - kv_offset, **how)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("kind", ["none", "left", "right", "anywhere"])
def test_towers_and_what_their_padding_sees(kind, seed):
    rng = random.Random(seed)
    length = rng.randint(1, 14)
    mask = padding(rng, length, kind)
    function = masking.bidirectional_mask_function
    expected = theirs(length, length, mask_function=function, attention_mask=mask)
    found = batch_mask(B, length, length, mask_function=function, attention_mask=mask)
    assert not found.of_text
    assert torch.equal(dense(found, length, length), expected)


@pytest.mark.parametrize("seed", range(12))
def test_fewer_queries_than_keys(seed):
    """A cache: of all tokens, or of the newest, or longer than what is there."""
    rng = random.Random(seed)
    keys = rng.randint(2, 14)
    queries = rng.randint(1, keys)
    kv_offset = rng.choice([0, 3])
    unused = rng.randint(0, keys - queries)
    q_offset = kv_offset + keys - queries - unused
    mask = padding(rng, kv_offset + keys - unused, rng.choice(["none", "left"]))
    how = {"q_offset": q_offset, "kv_offset": kv_offset, "attention_mask": mask}
    check(masking.causal_mask_function, queries, keys, **how)
    overlay = masking.blockwise_overlay(blocks(rng, kv_offset + keys))
    if q_offset == kv_offset or queries == 1:
        check(masking.or_masks(masking.causal_mask_function, overlay), queries, keys, **how)


def test_a_cache_may_say_where_it_is_with_a_tensor():
    how = {"mask_function": masking.causal_mask_function}
    found = batch_mask(B, 2, 6, torch.tensor(3), **how)
    assert torch.equal(found.mask.to_dense(), batch_mask(B, 2, 6, 3, **how).mask.to_dense())


def test_what_would_have_to_be_guessed_is_not_read():
    causal, near = masking.causal_mask_function, masking.sliding_window_overlay(2)
    image, other = (masking.blockwise_overlay(torch.tensor([[0, 0, 1]])) for _ in range(2))
    combined = [
        masking.and_masks(masking.sliding_window_causal_mask_function(5), near),
        masking.and_masks(causal, image),
        masking.and_masks(causal, unknown(causal)),
        masking.or_masks(causal, image, other),
        masking.or_masks(masking.or_masks(causal, image), other),
        masking.or_masks(causal, near),
        masking.or_masks(image, causal),
        masking.or_masks(causal, unknown(causal)),
    ]
    assert [read(function) for function in combined] == [None] * len(combined)


@pytest.mark.parametrize("chunk", [1, 3, 5])
def test_what_is_not_known_is_evaluated(chunk):
    """Llama 4's chunks are documents, which nobody has to know."""
    left = torch.tensor([0, 2, 5])
    function = masking.chunked_causal_mask_function(chunk, left)
    mask = torch.arange(11) >= left[:, None]
    assert read(function) is None
    expected = theirs(11, 11, mask_function=function, attention_mask=mask)
    found = batch_mask(B, 11, 11, mask_function=function, attention_mask=mask)
    assert torch.equal(dense(found, 11, 11)[mask], expected[mask])


def test_masks_are_laid_out_on_the_host_whatever_the_default_device_is():
    mask = torch.arange(5) >= torch.tensor([[0], [2], [3]])
    with torch.device("meta"):
        found = batch_mask(B, 5, 5, mask_function=masking.causal_mask_function, attention_mask=mask)
    assert torch.equal(
        dense(found, 5, 5)[mask], (mask[:, None] & torch.ones(5, 5).tril().bool())[mask]
    )


def one(function: Callable[..., Any], queries: int = 9, keys: int = 9, **how: Any) -> BatchMask:
    return batch_mask(1, queries, keys, mask_function=function, **how)


def test_what_spans_cannot_say_is_refused_by_name():
    causal, full = masking.causal_mask_function, masking.bidirectional_mask_function
    with pytest.raises(ValueError, match="cross-attention"):
        one(full, 4, 9)
    with pytest.raises(ValueError, match="cross-attention"):
        one(causal, 9, 4)
    near = masking.sliding_window_causal_mask_function(4)
    hole = torch.arange(9)[None] != 3
    with pytest.raises(ValueError, match="longer than the window of 4 has padding between"):
        one(near, attention_mask=hole)
    assert one(near, 4, 4, attention_mask=hole[:, 1:5]).window == 4  # and no sequence is longer
    image = masking.blockwise_overlay(torch.tensor([[-1, 0, 0, 0, 0, 0, -1, -1, -1]]))
    with pytest.raises(ValueError, match="block of 5 tokens sees itself beyond the window of 4"):
        one(masking.or_masks(near, image))
    apart = masking.blockwise_overlay(torch.tensor([[0, 0, -1, -1, 0, 0, -1, -1, -1]]))
    with pytest.raises(ValueError, match="block 0 of sequence 0 is interrupted"):
        one(masking.or_masks(causal, apart))
    documents = masking.packed_sequence_mask_function(torch.tensor([[0, 0, 1, 1, 1, 0, 0, 2, 2]]))
    with pytest.raises(ValueError, match="document 0 of sequence 0 is interrupted"):
        one(masking.and_masks(causal, documents))
    with pytest.raises(ValueError, match="overlap"):
        one(masking.sliding_window_bidirectional_mask_function(2))
    with pytest.raises(ValueError, match="key 0 of sequence 0 is not seen by its own row"):
        one(lambda b, h, q, k: k < q)
    with pytest.raises(ValueError, match="key 0 of sequence 0 is seen by rows with others between"):
        one(lambda b, h, q, k: (k == q) | ((q - k) % 2 == 0) & (k < q))
    with pytest.raises(ValueError, match="key 0 of sequence 0 is not seen by the first queries"):
        one(lambda b, h, q, k: (k <= q) & (k + 7 != q), 2, 9, q_offset=7)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"attention_mask": torch.ones(1, 1, 4, 4)}, "Tensor of pairs"),
        ({"dropout": 0.1}, "dropout is 0.1"),
        ({"position_bias": torch.zeros(1)}, "Linear has position_bias"),
    ],
)
def test_what_a_layer_cannot_have_is_refused(options, match):
    q = torch.randn(1, 2, 4, 8)
    options = {"attention_mask": None, **options}
    with pytest.raises(ValueError, match=match):
        attention.attention(torch.nn.Linear(1, 1), q, q, q, **options)


def test_a_mask_is_refused_where_a_layer_has_it():
    """Models make masks that none of their layers has, as Qwen2-MoE of a window of 0."""
    q = torch.randn(1, 2, 4, 8)
    refused = masks.mask_of_layers(
        1, 4, 4, mask_function=masking.sliding_window_causal_mask_function(0)
    )
    with pytest.raises(ValueError, match="window is 0"):
        attention.attention(torch.nn.Linear(1, 1), q, q, q, refused)
    apart = masking.blockwise_overlay(torch.tensor([[0, -1, 0, -1]]))
    function = masking.or_masks(masking.causal_mask_function, apart)
    refused = masks.mask_of_layers(1, 4, 4, mask_function=function)
    mask = SpanMask.from_cu_seqlens([0, 4])
    out, _ = attention.attention(torch.nn.Linear(1, 1), q, q, q, refused, span_mask=mask)
    assert out.shape == (1, 4, 2, 8)
    unread = masks.mask_of_layers(1, 4, 4, mask_function=lambda b, h, q, k: k <= q)
    with pytest.raises(ValueError, match="masks that no span_mask can take the place of"):
        attention.attention(torch.nn.Linear(1, 1), q, q, q, unread, span_mask=mask)


@pytest.mark.parametrize("window", [2, 100])
def test_a_window_is_made_once_and_goes_with_its_mask(window):
    mask = SpanMask.from_groups([([(4, "causal")], [[(3, "causal")], [(2, "causal")]])])
    windowed = attention._with_window(mask, window)
    assert torch.equal(windowed.to_dense(), mask.with_window(window).to_dense())
    assert attention._with_window(mask, window) is windowed
    gone = weakref.ref(mask)
    del mask, windowed
    gc.collect()
    assert gone() is None


def test_a_span_mask_of_another_length_is_refused():
    q = torch.randn(1, 2, 4, 8)
    mask = SpanMask.from_cu_seqlens([0, 3])
    with pytest.raises(ValueError, match="4 rows"):
        attention.attention(torch.nn.Linear(1, 1), q, q, q, None, span_mask=mask)
