"""Clip-Cov and KL-Cov by their published rules, written with loops over the active tokens."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import lvrpo
from lvrpo.params.policy_loss import LossParams

COLUMNS = 7


def batch(seed: int, rows: int = 5) -> dict[str, Tensor]:
    """[rows, C] log-probs of both policies, advantages per token, and a mask with holes."""
    made = torch.Generator().manual_seed(seed)

    def normal() -> Tensor:
        return torch.randn(rows, COLUMNS, generator=made).double()

    old = -3 * normal().abs()
    return {
        "logprobs": (old + 0.2 * normal()).clamp(max=0.0),
        "old_logprobs": old,
        "advantages": normal(),
        "mask": torch.rand(rows, COLUMNS, generator=made) < 0.7,
    }


def covariances(x: dict[str, Tensor]) -> dict[tuple[int, int], float]:
    """By token that the mask lets in."""
    at = [(int(i), int(j)) for i, j in x["mask"].nonzero()]
    mean_a, mean_l = (
        sum(float(x[name][i]) for i in at) / max(len(at), 1) for name in ("advantages", "logprobs")
    )
    return {
        i: (float(x["advantages"][i]) - mean_a) * (float(x["logprobs"][i]) - mean_l) for i in at
    }


def candidates(x: dict[str, Tensor], low: float, high: float) -> set[tuple[int, int]]:
    """The tokens whose gradient the default clip leaves, of a covariance between these."""
    found = set()
    for i, covariance in covariances(x).items():
        ratio = math.exp(float(x["logprobs"][i] - x["old_logprobs"][i]))
        a = float(x["advantages"][i])
        clipped = -a * min(max(ratio, 0.8), 1.2) > -a * ratio
        if low < covariance < high and not clipped:
            found.add(i)
    return found


def zeros_of(weights: Tensor, mask: Tensor) -> set[tuple[int, int]]:
    return {(int(i), int(j)) for i, j in (mask & (weights == 0)).nonzero()}


@given(seed=st.integers(0, 10**6), rows=st.integers(1, 6), fraction=st.floats(0, 1))
@settings(max_examples=25, deadline=None)
def test_kl_cov_holds_the_tokens_of_the_largest_covariance(seed, rows, fraction):
    x = batch(seed, rows)
    found = covariances(x)
    count = max(1, int(len(found) * fraction))
    held = sorted(found, key=lambda i: -found[i])[:count]
    expected = x["logprobs"].clone()
    for i in held:
        expected[i] = x["old_logprobs"][i]
    assert torch.equal(lvrpo.kl_cov_reference(**x, fraction=fraction), expected)


@given(seed=st.integers(0, 10**6), rows=st.integers(1, 6), fraction=st.floats(0, 1))
@settings(max_examples=25, deadline=None)
def test_clip_cov_draws_that_many_of_the_candidates(seed, rows, fraction):
    x = batch(seed, rows)
    among = candidates(x, -0.3, 0.5)
    weights = lvrpo.clip_cov_weights(**x, fraction=fraction, low=-0.3, high=0.5)
    drawn = zeros_of(weights, x["mask"])
    assert drawn <= among
    assert len(drawn) == min(max(1, int(int(x["mask"].sum()) * fraction)), len(among))
    assert (weights[~x["mask"]] == 0).all()
    assert ((weights == 0) | (weights == 1)).all()


def test_clip_cov_draws_any_candidate_and_the_same_with_the_same_generator():
    x = batch(0)
    among = candidates(x, -0.3, 0.5)
    drawn = []
    for seed in (*range(60), 0):
        made = torch.Generator().manual_seed(seed)
        weights = lvrpo.clip_cov_weights(**x, fraction=0.0, low=-0.3, high=0.5, generator=made)
        drawn.append(zeros_of(weights, x["mask"]))
    assert set.union(*drawn) == among
    assert drawn[0] == drawn[-1]


def loss_and_gradient(x: dict[str, Tensor], params: LossParams, **data: Any) -> tuple[Tensor, ...]:
    leaf = x["logprobs"].clone().requires_grad_()
    loss = lvrpo.grpo_loss(
        *(leaf, x["old_logprobs"], x["advantages"]), mask=x["mask"], params=params, **data
    ).loss
    return loss.detach(), torch.autograd.grad(loss, leaf)[0]


def published(x: dict[str, Tensor], term: Any) -> tuple[Tensor, ...]:
    leaf = x["logprobs"].clone().requires_grad_()
    loss = (term(leaf) * x["mask"]).sum() / x["mask"].sum()
    return loss.detach(), torch.autograd.grad(loss, leaf)[0]


def test_the_presets_with_their_data_are_the_published_losses():
    x = batch(1)
    old, a = x["old_logprobs"], x["advantages"]
    weights = lvrpo.clip_cov_weights(**x, fraction=0.2, low=-0.3, high=0.5)
    reference = lvrpo.kl_cov_reference(**x, fraction=0.2)
    held = reference == old

    def clip_cov(logp: Tensor) -> Tensor:
        ratio = (logp - old).exp()
        return -torch.minimum(ratio * a, ratio.clamp(0.8, 1.2) * a) * weights

    def kl_cov(logp: Tensor) -> Tensor:
        return -a * (logp - old).exp() + 0.3 * (logp - old).abs() * held

    def dro(logp: Tensor) -> Tensor:
        return -(logp * a - 0.5 * 0.3 * (logp - old).square())

    preset = LossParams.preset
    for found, term in (
        (loss_and_gradient(x, preset("clip_cov"), policy_weights=weights), clip_cov),
        (loss_and_gradient(x, preset("kl_cov", beta=0.3), ref_logprobs=reference), kl_cov),
        (loss_and_gradient(x, preset("dro", beta=0.3), ref_logprobs=old), dro),
    ):
        torch.testing.assert_close(found, published(x, term))


HELPERS = {
    "clip_cov_weights": lambda **x: lvrpo.clip_cov_weights(**x, fraction=1.0, low=-0.3, high=0.5),
    "kl_cov_reference": lambda **x: lvrpo.kl_cov_reference(**x, fraction=0.3),
}


@pytest.mark.parametrize("name", HELPERS)
def test_packed_tokens_lists_and_whatever_a_mask_leaves_out(name):
    x = batch(2)
    mask = x["mask"]
    expected = HELPERS[name](**x)
    packed = {key: value[mask] for key, value in x.items() if key != "mask"}
    offsets = torch.tensor([0, *mask.sum(1).tolist()]).cumsum(0)
    assert torch.equal(HELPERS[name](**packed, cu_seqlens=offsets), expected[mask])
    lists = {key: value.tolist() for key, value in packed.items() if key != "logprobs"}
    lists["logprobs"] = packed["logprobs"]
    found = HELPERS[name](**lists, cu_seqlens=offsets.tolist())  # lists are of fp32
    assert torch.equal(found.float(), expected[mask].float())
    for garbage in (math.nan, math.inf, -math.inf):
        filled = {key: torch.where(mask, value, garbage) for key, value in x.items()}
        found = HELPERS[name](**filled | {"mask": mask.long()})
        assert torch.equal(found[mask], expected[mask])


@pytest.mark.parametrize("name", HELPERS)
def test_nothing_is_chosen_where_nothing_is_active(name):
    x = batch(3)
    x["mask"] = torch.zeros_like(x["mask"])
    found = HELPERS[name](**x)
    assert torch.equal(found, x["logprobs"] if name == "kl_cov_reference" else torch.zeros(5, 7))


@pytest.mark.parametrize("name", HELPERS)
def test_what_the_host_refuses_is_masked_unread(name):
    x = batch(4)
    x["mask"][1] = True
    kept = x["mask"].clone()
    kept[1, 2] = kept[1, 3] = kept[1, 4] = False
    expected = HELPERS[name](**x | {"mask": kept})
    for key, at in (("logprobs", 2), ("old_logprobs", 3), ("advantages", 4)):
        x[key] = x[key].clone()
        x[key][1, at] = math.nan
        with pytest.raises(ValueError, match=rf"{name}: .*\[1, \d\] is nan"):
            HELPERS[name](**x)
    torch.compiler.reset()
    compiled = torch.compile(HELPERS[name], fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(**x)[kept], expected[kept])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"fraction": 1.5}, "fraction is 1.5, expected in"),
        ({"old_logprobs": torch.zeros(3)}, r"old_logprobs has shape \(3,\)"),
        ({"params": LossParams.preset("cispo")}, "params.surrogate is 'detached', expected 'clip'"),
    ],
)
def test_bad_input(change, message):
    with pytest.raises(ValueError, match=f"clip_cov_weights: {message}"):
        lvrpo.clip_cov_weights(**batch(0) | change)
