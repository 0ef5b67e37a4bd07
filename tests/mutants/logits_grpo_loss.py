"""Deliberately broken versions of logits_grpo_loss; the tolerance rule must reject every one.

What a loss can get wrong is in `mutants.grpo_loss`; these get a row, a tile or a scale wrong.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from mutants._fused import Broken, Mutant, without_dead_rows, without_weightless_tokens
from torch import Tensor

from lvrpo.reference.logits_grpo_loss import logits_grpo_loss

broken = Broken(logits_grpo_loss)


def where_rows(
    inside: Callable[[Tensor], Tensor], change: Callable[[Tensor], Tensor]
) -> Callable[[Tensor], Tensor]:
    def changed(gradient: Tensor) -> Tensor:
        rows = inside(torch.arange(len(gradient)))
        return torch.where(rows[:, None], change(gradient), gradient)

    return changed


def rounded_probability(inputs: dict[str, Any]) -> dict[str, Any]:
    """As if the probabilities had been stored in 8 bits of mantissa."""
    logits = inputs["logits"]
    return {"logits": logits + (logits.detach() * 1.004 - logits.detach())}


def ratio_of_another_temperature(inputs: dict[str, Any]) -> dict[str, Any]:
    return {"old_logprobs": inputs["old_logprobs"] * inputs["temperature"]}


MUTANTS: dict[str, Mutant] = {
    "dlogits all zeros": broken.with_gradient("logits", torch.zeros_like),
    "dlogits sign flipped": broken.with_gradient("logits", torch.neg),
    "dlogits scaled by 2 %": broken.with_gradient("logits", lambda g: g * 1.02),
    "dlogits of the neighbouring row": broken.with_gradient("logits", lambda g: g.roll(1, 0)),
    "dlogits without the last chunk": broken.with_gradient(
        "logits", where_rows(lambda r: r >= 20, torch.zeros_like)
    ),
    "dlogits without the first row": broken.with_gradient(
        "logits", where_rows(lambda r: r == 0, torch.zeros_like)
    ),
    "dlogits misses its last column": broken.with_gradient(
        "logits", lambda g: torch.cat([g[:, :-1], torch.zeros_like(g[:, -1:])], 1)
    ),
    "dlogits without its targets": broken.with_gradient("logits", lambda g: g.clamp(max=0.0)),
    "temperature missing in dlogits": broken.with_gradient("logits", lambda g: g * 0.7),
    "upstream gradient ignored": broken.with_upstream(torch.ones_like),
    "upstream gradient applied twice": broken.with_upstream(torch.square),
    "gradient of the entropy missing": broken.with_params(entropy_coef=0.0),
    "gradient of the KL missing": broken.with_params(beta=0.0),
    "aggregated over all tokens": broken.with_params(aggregation="token_mean"),
    "rows without a gradient left out of the metrics": broken.with_inputs(without_dead_rows),
    "a policy weight of 0 leaves the denominator": broken.with_inputs(without_weightless_tokens),
    "policy weights ignored": broken.with_inputs(lambda _: {"policy_weights": None}),
    "mask ignored": broken.with_inputs(lambda _: {"mask": None}),
    "probabilities of rounded logits": broken.with_inputs(rounded_probability),
    "old log-probs of another temperature": broken.with_inputs(ratio_of_another_temperature),
    "tokens shifted by one": broken.with_inputs(lambda i: {"token_ids": i["token_ids"].roll(1)}),
    "old log-probs shifted by one": broken.with_inputs(
        lambda i: {"old_logprobs": i["old_logprobs"].roll(1)}
    ),
    "row of the neighbour": broken.with_inputs(lambda i: {"row_index": i["row_index"].roll(1)}),
    "shared row counted once": broken.with_inputs(
        lambda i: {"row_index": torch.arange(len(i["row_index"]))}
    ),
    "temperature ignored": broken.with_inputs(lambda i: {"temperature": 1.0}),
    "log-probs of masked tokens kept": broken.wrong_output(2, lambda x: x - (x == 0).to(x)),
    "entropy in bits": broken.wrong_output(3, lambda x: x / 0.6931471805599453),
}
