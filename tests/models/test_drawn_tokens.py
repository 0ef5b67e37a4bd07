"""Tokens are drawn from the distribution that the options ask for: its properties, enumerated.

The same against transformers' own processors: tests/integrations/test_transformers_sampling.py.
"""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lvrpo.models.sampling import (
    Sampling,
    draw_tokens,
    penalize_repetition,
    process_logits,
    truncate_logits,
)
from lvrpo.testing import check_against_plain

V = 23


def random_logits(seed, rows=5, ties=False):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, V, generator=generator, dtype=torch.float64) * 3
    return logits.round() if ties else logits


def sampling(**options):
    return Sampling(max_tokens=8, **options)


def kept(logits, **options):
    return truncate_logits(logits, sampling(**options)) > -math.inf


def draw(logits, uniform, how, **options):
    return draw_tokens(logits, uniform, how, vocab_range=(0, logits.shape[1]), **options)


seeds = st.integers(0, 10**6)
options = st.fixed_dictionaries(
    {
        "temperature": st.sampled_from([0.3, 1.0, 2.5]),
        "top_k": st.sampled_from([0, 1, 2, 7, V, 99]),
        "top_p": st.sampled_from([0.05, 0.5, 0.9, 1.0]),
        "min_p": st.sampled_from([0.0, 0.03, 0.4, 1.0]),
        "repetition_penalty": st.sampled_from([0.7, 1.0, 1.8]),
    }
)


@given(seed=seeds, ties=st.booleans(), low=st.integers(0, 30), more=st.integers(0, 30))
def test_what_is_kept_is_nested(seed, ties, low, more):
    logits = random_logits(seed, ties=ties)
    for name, small, large in (
        ("top_k", 1 + low, 1 + low + more),
        ("top_p", (1 + low) / 61, (1 + low + more) / 61),
        ("min_p", (low + more) / 60, low / 60),
    ):
        few, many = kept(logits, **{name: small}), kept(logits, **{name: large})
        assert few.any(dim=1).all()
        assert not (few & ~many).any()


@given(seed=seeds, top_p=st.floats(0.01, 0.99))
def test_top_p_keeps_no_token_too_many(seed, top_p):
    """The probability of what is kept reaches it, and without the last one does not."""
    logits = random_logits(seed, ties=True)
    mask, probs = kept(logits, top_p=top_p), logits.softmax(dim=-1)
    mass = (probs * mask).sum(dim=1)
    least = probs.where(mask, math.inf).amin(dim=1)
    assert (mass >= top_p - 1e-12).all()
    assert (mass - least < top_p + 1e-12).all()
    # Of equally likely ones the first are kept.
    for row in range(len(logits)):
        equal = (probs[row] == least[row]).nonzero().flatten()
        chosen = mask[row, equal].int()
        assert (chosen.diff() <= 0).all()


@given(seed=seeds, k=st.integers(1, V))
def test_top_k_keeps_what_is_as_likely_as_the_last(seed, k):
    logits = random_logits(seed, ties=True)
    mask = kept(logits, top_k=k)
    for row in range(len(logits)):
        last = logits[row].sort(descending=True).values[k - 1]
        assert mask[row].tolist() == (logits[row] >= last).tolist()


@given(seed=seeds, ties=st.booleans())
def test_options_that_keep_everything_change_no_bit(seed, ties):
    logits, uniform = random_logits(seed, ties=ties), torch.rand(5)
    assert truncate_logits(logits, sampling(top_k=V, top_p=1.0, min_p=0.0)) is logits
    plain = draw(logits, uniform, sampling())
    assert plain.sampled_from is None
    all_of_them = {"top_k": V + 3, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0}
    found = draw(logits, uniform, sampling(**all_of_them))
    assert torch.equal(found.ids, plain.ids)
    if found.sampled_from is not None:
        assert not found.sampled_from.differs.any()


@given(seed=seeds, chosen=options)
def test_what_was_sampled_from_is_told(seed, chosen):
    logits, ids = random_logits(seed), torch.randint(V, (5, 4))
    how = sampling(**chosen)
    uniform = torch.rand(5)
    drawn = draw(logits, uniform, how, prompts=ids[:, :1], generated=ids[:, 1:])
    if not how.changes:
        assert drawn.sampled_from is None
        return
    scaled = logits / how.temperature
    changed = process_logits(logits, how, ids[:, :1], ids[:, 1:], None) / how.temperature
    cut = truncate_logits(changed, how)
    logprobs = cut.log_softmax(dim=-1).gather(1, drawn.ids[:, None])[:, 0]
    found = drawn.sampled_from
    assert torch.equal(found.logprobs, logprobs)
    mass = scaled.softmax(dim=-1).where(cut > -math.inf, 0).sum(dim=1)
    check_against_plain(found.kept_mass, mass, mass, scale=1.0)
    distance = (cut.softmax(dim=-1) - scaled.softmax(dim=-1)).abs().amax(dim=1)
    assert torch.equal(found.differs, (cut != scaled).any(dim=1))
    assert not (distance[~found.differs] > 0).any()


@pytest.mark.parametrize(
    "chosen",
    [{}, {"top_k": 3}, {"top_p": 0.7}, {"min_p": 0.1}, {"repetition_penalty": 2.0}],
    ids=str,
)
@pytest.mark.parametrize("temperature", [0.5, 1.0])
def test_frequencies_are_probabilities(chosen, temperature):
    """Of a small distribution, enumerated: an even grid of numbers meets each share to one step."""
    logits = torch.tensor([[1.0, -2.0, 0.5, 1.0, -0.5, 3.0]])
    seen = torch.tensor([[5, 1]])
    how = sampling(temperature=temperature, **chosen)
    count = 4096
    uniform = torch.arange(count) / count
    drawn = draw(
        logits.expand(count, -1),
        uniform,
        how,
        prompts=seen.expand(count, -1),
        generated=seen[:, :0].expand(count, 0),
    )
    values = logits[0].double().tolist()
    if "repetition_penalty" in chosen:
        values[5], values[1] = values[5] / 2, values[1] * 2
    weights = [math.exp(value / temperature) for value in values]
    ranked = sorted(range(6), key=lambda i: -weights[i])
    allowed = set(range(6))
    if "top_k" in chosen:
        allowed = {i for i in allowed if weights[i] >= weights[ranked[2]]}
    if "top_p" in chosen:
        reached, allowed = 0.0, set()
        for i in ranked:
            if reached < 0.7 * sum(weights):
                allowed.add(i)
            reached += weights[i]
    if "min_p" in chosen:
        allowed = {i for i in allowed if weights[i] >= 0.1 * max(weights)}
    total = sum(weights[i] for i in allowed)
    counts = drawn.ids.bincount(minlength=6).tolist()
    for i in range(6):
        expected = count * weights[i] / total if i in allowed else 0
        assert abs(counts[i] - expected) <= (1 if i in allowed else 0)


@given(seed=seeds, chosen=options)
def test_a_token_that_is_left_out_is_never_drawn(seed, chosen):
    """Not for the numbers at either end, which rounding can put beside every share."""
    logits = random_logits(seed)
    how = sampling(**chosen | {"repetition_penalty": 1.0})
    allowed = truncate_logits(logits / how.temperature, how) > -math.inf
    for number in (0.0, 1 - 2**-24, 1 - 2**-53):
        uniform = torch.full((5,), number, dtype=torch.float64)
        ids = draw(logits, uniform, how).ids
        assert allowed.gather(1, ids[:, None]).all()


@given(seed=seeds, chosen=options)
def test_a_draw_depends_on_its_own_row_and_number(seed, chosen):
    logits, uniform, ids = random_logits(seed), torch.rand(5), torch.randint(V, (5, 4))
    how = sampling(**chosen)
    order = torch.tensor([3, 1, 4])
    key = {"prompts": ids[:, :2], "generated": ids[:, 2:]}
    together = draw(logits, uniform, how, **key)
    some = draw(logits[order], uniform[order], how, **{name: x[order] for name, x in key.items()})
    assert torch.equal(together.ids[order], some.ids)


@given(seed=seeds, low=st.integers(0, 10), width=st.integers(1, 12), chosen=options)
def test_tokens_outside_the_range_do_not_count(seed, low, width, chosen):
    logits, uniform = random_logits(seed), torch.rand(5)
    how = sampling(**chosen | {"repetition_penalty": 1.0})
    inside = logits[:, low : low + width]
    expected = draw(inside, uniform, how)
    found = draw_tokens(logits, uniform, how, vocab_range=(low, low + width))
    assert torch.equal(found.ids, expected.ids + low)


@given(seed=seeds, chosen=options, ties=st.booleans())
def test_greedy_is_the_first_of_the_likeliest(seed, chosen, ties):
    logits = random_logits(seed, ties=ties)
    greedy = sampling(**chosen | {"temperature": 0.0, "repetition_penalty": 1.0})
    drawn = draw(logits, torch.rand(5), greedy)
    assert drawn.ids.tolist() == [row.index(max(row)) for row in logits.tolist()]
    assert drawn.sampled_from is None
    assert greedy.changes == ()


def test_a_logit_processor_sees_the_answer_and_changes_what_is_drawn():
    asked = []

    def no_even_tokens(ids, logits):
        asked.append((ids, logits))
        return logits.index_fill(1, torch.arange(0, V, 2), -math.inf)

    logits, ids = random_logits(0), torch.randint(V, (5, 3))
    how = sampling(logit_processors=(no_even_tokens, lambda _, logits: logits * 2))
    drawn = draw(logits, torch.rand(5), how, generated=ids)
    assert torch.equal(asked[0][0], ids)
    assert torch.equal(asked[0][1], logits)
    assert (drawn.ids % 2 == 1).all()
    assert drawn.sampled_from.differs.all()
    wrong = sampling(logit_processors=(lambda _, logits: logits[0],))
    with pytest.raises(ValueError, match=r"returned logits \[23\], expected \[5, 23\]"):
        draw(logits, torch.rand(5), wrong, generated=ids)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_broken_logits_and_impossible_draws_are_told_apart(temperature):
    logits = random_logits(0)
    nothing = sampling(
        temperature=temperature, logit_processors=(lambda _, x: torch.full_like(x, -math.inf),)
    )
    drawn = draw(logits, torch.rand(5), nothing, generated=torch.zeros(5, 0, dtype=torch.int64))
    assert drawn.are_finite
    assert not drawn.are_possible
    for value in (math.nan, math.inf):
        broken = logits.clone()
        broken[1, 2] = value
        for chosen in ({}, {"top_k": 3}, {"top_p": 0.5}, {"min_p": 0.1}):
            how = sampling(temperature=temperature, **chosen)
            assert not draw(broken, torch.rand(5), how).are_finite


def test_a_token_that_stands_twice_is_penalized_once():
    logits = torch.tensor([[2.0, -2.0, 1.0]])
    once = penalize_repetition(logits, torch.tensor([[0, 1]]), 2.0)
    twice = penalize_repetition(logits, torch.tensor([[1, 0, 0, 1, 1]]), 2.0)
    assert once.tolist() == twice.tolist() == [[1.0, -4.0, 1.0]]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"max_tokens": 0}, "max_tokens is 0, expected at least 1"),
        ({"min_tokens": 9}, "min_tokens is 9, expected 0 to max_tokens = 8"),
        ({"min_tokens": -1}, "min_tokens is -1"),
        ({"temperature": -0.1}, "temperature is -0.1"),
        ({"temperature": math.nan}, "temperature is nan"),
        ({"temperature": math.inf}, "temperature is inf"),
        ({"top_k": -1}, "top_k is -1, expected 0 for all"),
        ({"top_p": 0.0}, r"top_p is 0.0, expected a number in \(0, 1\]"),
        ({"top_p": 1.1}, "top_p is 1.1"),
        ({"min_p": 1.5}, r"min_p is 1.5, expected a number in \[0, 1\]"),
        ({"repetition_penalty": 0.0}, "repetition_penalty is 0.0, expected a finite number above"),
        ({"stop": "word"}, "stop is 'word', expected a tuple of strings"),
        ({"stop": ("",)}, "stop is"),
        ({"stop_token_ids": 3}, "stop_token_ids is 3, expected a tuple of token ids"),
        ({"logit_processors": (3,)}, "logit_processors is"),
    ],
    ids=str,
)
def test_wrong_options_are_named(wrong, message):
    with pytest.raises(ValueError, match=f"^Sampling: {message}"):
        Sampling(**{"max_tokens": 8} | wrong)
