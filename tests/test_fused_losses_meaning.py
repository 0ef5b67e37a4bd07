"""What logits_grpo_loss and linear_grpo_loss count, weigh and take: by published rules."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from fused_inputs import Batch, Head, both_heads, differentiated, make_batch, offsets, params_of
from plain_losses import softmax_terms
from torch import Tensor

import lvrpo
from lvrpo.params.policy_loss import LOSS_PRESETS, LossParams
from lvrpo.sampler_correction import SamplerCorrectionParams

LENGTHS = [3, 0, 6, 1, 4]
ROWS, COLUMNS = 5, 6


def close(found: Any, expected: tuple[Any, dict[str, Tensor]]) -> None:
    """Loss and gradients."""
    torch.testing.assert_close(found[0].loss.detach(), expected[0])
    torch.testing.assert_close(found[1], expected[1])


def terms_of(head: Head, batch: Batch, leaves: dict[str, Tensor]) -> tuple[Tensor, ...]:
    """Log-ratio, advantage and mask in fp64, one per token; and the entropies."""
    logp, entropy = softmax_terms(head.logits(leaves), batch.token_ids)
    lengths = torch.tensor(batch.lengths)
    advantage = batch.inputs["advantages"].repeat_interleave(lengths)
    return logp - batch.inputs["old_logprobs"], advantage, batch.inputs["mask"], entropy


def by_hand(head: Head, batch: Batch, formula: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """A formula of the log-ratios, advantages and mask, with its gradients."""

    def loss(**leaves: Tensor) -> tuple[Tensor]:
        return (formula(*terms_of(head, batch, leaves)[:3]),)

    (found,), gradients = differentiated(loss, batch.factors)
    return found.detach(), gradients


def clipped(ratio: Tensor, a: Tensor, low: float, high: float) -> Tensor:
    return -torch.minimum(ratio * a, ratio.clamp(1 - low, 1 + high) * a)


@both_heads
def test_the_rule_of_the_top_entropy_tokens(backend, head):
    # Beyond the 80/20 rule, DAPO: high entropies alone pull, the mean is over all tokens.
    batch = make_batch(head, LENGTHS)
    *_, mask, entropy = terms_of(head, batch, batch.factors)
    chosen = entropy >= entropy[mask].quantile(0.8)

    def published(gap: Tensor, a: Tensor, on: Tensor) -> Tensor:
        return (clipped(gap.exp(), a, 0.2, 0.28) * (on & chosen)).sum() / on.sum()

    weights = lvrpo.top_entropy_mask(entropy, fraction=0.2, mask=mask)
    inputs = batch.tokens | {"policy_weights": weights}
    found = head.run(batch.factors, **inputs, params=params_of("dapo"), backend=backend)
    close(found, by_hand(head, batch, published))
    assert int(found[0].metrics.active_tokens) == int(mask.sum())


@both_heads
def test_top_entropy_tokens_of_a_sequence_ratio(backend, head):
    # TRL: the ratio and the mean of a sequence are those of all its tokens.
    batch = make_batch(head, LENGTHS)
    *_, mask, entropy = terms_of(head, batch, batch.factors)
    chosen = (entropy >= entropy[mask].quantile(0.7)).double()

    def published(gap: Tensor, a: Tensor, on: Tensor) -> Tensor:
        total = torch.zeros(()).double()
        for at in torch.arange(len(gap)).split(LENGTHS):
            at = at[on[at]]
            if len(at):
                each = clipped(gap[at].mean().exp(), a[at], 0.05, 0.06) * chosen[at]
                total = total + each.mean()
        return total / len(LENGTHS)

    params = params_of("gspo", clip_low=0.05, clip_high=0.06)
    inputs = batch.tokens | {"policy_weights": chosen}
    found = head.run(batch.factors, **inputs, params=params, backend=backend)
    close(found, by_hand(head, batch, published))


@both_heads
def test_icepop(backend, head):
    # A token whose engines differ by more than the bounds has weight 0, the others their ratio.
    batch = make_batch(head, LENGTHS)
    made = torch.Generator().manual_seed(3)
    sampler = batch.inputs["old_logprobs"] + torch.randn(14, generator=made).double()
    k = (batch.inputs["old_logprobs"] - sampler).exp()
    bounded = torch.where((k >= 0.5) & (k <= 2.0), k, 0.0)
    assert 0.2 < float((bounded == 0).double().mean()) < 0.8

    def published(gap: Tensor, a: Tensor, on: Tensor) -> Tensor:
        return (bounded * clipped(gap.exp(), a, 0.2, 0.2) * on).sum() / on.sum()

    correction = lvrpo.sampler_weights(
        *(batch.inputs["old_logprobs"], sampler, offsets(LENGTHS)),
        mask=batch.inputs["mask"],
        params=SamplerCorrectionParams(weight="token", outside="zero", low=0.5, high=2.0),
    )
    inputs = batch.tokens | {"policy_weights": correction.weights}
    found = head.run(batch.factors, **inputs, params=params_of("bnpo"), backend=backend)
    close(found, by_hand(head, batch, published))


@pytest.mark.parametrize("name", LOSS_PRESETS)
@both_heads
def test_masks_and_weights_of_every_preset(backend, head, name):
    batch = make_batch(head, LENGTHS)
    params = params_of(name, beta=0.3, entropy_coef=0.1)
    found = head.run(batch.factors, **batch.tokens, params=params, backend=backend)
    close(found, head.plain(batch.factors, **batch.plainly, params=params))


@pytest.mark.parametrize("name", LOSS_PRESETS)
@both_heads
def test_a_policy_weight_of_zero_still_counts(backend, head, name):
    batch = make_batch(head, LENGTHS)
    params = params_of(name, beta=0.3, entropy_coef=0.1)
    results = [
        head.run(batch.factors, **batch.tokens | changes, params=params, backend=backend)
        for changes in (
            {"policy_weights": None},
            {"policy_weights": torch.zeros(14)},
            {"policy_weights": None, "advantages": [0.0] * len(LENGTHS)},
        )
    ]
    close(results[1], (results[2][0].loss.detach(), results[2][1]))
    of_whole, of_none = (
        {name: float(x) for name, x in found[0].metrics.as_dict().items()} for found in results[:2]
    )
    assert of_none == pytest.approx(of_whole | {"policy_loss": 0.0}, rel=1e-6)


def padded_batch(head: Head) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Factors and arguments with tokens [B, C], of which a mask with holes and one empty row is."""
    batch = make_batch(head, [COLUMNS] * ROWS)
    of_tokens = {k: x for k, x in batch.inputs.items() if k != "advantages"}
    tokens = {"token_ids": batch.token_ids, **of_tokens}
    inputs = {k: x.view(ROWS, COLUMNS) for k, x in tokens.items()}
    inputs["mask"] = inputs["mask"] & (torch.arange(COLUMNS) < torch.tensor(LENGTHS)[:, None])
    return head.shaped(batch.factors, ROWS, COLUMNS), inputs | {
        "advantages": batch.inputs["advantages"]
    }


MASKS = {
    "bool": lambda mask: mask,
    "int64": lambda mask: mask.long(),
    "int32": lambda mask: mask.int(),
    "float": lambda mask: mask.float() * 0.5,
    "list": lambda mask: mask.int().tolist(),
}
IDS = {
    "int64": lambda ids: ids,
    "int32": lambda ids: ids.int(),
    "list": lambda ids: ids.tolist(),
}


@pytest.mark.parametrize("name", LOSS_PRESETS)
@both_heads
def test_padded_tokens_are_packed_ones(backend, head, name):
    factors, inputs = padded_batch(head)
    params = params_of(name, beta=0.3, entropy_coef=0.1)
    mask, a = inputs["mask"], inputs["advantages"]
    packed = {k: x[mask] if x.dim() == 2 else x for k, x in inputs.items() if k != "mask"}
    lengths = mask.sum(1).tolist()
    flat = {**factors, head.rows: factors[head.rows][mask]}
    expected = head.run(flat, **packed, cu_seqlens=offsets(lengths), params=params, backend=backend)
    loss, gradients = expected[0].loss.detach(), expected[1]

    def compare(found: Any) -> None:
        rows = found[1][head.rows]
        if rows.dim() == 3:
            assert found[0].logprobs.shape == found[0].entropy.shape == (ROWS, COLUMNS)
            torch.testing.assert_close(found[0].logprobs[mask], expected[0].logprobs)
            assert (rows[~mask] == 0).all()
            rows = rows[mask]
        close((found[0], {**found[1], head.rows: rows}), (loss, gradients))

    for as_mask in MASKS.values():
        changes = {"mask": as_mask(mask), "advantages": a[:, None]}
        compare(head.run(factors, **inputs | changes, params=params, backend=backend))
    for as_ids in IDS.values():
        changes = {
            "token_ids": as_ids(packed["token_ids"]),
            "cu_seqlens": as_ids(offsets(lengths)),
            "row_index": as_ids(torch.arange(len(packed["token_ids"]))),
            "advantages": a.tolist(),
        }
        compare(head.run(flat, **packed | changes, params=params, backend=backend))
    if not params.needs_sequence_advantages:
        each = {"advantages": a[:, None].expand(ROWS, COLUMNS)}
        compare(head.run(factors, **inputs | each, params=params, backend=backend))


@both_heads
def test_row_index_goes_into_flattened_rows(backend, head):
    factors, inputs = padded_batch(head)
    params = params_of("grpo", beta=0.3, entropy_coef=0.1)
    expected = head.run(factors, **inputs, params=params, backend=backend)
    shuffled = torch.randperm(ROWS * COLUMNS, generator=torch.Generator().manual_seed(0))
    moved = factors[head.rows].flatten(0, 1)[shuffled].unflatten(0, (ROWS, COLUMNS))
    rows = shuffled.argsort().view(ROWS, COLUMNS)
    found = head.run(
        {**factors, head.rows: moved}, **inputs, row_index=rows, params=params, backend=backend
    )
    back = found[1][head.rows].flatten(0, 1)[rows]
    close((found[0], {**found[1], head.rows: back}), (expected[0].loss.detach(), expected[1]))


@both_heads
def test_advantages_mean_what_is_said_where_sizes_coincide(backend, head):
    # Two sequences of 2 and 0 tokens, and two tokens.
    batch = make_batch(head, [2, 0])
    given = {"token_ids": batch.token_ids, "old_logprobs": None, "advantages": [1.0, -1.0]}
    given |= {"cu_seqlens": [0, 2, 2], "backend": backend}

    def loss(**changes: Any) -> float:
        return float(head.run(batch.factors, **given | changes)[0].loss.detach())

    with pytest.raises(ValueError, match="level='sequence' or level='token'"):
        loss()
    assert loss(level="token") == 0.0
    assert loss(level="sequence") == -0.5
    assert loss(params=LossParams.preset("gspo")) == -0.5
    assert loss(cu_seqlens=[0, 1, 2]) == 0.0


@both_heads
def test_token_weights_name_what_replaced_them(head):
    batch = make_batch(head, LENGTHS)
    with pytest.raises(TypeError, match=r"mask= .* and policy_weights="):
        head.op(**batch.factors, **batch.tokens, token_weights=torch.ones(14))


@both_heads
def test_data_may_be_made_under_inference_mode(backend, head):
    batch, params = make_batch(head, LENGTHS), params_of("grpo", beta=0.3)
    expected = head.run(batch.factors, **batch.tokens, params=params, backend=backend)
    with torch.inference_mode():
        data = {k: x.clone() for k, x in batch.tokens.items()}
    found = head.run(batch.factors, **data, params=params, backend=backend)
    assert torch.equal(found[0].loss, expected[0].loss)
    assert all(torch.equal(found[1][k], x) for k, x in expected[1].items())
