"""SmolLM2-135M-Instruct, real weights, as a policy: what it says, and what an update has of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("transformers", reason="pip install 'lvrpo[transformers]'")
from lvrpo.data.example import Example
from lvrpo.models.huggingface.loading import make_policy
from lvrpo.models.sampling import Sampling
from lvrpo.real.smollm2 import load, why_not
from lvrpo.testing import check_against_plain

pytestmark = pytest.mark.slow
QUESTIONS = [
    Example("understand", "capital", "What is the capital of France?", answer="Paris"),
    Example("understand", "sum", "3 + 4 =", answer="7"),
]


@pytest.fixture(scope="module")
def parts() -> tuple[Any, Any]:
    if reason := why_not():
        pytest.skip(reason)
    return load()


def test_it_says_what_generate_says_and_the_update_replays_it(parts):
    model, tokenizer = parts
    policy = make_policy(model, tokenizer)
    greedy = policy.sample_texts(
        QUESTIONS, 1, sampling=Sampling(max_tokens=12, temperature=0.0), seed=0, step=0
    )
    assert "Paris" in greedy.texts[0]
    sampled = policy.sample_texts(QUESTIONS, 4, sampling=Sampling(max_tokens=12), seed=0, step=0)
    logprobs = torch.cat([policy.forward(p).logprobs(p) for p in policy.packs(sampled.groups())])
    check_against_plain(logprobs.detach(), sampled.logprobs.double(), sampled.logprobs, scale=64.0)
    logprobs.mean().backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()

    model.set_attn_implementation("eager")
    prompts = {
        example.uid: tokenizer.apply_chat_template(
            [{"role": "user", "content": example.prompt}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )
        for example in QUESTIONS
    }
    for example, (completion,) in greedy.groups():
        inputs = prompts[example.uid]
        made = model.generate(**inputs, max_new_tokens=12, do_sample=False)
        assert completion == made[0, inputs["input_ids"].shape[1] :].tolist()
    alone = []
    for example, completions in sampled.groups():
        ids = prompts[example.uid]["input_ids"]
        for completion in completions:
            whole = torch.cat([ids, torch.tensor([completion])], dim=1)
            logits = model(input_ids=whole).logits[0, ids.shape[1] - 1 : -1]
            index = torch.tensor(completion)[:, None]
            alone.append(logits.log_softmax(-1).gather(1, index)[:, 0])
    expected = torch.cat(alone)
    check_against_plain(expected.detach(), logprobs.detach().double(), logprobs.detach(), scale=64)
    expected.mean().backward()
    apart = sum(float((p.grad - found[n]).square().sum()) for n, p in model.named_parameters())
    size = sum(float(p.grad.square().sum()) for p in model.parameters())
    assert (apart / size) ** 0.5 < 1e-4
