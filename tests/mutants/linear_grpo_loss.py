"""Deliberately broken versions of linear_grpo_loss; the tolerance rule must reject every one.

What a loss can get wrong is in `mutants.grpo_loss`; these get a chunk, a row or a scale wrong.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from mutants._fused import Broken, Mutant, without_dead_rows, without_weightless_tokens

from lvrpo.reference.linear_grpo_loss import linear_grpo_loss

broken = Broken(linear_grpo_loss)


def detached_rows(begin: int, end: int | None) -> Callable[[dict[str, Any]], dict[str, Any]]:
    def change(inputs: dict[str, Any]) -> dict[str, Any]:
        hidden = inputs["hidden"]
        rows = torch.arange(len(hidden))
        inside = (rows >= begin) & (rows < (len(hidden) if end is None else end))
        return {"hidden": torch.where(inside[:, None], hidden.detach(), hidden)}

    return change


MUTANTS: dict[str, Mutant] = {
    "dhidden all zeros": broken.with_gradient("hidden", torch.zeros_like),
    "dhidden not put back in order": broken.with_gradient("hidden", lambda g: g.flip(0)),
    "dhidden without the last chunk": broken.with_inputs(detached_rows(20, None)),
    "dhidden without the first row": broken.with_inputs(detached_rows(0, 1)),
    "dweight all zeros": broken.with_gradient("weight", torch.zeros_like),
    "dweight sign flipped": broken.with_gradient("weight", torch.neg),
    "dweight scaled by 2 %": broken.with_gradient("weight", lambda g: g * 1.02),
    "dweight misses its last row": broken.with_gradient(
        "weight", lambda g: torch.cat([g[:-1], torch.zeros_like(g[-1:])])
    ),
    "dbias all zeros": broken.with_gradient("bias", torch.zeros_like),
    "upstream gradient ignored": broken.with_upstream(torch.ones_like),
    "upstream gradient applied twice": broken.with_upstream(torch.square),
    "gradient of the entropy missing": broken.with_params(entropy_coef=0.0),
    "gradient of the KL missing": broken.with_params(beta=0.0),
    "rows without a gradient left out of the metrics": broken.with_inputs(without_dead_rows),
    "a policy weight of 0 leaves the denominator": broken.with_inputs(without_weightless_tokens),
    "policy weights ignored": broken.with_inputs(lambda _: {"policy_weights": None}),
    "mask ignored": broken.with_inputs(lambda _: {"mask": None}),
    "tokens shifted by one": broken.with_inputs(lambda i: {"token_ids": i["token_ids"].roll(1)}),
    "old log-probs shifted by one": broken.with_inputs(
        lambda i: {"old_logprobs": i["old_logprobs"].roll(1)}
    ),
    "row of the neighbour": broken.with_inputs(lambda i: {"row_index": i["row_index"].roll(1)}),
    "shared row counted once": broken.with_inputs(
        lambda i: {"row_index": torch.arange(len(i["row_index"]))}
    ),
    "bias ignored": broken.with_inputs(lambda i: {"bias": i["bias"] * 0}),
    "temperature ignored": broken.with_inputs(lambda i: {"temperature": 1.0}),
    "log-probs of masked tokens kept": broken.wrong_output(2, lambda x: x - (x == 0).to(x)),
    "entropy in bits": broken.wrong_output(3, lambda x: x / 0.6931471805599453),
}
