"""Deliberately broken versions of linear_logprobs; the tolerance rule must reject every one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lvrpo.reference.gather_logprobs import gather_logprobs
from lvrpo.reference.linear_logprobs import linear_logprobs as reference
from lvrpo.reference.linear_logprobs import project

#: Rows [CUT:] are the last chunk, where one is done wrong.
CUT = 5


def with_gradient(name: str, change: Callable[[Tensor], Tensor]) -> Callable[..., Any]:
    def mutant(**inputs: Any) -> Any:
        if inputs[name].requires_grad:
            inputs[name] = inputs[name] * 1.0
            inputs[name].register_hook(change)
        return reference(**inputs)

    return mutant


def with_inputs(change: Callable[[dict[str, Any]], dict[str, Any]]) -> Callable[..., Any]:
    return lambda **inputs: reference(**inputs | change(inputs))


def with_logits(change: Callable[..., Tensor]) -> Callable[..., Any]:
    def mutant(hidden: Tensor, weight: Tensor, bias: Tensor, **options: Any) -> Any:
        return gather_logprobs(change(hidden, weight, bias), **options)

    return mutant


def last_chunk_left_out_of_dweight(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    first = project(hidden[:CUT], weight, bias)
    return torch.cat([first, project(hidden[CUT:], weight.detach(), bias)])


def first_chunk_overwritten(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    last = project(hidden[CUT:], weight, bias)
    return torch.cat([project(hidden[:CUT], weight.detach(), bias), last])


def last_chunk_twice_in_dbias(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    first = project(hidden[:CUT], weight, bias)
    return torch.cat([first, project(hidden[CUT:], weight, 2 * bias - bias.detach())])


def last_tile_not_projected(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    logits = project(hidden, weight, bias)
    return torch.cat([logits[:, :-3], torch.zeros_like(logits[:, -3:])], dim=1)


def logits_in_bf16(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return project(hidden, weight, bias).bfloat16().to(hidden)


MUTANTS: dict[str, Callable[..., Any]] = {
    "dhidden all zeros": with_gradient("hidden", torch.zeros_like),
    "dhidden of the neighbour": with_gradient("hidden", lambda g: g.roll(1, 0)),
    "dweight all zeros": with_gradient("weight", torch.zeros_like),
    "dweight scaled by 2 %": with_gradient("weight", lambda g: g * 1.02),
    "dweight misses its last row": with_gradient(
        "weight", lambda g: torch.cat([g[:-1], torch.zeros_like(g[-1:])])
    ),
    "dbias all zeros": with_gradient("bias", torch.zeros_like),
    "dweight without the last chunk": with_logits(last_chunk_left_out_of_dweight),
    "dweight without the first chunk": with_logits(first_chunk_overwritten),
    "dbias with the last chunk twice": with_logits(last_chunk_twice_in_dbias),
    "last columns not projected": with_logits(last_tile_not_projected),
    "logits rounded to bf16": with_logits(logits_in_bf16),
    "bias ignored": with_inputs(lambda inputs: {"bias": inputs["bias"] * 0}),
    "temperature ignored": with_inputs(lambda inputs: {"temperature": 1.0}),
    "row of the neighbour": with_inputs(lambda inputs: {"row_index": inputs["row_index"].roll(1)}),
    "rows of a chunk counted from 0": with_inputs(
        lambda inputs: {"row_index": inputs["row_index"] % CUT}
    ),
}


def multiplied_by_0(
    hidden: Tensor, weight: Tensor, bias: Tensor, token_ids: Tensor, **options: Any
) -> Any:
    """A row that no token uses gets a gradient of exactly 0, which its NaN survives in dweight."""
    logits = hidden @ weight.T + bias
    seen = torch.where((token_ids != -100)[:, None], logits, 0.0)
    return gather_logprobs(seen, token_ids, **options)


def logits_of_every_row(
    hidden: Tensor, weight: Tensor, bias: Tensor, token_ids: Tensor, **options: Any
) -> Any:
    """Its log-probs are not used, but the softmax is taken of them."""
    log_p = (hidden @ weight.T + bias).log_softmax(dim=1)
    ignored = token_ids == -100
    logprobs = log_p.gather(1, token_ids.masked_fill(ignored, 0)[:, None])[:, 0]
    entropy = -(log_p.exp() * log_p).sum(dim=1)
    squares = log_p.detach().exp().square().sum(dim=1)
    return logprobs.masked_fill(ignored, 0.0), entropy, squares


#: What is wrong only with a row that no token uses, and what it holds.
UNGUARDED: dict[str, tuple[Callable[..., Any], float]] = {
    "hidden states of NaN times a gradient of 0": (multiplied_by_0, torch.nan),
    "softmax of a row of NaN": (logits_of_every_row, torch.nan),
    "softmax of a row that overflows": (logits_of_every_row, 1e38),
}
