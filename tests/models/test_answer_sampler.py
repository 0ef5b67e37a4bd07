"""What ends an answer, and what is kept of it: a scripted model against a plain loop per answer."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from trainer.small_policy import SAMPLING, prompts, small_policy

from lvrpo import random
from lvrpo.data.example import Example
from lvrpo.models.answer_sampler import AnswerSampler
from lvrpo.models.protocol import sample_streams
from lvrpo.models.sampling import Sampling, process_logits, truncate_logits

LETTERS = "_abcdefg hi"  # a token each; "_" ends an answer
END = 0
V = len(LETTERS)


def decode(ids):
    assert END not in ids
    return "".join(LETTERS[token] for token in ids)


def example(uid):
    picture = np.zeros((1, 1, 1), np.float32)
    return Example("understand", uid, "?", image=picture, answer="")


def sampler_of(sampling, uids=("one",), group_size=1, seed=0):
    return AnswerSampler(
        [example(uid) for uid in uids],
        group_size,
        sampling,
        prompt_ids=[[1 + n, 2] for n, _ in enumerate(uids)],
        vocab_range=(0, V),
        end_ids=[END],
        decode=decode,
        device=torch.device("cpu"),
        seed=seed,
        step=3,
        backend="torch",
    )


def spoken(text, **options):
    """The answer of a model that says `text` and then goes on with "h"."""
    sampler = sampler_of(Sampling(**{"max_tokens": 9} | options))
    while len(sampler.active):
        letter = (text + "h" * 99)[sampler.position]
        logits = torch.full((1, V), -80.0)
        logits[0, LETTERS.index(letter)] = 0
        sampler.draw(logits, torch.zeros(1, dtype=torch.int64))
    found = sampler.answers()
    return found.texts[0], "".join(LETTERS[i] for i in found.token_ids[0]), found.finish_reasons[0]


@pytest.mark.parametrize(
    ("text", "options", "answer", "tokens", "reason"),
    [
        ("abc_", {}, "abc", "abc_", "end"),
        ("_", {}, "", "_", "end"),
        ("abcdefgab", {}, "abcdefgab", "abcdefgab", "length"),
        ("abcde_", {"stop": ("cd",)}, "ab", "abcd", "stop"),
        ("abcde_", {"stop": ("xyz", "d", "cd")}, "ab", "abcd", "stop"),
        ("abcde_", {"stop": ("abcdef",)}, "abcde", "abcde_", "end"),
        ("ab cd_", {"stop": (" ",)}, "ab", "ab ", "stop"),
        ("abcdefgab", {"stop": ("gab",)}, "abcdef", "abcdefgab", "stop"),
        ("abcde_", {"stop_token_ids": (LETTERS.index("c"),)}, "ab", "abc", "stop"),
        ("abac_", {"stop": ("a",), "min_tokens": 1}, "ab", "aba", "stop"),
        ("abac_", {"stop": ("ab",), "min_tokens": 1}, "", "ab", "stop"),
        ("abac_", {"stop": ("ab",), "min_tokens": 2}, "abac", "abac_", "end"),
    ],
)
def test_what_ends_an_answer(text, options, answer, tokens, reason):
    assert spoken(text, **options) == (answer, tokens, reason)
    assert spoken(text, **options, temperature=0.0) == (answer, tokens, reason)


letters = st.text(alphabet=LETTERS[1:], max_size=20)
stops = st.lists(st.text(alphabet=LETTERS[1:], min_size=1, max_size=3), max_size=3).map(tuple)


@given(text=letters, stop=stops, min_tokens=st.integers(0, 6))
def test_a_text_is_cut_before_the_first_stop_string(text, stop, min_tokens):
    """Against the whole text: one letter is one token, so places of text and tokens are equal."""
    whole = (text + "h" * 30)[:12]
    ends = [
        at + len(each)
        for each in stop
        for at in range(12)
        if whole.startswith(each, at) and at + len(each) > min_tokens
    ]
    found, tokens, reason = spoken(text, max_tokens=12, stop=stop, min_tokens=min_tokens)
    if not ends:
        assert (found, tokens, reason) == (whole, whole, "length")
        return
    assert reason == "stop"
    assert tokens == whole[: min(ends)]
    starts = [min(ends) - len(each) for each in stop if tokens.endswith(each)]
    assert found == whole[: min(starts)]


def random_logits(seed, row):
    generator = torch.Generator().manual_seed(hash((seed, row)) % 2**31)
    return torch.randn(V, generator=generator, dtype=torch.float64) * 2


def logits_after(seed, prompt, ids):
    """A model whose logits depend on the prompt and on the whole answer."""
    return random_logits(seed, (prompt, *ids))


CHOSEN = st.fixed_dictionaries(
    {
        "temperature": st.sampled_from([0.0, 0.8, 1.5]),
        "top_k": st.sampled_from([0, 3]),
        "top_p": st.sampled_from([0.7, 1.0]),
        "repetition_penalty": st.sampled_from([1.0, 1.7]),
        "min_tokens": st.sampled_from([0, 2]),
        "stop_token_ids": st.sampled_from([(), (4,)]),
        "logit_processors": st.sampled_from([(), (lambda ids, x: x + ids.shape[1] * x.sin(),)]),
    }
)


@given(seed=st.integers(0, 10**6), chosen=CHOSEN)
def test_a_batch_is_its_answers_one_by_one(seed, chosen):
    sampling, uids, group = Sampling(max_tokens=5, **chosen), ("x", "y", "x"), 2
    sampler = sampler_of(sampling, uids, group, seed)
    told = [[] for _ in range(len(uids) * group)]
    active = list(range(len(told)))
    while active:
        rows = [logits_after(seed, sample // group, told[sample]) for sample in active]
        continued = sampler.draw(torch.stack(rows), torch.arange(len(rows)))
        taken = [active[k] for k in continued.kept.tolist()]
        assert taken == sampler.active.tolist()
        for sample, token in zip(taken, continued.ids.tolist(), strict=True):
            told[sample].append(token)
        active = taken
    found = sampler.answers()

    examples = [example(uid) for uid in uids]
    streams = sample_streams("answer", examples, group, seed, 3)
    uniform = random.uniform(streams, (5,)).double()
    logprobs, sampled, mass = [], [], []
    for sample, ids in enumerate(found.token_ids):
        for position, token in enumerate(ids):
            before = torch.tensor([ids[:position]], dtype=torch.int64)
            logits = logits_after(seed, sample // group, ids[:position])[None]
            ends = [END, *sampling.stop_token_ids] if position < sampling.min_tokens else []
            prompt = torch.tensor([[1 + sample // group, 2]])
            forbidden = torch.tensor(ends) if ends else None
            changed = process_logits(logits, sampling, prompt, before, forbidden)
            scale = sampling.temperature or 1.0
            plain = (logits / scale).log_softmax(dim=-1)[0]
            cut = truncate_logits(changed / scale, sampling).log_softmax(dim=-1)[0]
            if sampling.temperature:
                below = int((cut.exp().cumsum(0) <= uniform[sample, position]).sum())
                assert token == below
            else:
                assert token == int(changed[0].argmax())
            logprobs.append(float(plain[token]))
            sampled.append(float(cut[token]))
            mass.append(float(plain.exp()[cut > -math.inf].sum()))
            is_last = position + 1 == len(ids)
            assert is_last == (token in (END, *sampling.stop_token_ids) or position == 4)
    assert found.logprobs.tolist() == pytest.approx(logprobs, abs=1e-12)
    if sampling.changes and sampling.temperature:
        assert found.sampled_from.logprobs.tolist() == pytest.approx(sampled, abs=1e-12)
        assert found.sampled_from.kept_mass.tolist() == pytest.approx(mass, abs=1e-12)
    else:
        assert found.sampled_from is None


def test_the_default_draws_the_tokens_of_the_policys_own_distribution():
    """As a full pass and the inverse of the cumulative distribution have them, bit for bit."""
    policy = small_policy()
    questions, count = prompts("understand", 6), 3
    found = policy.sample_texts(questions, count, sampling=SAMPLING, seed=7, step=2)
    (pack,) = policy.packs(found.groups())
    with torch.no_grad():
        outputs = policy.forward(pack)
        logits = policy.module.logits(outputs.hidden)[pack.row_index]
    low, high = policy.answer_range
    cumulative = (logits[:, low:high] / SAMPLING.temperature).softmax(dim=-1).cumsum(dim=-1)
    uniform = random.uniform(sample_streams("answer", questions, count, 7, 2), (4,)).double()
    numbers = torch.cat(
        [row[: len(ids)] for row, ids in zip(uniform, found.token_ids, strict=True)]
    )
    ids = torch.searchsorted(cumulative, numbers[:, None])[:, 0] + low
    assert ids.tolist() == [token for tokens in found.token_ids for token in tokens]
    assert found.sampled_from is None


def test_answers_of_all_options_do_not_depend_on_the_batch():
    policy = small_policy(torch.float64, backend=None)
    sampling = dataclasses.replace(
        SAMPLING, top_k=40, top_p=0.9, min_p=0.01, repetition_penalty=1.4, min_tokens=1
    )
    questions = prompts("understand", 5)
    key = {"sampling": sampling, "seed": 1, "step": 0}
    together = policy.sample_texts(questions, 3, **key)
    for at, question in enumerate(questions):
        alone = policy.sample_texts([question], 3, **key)
        assert alone.token_ids == together.token_ids[3 * at : 3 * at + 3]
        assert alone.texts == together.texts[3 * at : 3 * at + 3]


def test_what_cannot_be_drawn_is_named():
    with pytest.raises(ValueError, match=r"stop_token_ids has 11, expected tokens in \[0, 11\)"):
        sampler_of(Sampling(max_tokens=2, stop_token_ids=(V,)))
    nothing = Sampling(max_tokens=2, logit_processors=(lambda ids, x: x - math.inf,))
    sampler = sampler_of(nothing)
    with pytest.raises(ValueError, match="token 0 of an answer cannot be drawn: logit_processors"):
        sampler.draw(torch.zeros(1, V), torch.zeros(1, dtype=torch.int64))
