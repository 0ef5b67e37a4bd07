"""A model on lvrpo's attention equals itself on its own, one sequence at a time.

The oracle never sees padding, packing or groups: it runs every sequence alone, in transformers'
eager attention, in fp64. The model under test sees them all at once.
"""

from __future__ import annotations

import copy
import functools
from typing import Any, NamedTuple

import pytest
import torch
from integrations.tiny_models import (
    FAMILIES,
    GRID,
    IMAGE,
    IMAGES,
    SIZES,
    TEXT,
    Family,
    transformers,
)
from torch import Tensor

import lvrpo
from lvrpo import SpanMask
from lvrpo.integrations.transformers import attention as module
from lvrpo.integrations.transformers import completion_states, register, set_attention
from lvrpo.testing import check_against_plain

BEFORE = 2  # tokens before an image


class Sequence(NamedTuple):
    prompt: Tensor
    completion: Tensor

    def ids(self) -> Tensor:
        return torch.cat(self)


class Forward(NamedTuple):
    """Keyword arguments of a model, and where its logits of all completions are, one by one."""

    inputs: dict[str, Any]
    rows: Tensor


def prompt(family: Family, length: int) -> Tensor:
    ids = torch.randint(3, 50, (length + family.image_tokens,))
    ids[BEFORE : BEFORE + family.image_tokens] = IMAGE
    return ids


def sequences(family: Family) -> list[Sequence]:
    """Of several lengths."""
    return [
        Sequence(prompt(family, before), torch.randint(3, 50, (after,)))
        for before, after in ((5, 3), (3, 6), (7, 2))
    ]


def predicting(family: Family, sequence: Sequence, start: int) -> Tensor:
    """The rows whose logits are of the completion of a sequence that starts at some row."""
    first = len(sequence.prompt) - 1
    return start + torch.arange(first, first + len(sequence.completion))


def alone(family: Family, sequence: Sequence) -> Forward:
    ids = sequence.ids()[None]
    completion = torch.arange(ids.shape[1])[None] >= len(sequence.prompt)
    inputs = {"input_ids": ids, **family.images(1), **family.types(ids, completion)}
    return Forward(inputs, predicting(family, sequence, 0))


def padded(family: Family, batch: list[Sequence], left: list[bool]) -> Forward:
    length = max(len(sequence.ids()) for sequence in batch)
    ids = torch.zeros(len(batch), length, dtype=torch.int64)
    mask, completion = torch.zeros_like(ids), torch.zeros_like(ids, dtype=torch.bool)
    rows = []
    for index, (sequence, on_the_left) in enumerate(zip(batch, left, strict=True)):
        tokens = sequence.ids()
        start = length - len(tokens) if on_the_left else 0
        ids[index, start : start + len(tokens)] = tokens
        mask[index, start : start + len(tokens)] = 1
        completion[index, start + len(sequence.prompt) :] = True
        rows.append(predicting(family, sequence, index * length + start))
    inputs = {"input_ids": ids, "attention_mask": mask, **family.images(len(batch))}
    return Forward({**inputs, **family.types(ids, completion)}, torch.cat(rows))


def packed(family: Family, batch: list[Sequence]) -> Forward:
    ids = torch.cat([sequence.ids() for sequence in batch])
    positions = torch.cat([torch.arange(len(sequence.ids())) for sequence in batch])
    starts = torch.tensor([0] + [len(sequence.ids()) for sequence in batch]).cumsum(0).tolist()
    rows = [predicting(family, *pair) for pair in zip(batch, starts, strict=False)]
    return Forward({"input_ids": ids[None], "position_ids": positions[None]}, torch.cat(rows))


def grouped(family: Family, groups: list[tuple[Tensor, list[Tensor]]]) -> Forward:
    """Every prompt, and its image, once."""
    layout, parts, is_completion, spans, grids = [], [], [], [], {}
    count = 0
    for tokens, completions in groups:
        after = len(tokens) - BEFORE - family.image_tokens
        image = [(family.image_tokens, family.image_mode)] if family.image_tokens else []
        chain = [(BEFORE, "causal"), *image, (after, "causal")]
        if image:
            grids[count + 1] = (GRID[0], GRID[1] // 2, GRID[2] // 2)
        if family.prefix:
            chain = [(len(tokens), "full")]
        layout.append((chain, [[(len(completion), "causal")] for completion in completions]))
        spans += range(count + len(chain), count + len(chain) + len(completions))
        count += len(chain) + len(completions)
        parts += [tokens, *completions]
        is_completion += [False, *[True] * len(completions)]
    mask = SpanMask.from_groups(layout)
    ids = torch.cat(parts)[None]
    lengths = torch.tensor([len(part) for part in parts])
    completion = torch.repeat_interleave(torch.tensor(is_completion), lengths)[None]
    if family.mrope:
        positions = lvrpo.mrope_position_ids(mask, grids, resume="after_frame")[:, None]
    else:
        positions = lvrpo.position_ids(mask)[None]
    inputs = {"input_ids": ids, "position_ids": positions, "span_mask": mask}
    inputs |= {**family.images(len(groups)), **family.types(ids, completion)}
    return Forward(inputs, lvrpo.target_index(mask, spans).row_index)


@functools.lru_cache(maxsize=2)
def model_of(name: str) -> Any:
    register()
    torch.manual_seed(0)
    return FAMILIES[name].model()


def logits_of(model: Any, forward: Forward) -> Tensor:
    dtype = next(model.parameters()).dtype
    inputs = {
        key: value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value
        for key, value in forward.inputs.items()
    }
    return model(**inputs, use_cache=False).logits.flatten(0, 1)[forward.rows]


def run(model: Any, forwards: list[Forward]) -> dict[str, Tensor]:
    """Logits of all completions, and the gradient of every parameter."""
    model.zero_grad()
    logits = torch.cat([logits_of(model, forward) for forward in forwards])
    upstream = torch.randn(logits.shape, generator=torch.Generator().manual_seed(1))
    (logits * upstream / logits.shape[0]).sum().backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"logits": logits.detach(), **found}


def compare(name: str, forward: Forward, batch: list[Sequence]) -> None:
    model, family = model_of(name), FAMILIES[name]
    separate = [alone(family, sequence) for sequence in batch]
    model.set_attn_implementation("eager")
    gold, plain = run(copy.deepcopy(model).double(), separate), run(model, separate)
    model.set_attn_implementation("lvrpo")
    ours = run(model, [forward])
    assert gold.keys() == plain.keys() == ours.keys()
    largest = max(float(x.abs().max()) for key, x in gold.items() if key != "logits")
    for key, expected in gold.items():
        # The gradient of a bias of keys is 0: what is there is rounding of the others.
        scale = max(float(expected.abs().max()), 0.0 if key == "logits" else 1e-2 * largest)
        check_against_plain(ours[key], expected, plain[key], scale=scale, ulps=32, name=key)


@pytest.mark.parametrize("name", FAMILIES)
def test_padding_on_either_side(name):
    batch = sequences(FAMILIES[name])
    compare(name, padded(FAMILIES[name], batch, [True, False, True]), batch)


@pytest.mark.parametrize("name", [name for name in TEXT if name != "gpt_oss"])
def test_packed_by_position_ids(name):
    batch = sequences(FAMILIES[name])
    compare(name, packed(FAMILIES[name], batch), batch)


@pytest.mark.parametrize("name", FAMILIES)
def test_groups_with_one_prompt(name):
    family = FAMILIES[name]
    groups = [
        (prompt(family, before), [torch.randint(3, 50, (length,)) for length in lengths])
        for before, lengths in ((5, (2, 4, 3)), (3, (1, 5)))
    ]
    batch = [Sequence(tokens, one) for tokens, completions in groups for one in completions]
    compare(name, grouped(family, groups), batch)


@pytest.mark.parametrize("name", FAMILIES)
def test_greedy_generation(name):
    model, family = model_of(name), FAMILIES[name]
    prompts = [Sequence(prompt(family, length), torch.zeros(0).long()) for length in (4, 7)]
    inputs = padded(family, prompts, [True, True]).inputs
    tokens = []
    for attention in ("eager", "lvrpo"):
        model.set_attn_implementation(attention)
        options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
        tokens.append(model.generate(**inputs, **options))
    assert tokens[0].shape[1] == inputs["input_ids"].shape[1] + 6
    assert torch.equal(*tokens)


@pytest.mark.parametrize("name", IMAGES)
def test_a_tower_is_one_call_a_layer(name, monkeypatch):
    family, calls = FAMILIES[name], []

    def count(q, *arguments, **options):
        calls.append(len(q))
        return lvrpo.packed_attention(q, *arguments, **options)

    monkeypatch.setattr(module, "packed_attention", count)
    model = model_of(name)
    forward = alone(family, sequences(family)[0])
    results = []
    for choose in (lambda: model.set_attn_implementation("lvrpo"), lambda: set_attention(model)):
        choose()
        calls.clear()
        results.append(logits_of(model, forward))
    # Two layers of text and two of the tower; padding is a call, a convolution is none.
    of_tower = {"idefics3": 4, "smolvlm": 4, "fast_vlm": 0}.get(name, 2)
    assert len(calls) == 2 + of_tower
    check_against_plain(results[1], results[0].double(), results[0], scale=10.0)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_head_of_groups(name):
    """completion_states of a buffer, whose targets row_index names."""
    model, family = model_of(name), FAMILIES[name]
    tokens, completions = prompt(family, 5), [torch.randint(3, 50, (n,)) for n in (2, 4)]
    forward = grouped(family, [(tokens, completions)])
    ids = torch.cat(completions)
    model.set_attn_implementation("lvrpo")
    with torch.no_grad():
        states = completion_states(model, forward.inputs)
        ours = lvrpo.linear_logprobs(**states.head(), token_ids=ids, row_index=forward.rows)
        logits = logits_of(model, forward)
    plain = torch.log_softmax(logits, dim=-1).gather(1, ids[:, None])[:, 0]
    gold = torch.log_softmax(logits.double(), dim=-1).gather(1, ids[:, None])[:, 0]
    check_against_plain(ours, gold, plain, scale=10.0)


def test_a_span_mask_is_not_lost_without_a_word():
    """By an attention that does not look at it, or by layers that are not attention."""
    family = FAMILIES["llama"]
    tokens, completions = prompt(family, 5), [torch.randint(3, 50, (n,)) for n in (2, 4)]
    inputs = grouped(family, [(tokens, completions)]).inputs
    model = model_of("llama")
    model.set_attn_implementation("sdpa")
    with pytest.raises(ValueError, match="attention is 'sdpa', expected 'lvrpo': set_attention"):
        completion_states(model, inputs)
    hybrid = transformers.Qwen3NextConfig(
        **SIZES,
        head_dim=8,
        layer_types=["linear_attention", "full_attention"],
        num_experts=2,
        num_experts_per_tok=1,
        moe_intermediate_size=16,
    )
    chunked = transformers.Llama4TextConfig(**SIZES, head_dim=8, attention_chunk_size=4)
    for config, match in ((hybrid, "linear_attention"), (chunked, "chunked_attention")):
        other = transformers.AutoModelForCausalLM.from_config(config)
        set_attention(other)
        with pytest.raises(ValueError, match=match):
            completion_states(other, inputs)
    bloom = transformers.BloomConfig(vocab_size=64, hidden_size=32, n_layer=1, n_head=4)
    with pytest.raises(ValueError, match="BloomModel keeps its own attention"):
        set_attention(transformers.BloomModel(bloom))


def test_a_name_without_a_mask_function_would_lose_the_padding():
    """What `register` is for: transformers drops a mask that it knows no function for."""
    model, family = model_of("llama"), FAMILIES["llama"]
    batch = sequences(family)
    forward = padded(family, batch, [True, True, True])
    transformers.AttentionInterface.register("only_attention", module.attention)
    results = []
    for name in ("eager", "lvrpo", "only_attention"):
        model.set_attn_implementation(name)
        with torch.no_grad():
            results.append(logits_of(model, forward))
    error = [float((x - results[0]).abs().max()) for x in results]
    assert error[1] < 1e-5 < 1e-2 < error[2]


def test_masks_of_a_rollout_serve_an_update():
    """What inference mode made could not be saved for a backward pass."""
    model, family = model_of("idefics3"), FAMILIES["idefics3"]
    set_attention(model)
    forward = padded(family, sequences(family), [True, False, True])
    expected = run(model, [forward])
    module._plain.cache_clear()
    with torch.inference_mode():
        logits_of(model, forward)
    found = run(model, [forward])
    assert all(torch.equal(found[key], expected[key]) for key in expected)


def test_checkpointed_layers():
    model, family = model_of("gemma2"), FAMILIES["gemma2"]
    model.set_attn_implementation("lvrpo")
    forward = padded(family, sequences(family), [True, False, True])
    expected = run(model, [forward])
    model.gradient_checkpointing_enable()
    model.train()
    found = run(model, [forward])
    model.gradient_checkpointing_disable()
    model.eval()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in found)
