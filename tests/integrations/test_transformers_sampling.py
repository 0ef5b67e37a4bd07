"""All options of sampling together give the distribution of transformers' `generate`."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("transformers", reason="pip install 'lvrpo[transformers]'")
from transformers.generation import logits_process as processors

from lvrpo.models.sampling import Sampling, draw_tokens, process_logits, truncate_logits

V = 23


def theirs(logits, ids, chosen, forbidden):
    """Scores of transformers' processors, in the order of its `generate`."""
    scores = logits.clone()
    penalty = chosen["repetition_penalty"]
    scores = processors.RepetitionPenaltyLogitsProcessor(penalty)(ids, scores)
    length = ids.shape[1]
    if forbidden:
        block = processors.MinNewTokensLengthLogitsProcessor(length, 1, forbidden)
        scores = block(ids, scores)
    scores = processors.TemperatureLogitsWarper(chosen["temperature"])(ids, scores)
    if chosen["top_k"]:
        scores = processors.TopKLogitsWarper(chosen["top_k"])(ids, scores)
    if chosen["top_p"] < 1:
        scores = processors.TopPLogitsWarper(chosen["top_p"])(ids, scores)
    if chosen["min_p"]:
        scores = processors.MinPLogitsWarper(chosen["min_p"])(ids, scores)
    return scores


@settings(max_examples=40)
@given(
    seed=st.integers(0, 10**6),
    chosen=st.fixed_dictionaries(
        {
            "temperature": st.sampled_from([0.3, 1.0, 2.5]),
            "top_k": st.sampled_from([0, 1, 2, 7, V, 99]),
            "top_p": st.sampled_from([0.05, 0.5, 0.9, 1.0]),
            "min_p": st.sampled_from([0.0, 0.03, 0.4, 1.0]),
            "repetition_penalty": st.sampled_from([0.7, 1.0, 1.8]),
        }
    ),
    forbidden=st.sampled_from([[], [3], [0, 22]]),
)
def test_all_options_together_are_those_of_transformers(seed, chosen, forbidden):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(5, V, generator=generator, dtype=torch.float64) * 3
    ids = torch.randint(V, (5, 6), generator=generator)
    expected = theirs(logits, ids, chosen, forbidden)
    how = Sampling(max_tokens=8, **chosen)
    banned = torch.tensor(forbidden) if forbidden else None
    scores = process_logits(logits, how, ids[:, :2], ids[:, 2:], banned) / how.temperature
    found = truncate_logits(scores, how)
    assert torch.equal(found > -math.inf, expected > -math.inf)
    assert torch.equal(found, expected)
    # ... and the tokens are drawn from it: two numbers inside of each token's share.
    probs = expected.softmax(dim=-1)
    edges = torch.cat([torch.zeros(5, 1), probs.cumsum(dim=-1)], dim=1)
    for token in range(V):
        rows = (probs[:, token] > 1e-6).nonzero().flatten()
        for share in (0.1, 0.9):
            uniform = edges[rows, token] + share * probs[rows, token]
            drawn = draw_tokens(
                logits[rows],
                uniform,
                how,
                vocab_range=(0, V),
                prompts=ids[rows, :2],
                generated=ids[rows, 2:],
                forbidden=banned,
            )
            assert drawn.ids.eq(token).all()
