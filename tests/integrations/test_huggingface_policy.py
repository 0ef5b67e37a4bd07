"""A model of transformers as a policy, against the same model by itself.

The oracle runs transformers' eager attention on one sequence at a time, as its own processor and
its own forward lay it out: no padding, no packing, no shared prompts, no positions of ours.
"""

from __future__ import annotations

import copy
import functools
from typing import Any

import numpy as np
import pytest
import torch
from integrations.tiny_folders import PICTURES, processor
from integrations.tiny_models import FAMILIES, IMAGE
from torch import Tensor

from lvrpo.data.example import Example
from lvrpo.models.huggingface import decoding
from lvrpo.models.huggingface.loading import make_policy
from lvrpo.models.huggingface.policy import HuggingFacePolicy
from lvrpo.models.protocol import Answers, DivergedError
from lvrpo.models.sampling import Sampling
from lvrpo.testing import check_against_plain
from lvrpo.trainer.loop import check_ratio

#: Text models: plain, with windows, with a soft-cap of scores and of logits.
TEXTS = ("llama", "qwen3", "mistral", "gemma2")
GROUP, MAX_TOKENS = 3, 9


@functools.lru_cache(maxsize=2)
def eager(name: str) -> Any:
    """The model by itself."""
    torch.manual_seed(0)
    return FAMILIES[name].model()


@functools.lru_cache(maxsize=2)
def policy_of(name: str) -> HuggingFacePolicy:
    return make_policy(copy.deepcopy(eager(name)), processor(name))


def picture(seed: int, height: int = 16, width: int = 16) -> np.ndarray:
    return np.random.default_rng(seed).random((3, height, width), dtype=np.float32)


def question(uid: str, prompt: str, image: np.ndarray | None = None) -> Example:
    return Example("understand", uid, prompt, image=image, answer="w30")


def questions(name: str) -> list[Example]:
    """Of several lengths, with pictures of several sizes where the model reads them."""
    texts = [question("a", "w20 w21 w22 w23"), question("b", "w24")]
    if not FAMILIES[name].image_tokens:
        return texts
    return [
        question("c", "w25 w26 <image> w27", picture(0)),
        question("d", "w28", picture(1, 24, 16)),
        texts[0],
    ]


def chat(example: Example, name: str) -> dict[str, Any]:
    """The prompt as the processor itself encodes it."""
    content: Any = example.prompt
    if FAMILIES[name].image_tokens:
        before, _, after = example.prompt.rpartition("<image>")
        parts = [{"type": "text", "text": text} for text in (before, after)]
        image = []
        if example.image is not None:
            pixels = np.round(example.image * 255).astype(np.uint8).transpose(1, 2, 0)
            image = [{"type": "image", "image": pixels}]
        content = [part for part in (parts[0], *image, parts[1]) if part.get("text") != ""]
    return dict(
        processor(name).apply_chat_template(
            [{"role": "user", "content": content}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )
    )


def alone(model: Any, name: str, example: Example, completion: list[int]) -> Tensor:
    """log_softmax of the logits that predict a completion, in a sequence of its own."""
    inputs = chat(example, name)
    before = inputs["input_ids"].shape[1]
    for key in ("attention_mask", "token_type_ids", "mm_token_type_ids"):
        if key in inputs:
            more = torch.full((1, len(completion)), int(key == "attention_mask"))
            inputs[key] = torch.cat([inputs[key], more], dim=1)
    inputs["input_ids"] = torch.cat([inputs["input_ids"], torch.tensor([completion])], dim=1)
    dtype = next(model.parameters()).dtype
    inputs = {k: x.to(dtype) if x.is_floating_point() else x for k, x in inputs.items()}
    logits = model(**inputs, use_cache=False).logits[0, before - 1 : -1]
    found = torch.log_softmax(logits.to(dtype), dim=-1)
    return found.gather(1, torch.tensor(completion)[:, None])[:, 0]


def gradients(model: Any, logprobs: Tensor) -> dict[str, Tensor]:
    """Of a sum in which every log-prob has its own weight; and the log-probs."""
    model.zero_grad()
    weights = torch.randn(len(logprobs), generator=torch.Generator().manual_seed(1))
    (logprobs * weights / len(logprobs)).sum().backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return {"log-probs": logprobs.detach(), **found}


def groups(name: str) -> list[tuple[Example, list[list[int]]]]:
    """Completions of several lengths, of one token too."""
    draw = np.random.default_rng(3)
    lengths = iter([2, 5, 1, 3, 1, 4, 6, 2, 3])
    return [
        (example, [draw.integers(7, 50, next(lengths)).tolist() for _ in range(GROUP)])
        for example in questions(name)
    ]


@pytest.mark.parametrize("max_rows", [1 << 20, 16])
@pytest.mark.parametrize("name", TEXTS + PICTURES)
def test_log_probs_and_gradients_are_those_of_separate_sequences(name, max_rows):
    policy, model, given = policy_of(name), eager(name), groups(name)
    each = [(example, tokens) for example, completions in given for tokens in completions]
    results = [
        gradients(one, torch.cat([alone(one, name, *pair) for pair in each]))
        for one in (copy.deepcopy(model).double(), model)
    ]
    packs = list(policy.packs(given, max_rows=max_rows))
    assert (len(packs) > 1) == (max_rows == 16)
    logprobs = torch.cat([policy.forward(pack).logprobs(pack) for pack in packs])
    ours, (gold, plain) = gradients(policy.model, logprobs), results
    assert gold.keys() == plain.keys() == ours.keys()
    largest = max(float(x.abs().max()) for key, x in gold.items() if key != "log-probs")
    for key, expected in gold.items():
        # The gradient of a bias of keys is 0: what is there is rounding of the others.
        scale = max(float(expected.abs().max()), 1e-2 * largest)
        check_against_plain(ours[key], expected, plain[key], scale=scale, ulps=32, name=key)


def answers(policy: HuggingFacePolicy, asked: list[Example], **how: Any) -> Answers:
    sampling = Sampling(max_tokens=MAX_TOKENS, **how)
    return policy.sample_texts(asked, GROUP, sampling=sampling, seed=0, step=1)


def by_prompt(found: Answers) -> dict[str, tuple[list[list[int]], Tensor]]:
    """The tokens and log-probs of each prompt."""
    ids = [found.token_ids[i : i + GROUP] for i in range(0, len(found.token_ids), GROUP)]
    lengths = [sum(map(len, group)) for group in ids]
    uids = [example.uid for example in found.examples]
    return dict(zip(uids, zip(ids, found.logprobs.split(lengths), strict=True), strict=True))


@pytest.mark.parametrize("name", TEXTS + PICTURES)
def test_the_update_replays_the_rollout(name):
    """Two ways to the same numbers, a cache and one forward: equal to rounding."""
    policy = policy_of(name)
    found = answers(policy, questions(name), temperature=0.8)
    with torch.no_grad():
        replayed = torch.cat(
            [
                policy.forward(pack).logprobs(pack, temperature=0.8)
                for pack in policy.packs(found.groups(), max_rows=60)
            ]
        )
    check_against_plain(replayed, found.logprobs.double(), found.logprobs, scale=10.0)
    ratio = (replayed - found.logprobs).exp()
    check_ratio({"ratio/text/min": float(ratio.min()), "ratio/text/max": float(ratio.max())})


@pytest.mark.parametrize("name", TEXTS + PICTURES)
def test_greedy_answers_are_those_of_generate(name):
    policy, model = policy_of(name), eager(name)
    found = answers(policy, questions(name), temperature=0.0)
    for example, completions in found.groups():
        inputs = chat(example, name)
        count = inputs["input_ids"].shape[1]
        made = model.generate(**inputs, max_new_tokens=MAX_TOKENS, do_sample=False)
        assert completions == [made[0, count:].tolist()] * GROUP


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen2_5_vl", "gemma3"])
def test_answers_do_not_depend_on_the_batch_or_its_blocks(name, monkeypatch):
    policy, asked = policy_of(name), questions(name)
    how = {"stop_token_ids": tuple(range(40, 56))}  # so that answers end at different lengths
    together = by_prompt(answers(policy, asked, **how))
    backwards = by_prompt(answers(policy, asked[::-1], **how))
    monkeypatch.setattr(decoding, "BLOCK", 2)
    blocks = by_prompt(answers(policy, asked, **how))
    for example in asked:
        tokens, logprobs = by_prompt(answers(policy, [example], **how))[example.uid]
        for other in (together, backwards, blocks):
            assert other[example.uid][0] == tokens
            ours = other[example.uid][1]
            check_against_plain(ours, logprobs.double(), logprobs, scale=10.0)
    lengths = {len(ids) for ids, _ in together.values() for ids in ids}
    assert len(lengths) > 1, "all answers end together: nothing leaves the batch"


def test_answers_end_as_generate_ends_them():
    policy = policy_of("llama")
    found = answers(policy, [question(str(n), f"w{n}") for n in range(20, 40)])
    reasons = set(found.finish_reasons)
    assert reasons == {"end", "length"}
    for ids, reason, text in zip(found.token_ids, found.finish_reasons, found.texts, strict=True):
        assert (ids[-1] == 2) == (reason == "end")
        assert "<eos>" not in text
    assert policy.answer_ids("w20 w21") == [20, 21, 2]
    assert policy.decode_answer([20, 1, 21]) == "w20 w21"  # a beginning is no word


def test_a_sampled_picture_token_is_no_picture():
    """The model reads another token for it, in the rollout as in the update."""
    policy = policy_of("llava")
    often = lambda ids, logits: logits.index_fill(1, torch.tensor([IMAGE]), 9.0)  # noqa: E731
    found = answers(policy, questions("llava"), logit_processors=(often,))
    assert any(IMAGE in ids for ids in found.token_ids)
    (pack,) = policy.packs(found.groups())
    with torch.no_grad():
        replayed = policy.forward(pack).logprobs(pack)
    check_against_plain(replayed, found.logprobs.double(), found.logprobs, scale=20.0)


def test_logits_that_are_not_finite_are_told():
    policy = make_policy(copy.deepcopy(eager("llama")), processor("llama"))
    with torch.no_grad():
        policy.model.lm_head.weight[5] = torch.nan
    with pytest.raises(DivergedError, match="step 1"):
        answers(policy, questions("llama"))


def test_a_prompt_that_the_model_has_no_positions_for():
    policy = policy_of("llama")
    long = question("long", " ".join(["w20"] * 118))
    with pytest.raises(ValueError, match=r"long: a prompt of 120 tokens .* positions for 128"):
        answers(policy, [long])


def test_it_cannot_draw():
    policy = policy_of("llama")
    assert policy.skills == {"understand"}
    with pytest.raises(ValueError, match="cannot draw"):
        policy.encode(torch.zeros(1, 3, 8, 8))
