"""logits_grpo_loss and linear_grpo_loss against the published losses, written in plain PyTorch.

Finite where the loss is; what is left out may hold anything; what nobody may read counts nowhere.
"""

from __future__ import annotations

import functools
import itertools
import math
from typing import Any

import pytest
import torch
from fused_inputs import VOCAB, Batch, Head, both_heads, make_batch, offsets, params_of
from plain_losses import softmax_terms
from torch import Tensor

from lvrpo import backends
from lvrpo.params.policy_loss import LOSS_PRESETS, FusedPolicyLoss, LossParams
from lvrpo.testing import check_against_plain

pytestmark = pytest.mark.usefixtures("poison_empty")

LENGTHS = [3, 0, 6, 1, 4]
#: Log-ratios at and past every limit; next to 20, on which rounding would decide.
FAR = [0.0, 19.9, -19.9, 20.1, -20.1, 87.0, -87.0, 89.0, -89.0, 200.0, -200.0, 9999.0, -9999.0]
NEAR = [0.03125, -0.0625]
KLS: dict[str, dict[str, Any]] = {
    "no KL": {},
    "k1 times ratio": {"beta": 0.5, "kl": "k1", "kl_factor": "ratio"},
    "k2 times constant ratio": {"beta": 0.5, "kl": "k2", "kl_factor": "detached_ratio"},
    "k3": {"beta": 0.5},
    "k3 times ratio": {"beta": 0.5, "kl_factor": "ratio"},
    "k3, gradient of k2": {"beta": 0.5, "kl_gradient": "k2"},
    "abs": {"beta": 0.5, "kl": "abs"},
    "k3 times the sequence's ratio": {"beta": 0.5, "kl_factor": "sequence_ratio"},
}
FORMS = [
    *itertools.product(LOSS_PRESETS, ("no KL", "k3 times ratio")),
    *itertools.product(("grpo", "gspo"), KLS),
]


def same(ours: dict[str, Tensor], gold: dict[str, Tensor]) -> None:
    """Gradients, each by its own size."""
    for name, expected in gold.items():
        scale = expected.abs().amax().clamp(min=1.0)
        torch.testing.assert_close(ours[name] / scale, expected / scale)


def are_finite(result: FusedPolicyLoss, gradients: dict[str, Tensor]) -> bool:
    numbers = *result.metrics.as_dict().values(), result.loss.detach()
    return all(bool(x.isfinite().all()) for x in (*numbers, *gradients.values()))


def widened(inputs: dict[str, Any]) -> dict[str, Any]:
    return {
        name: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x
        for name, x in inputs.items()
    }


def far_batch(head: Head, dtype: torch.dtype, every: int) -> tuple[dict[str, Tensor], dict]:
    """A sequence for each distance, sign of the advantage, and share of its tokens that is far."""
    cases = list(itertools.product(FAR, (-1.0, 0.0, 1.0), (False, True)))[::every]
    gaps = [gap for d, _, whole in cases for gap in ([d] * 3 if whole else [d, *NEAR])]
    gap = torch.tensor(gaps).double()
    logits = torch.randn(len(gap), VOCAB).double()
    token_ids = torch.arange(len(gap)) % VOCAB
    # A log-ratio far below 0 is that of a token that has become improbable.
    logits[torch.arange(len(gap)), token_ids] += gap.clamp(max=0.0)
    factors = {name: x.to(dtype) for name, x in head.factors(logits).items()}
    wide = {name: x.double() for name, x in factors.items()}
    logp, _ = softmax_terms(head.logits(wide), token_ids)
    return factors, {
        "token_ids": token_ids,
        "lengths": [3] * len(cases),
        "old": (logp - gap).to(dtype),
        "advantages": torch.tensor([a for _, a, _ in cases]).to(dtype).repeat_interleave(3),
        "ref": (logp + gap / 2 + 0.125).to(dtype),
    }


@functools.cache  # the same for every backend
def far_expected(head: Head, params: LossParams, dtype: torch.dtype, every: int) -> tuple[Any, ...]:
    """`far_batch`, and what plain PyTorch says in fp64 and in `dtype`."""
    torch.manual_seed(0)
    factors, given = far_batch(head, dtype, every)
    gold = head.plain(widened(factors), **widened(given), params=params)
    return factors, given, gold, head.plain(factors, **given, params=params)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize(("name", "kl"), dict.fromkeys(FORMS))
@both_heads
def test_far_from_the_old_policy_loss_and_gradients_are_finite_and_right(
    backend, head, name, kl, dtype
):
    every = 13 if backends.triton_interprets() else 1
    params = params_of(name, entropy_coef=0.01, **KLS[kl])
    factors, given, gold, plain = far_expected(head, params, dtype, every)
    result, gradients = head.run(
        factors,
        token_ids=given["token_ids"],
        old_logprobs=given["old"],
        advantages=given["advantages"][::3],
        cu_seqlens=offsets(given["lengths"]),
        ref_logprobs=given["ref"],
        params=params,
        backend=backend,
    )
    assert are_finite(result, gradients)
    if dtype == torch.float64:
        same({"loss": result.loss.detach(), **gradients}, {"loss": gold[0], **gold[1]})
        return
    pairs = {"loss": (result.loss.detach(), gold[0], plain[0])}
    pairs |= {k: (x, gold[1][k], plain[1][k]) for k, x in gradients.items()}
    sizes = {key: float(exact.abs().amax().clamp(min=1.0)) for key, (_, exact, _) in pairs.items()}
    # Ratios that nothing bounds cancel in the loss, between advantages of both signs.
    sizes["loss"] = max(sizes.values())
    for key, (ours, exact, rounded) in pairs.items():
        # e^d has the rounding of d, which is a difference of numbers as large as the logits.
        scale = 64 * sizes[key]
        check_against_plain(ours, exact, rounded, scale=scale, name=key)


GARBAGE = (math.nan, math.inf, -math.inf, 1e38, -1e38)
#: All that a token adds to a loss: no term of it may come from a token that is left out.
TERMS: dict[str, Any] = {"beta": 0.3, "entropy_coef": 0.1}


def as_if_deleted(
    head: Head,
    found: tuple[FusedPolicyLoss, dict[str, Tensor]],
    batch: Batch,
    kept: Tensor,
    params: LossParams,
) -> None:
    """The result is that of the tokens `kept` alone."""
    result, gradients = found
    given = {name: x for name, x in batch.plainly.items() if name not in ("lengths", "mask")}
    loss, expected = head.plain(
        head.where(batch.factors, kept),
        **{name: x[kept] for name, x in given.items()},
        lengths=[int(part.sum()) for part in kept.split(batch.lengths)],
        params=params,
    )
    rows = gradients[head.rows]
    assert (rows[~kept] == 0).all()
    assert are_finite(result, gradients)
    torch.testing.assert_close(result.loss.detach(), loss)
    same({**gradients, head.rows: rows[kept]}, expected)


def hold_anything(backend: str, head: Head, batch: Batch, params: LossParams, called: Head) -> None:
    """Masked and ignored tokens may hold all that is no number in all that is given for them."""
    mask, lengths = batch.inputs["mask"], torch.tensor(batch.lengths)
    inputs = dict(batch.inputs)
    if not params.needs_sequence_advantages:
        inputs["advantages"] = inputs["advantages"].repeat_interleave(lengths)
    for value, by_id in itertools.product(GARBAGE, (False, True)):
        given = {
            name: torch.where(mask, x, value) if len(x) == len(mask) else x
            for name, x in inputs.items()
            if name != "mask"
        }
        rows = torch.where(mask[:, None], batch.factors[head.rows], value)
        found = called.run(
            {**batch.factors, head.rows: rows},
            **given,
            cu_seqlens=offsets(batch.lengths),
            token_ids=torch.where(mask, batch.token_ids, -100) if by_id else batch.token_ids,
            mask=None if by_id else mask,
            params=params,
            backend=backend,
        )
        as_if_deleted(head, found, batch, mask, params)
        assert (found[0].logprobs[~mask] == 0).all()
        assert (found[0].entropy[~mask] == 0).all()


@pytest.mark.parametrize("name", LOSS_PRESETS)
@both_heads
def test_tokens_that_are_left_out_may_hold_anything(backend, head, name):
    hold_anything(backend, head, make_batch(head, LENGTHS), params_of(name, **TERMS), head)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["grpo", "gspo"])
@both_heads
def test_tokens_that_are_left_out_may_hold_anything_unread(backend, head, name):
    batch = make_batch(head, LENGTHS)
    hold_anything(backend, head, batch, params_of(name, **TERMS), head.unread())


@both_heads
def test_rows_that_no_token_has_may_hold_anything(backend, head):
    batch, params = make_batch(head, LENGTHS), params_of("grpo", **TERMS)
    rows = torch.randperm(20, generator=torch.Generator().manual_seed(0))[:14]
    expected = head.run(batch.factors, **batch.tokens, params=params, backend=backend)
    for value in GARBAGE:
        wide = torch.full((20, batch.factors[head.rows].shape[1]), value).double()
        wide[rows] = batch.factors[head.rows]
        result, gradients = head.run(
            {**batch.factors, head.rows: wide},
            **batch.tokens,
            row_index=rows.int(),
            params=params,
            backend=backend,
        )
        torch.testing.assert_close(result.loss, expected[0].loss)
        of_rows = gradients.pop(head.rows)
        same({**gradients, head.rows: of_rows[rows]}, expected[1])
        assert of_rows.isfinite().all()


ZEROS = {
    "int": 0,
    "float": 0.0,
    "int64": torch.tensor(0),
    "int32": torch.tensor(0, dtype=torch.int32),
    "fp32": torch.tensor(0.0),
    "one element": torch.zeros(1),
}


def nothing_counts(backend: str, head: Head, name: str, zero: str, mask: Tensor) -> None:
    batch = make_batch(head, LENGTHS)
    result, gradients = head.run(
        batch.factors,
        **batch.tokens | {"mask": mask},
        denominator=ZEROS[zero],
        params=params_of(name, **TERMS),
        backend=backend,
    )
    assert float(result.loss.detach()) == float(result.metrics.policy_loss) == 0.0
    assert all((gradient == 0).all() for gradient in gradients.values())


@pytest.mark.parametrize("zero", ZEROS)
@pytest.mark.parametrize("name", ["dapo", "grpo", "gspo"])
@both_heads
def test_a_count_of_zero_is_no_loss(backend, head, name, zero):
    nothing_counts(backend, head, name, zero, torch.zeros(14, dtype=torch.bool))


@pytest.mark.parametrize("zero", ["int", "int64"])
@both_heads
def test_a_count_of_zero_is_no_loss_unread(backend, head, zero):
    called = head.unread()
    nothing_counts(backend, called, "dapo", zero, torch.zeros(14, dtype=torch.bool))
    # Nobody could say that this is a mistake.
    nothing_counts(backend, called, "dapo", zero, torch.ones(14, dtype=torch.bool))


@pytest.mark.parametrize("zero", ZEROS)
@both_heads
def test_a_count_of_zero_for_tokens_that_are_there_is_refused(backend, head, zero):
    with pytest.raises(ValueError, match=r"denominator is 0(\.0)?, but 14 tokens are active"):
        nothing_counts(backend, head, "dapo", zero, torch.ones(14, dtype=torch.bool))


#: Name of an input, what is in it at the first token of the second sequence, and its dtype.
BROKEN: dict[str, tuple[str, float]] = {
    "old": ("old_logprobs", -math.inf),
    "old that nobody reported": ("old_logprobs", math.nan),
    "reference": ("ref_logprobs", math.nan),
    "advantage": ("advantages", math.nan),
    "infinite advantage": ("advantages", math.inf),
    "weight": ("policy_weights", math.nan),
    "negative weight": ("policy_weights", -1.0),
    "infinite weight": ("policy_weights", math.inf),
    "row": ("rows", math.nan),
    "infinite row": ("rows", math.inf),
    "id": ("token_ids", VOCAB),
    "negative id": ("token_ids", -7),
    "row index": ("row_index", 14),
    "negative row index": ("row_index", -1),
}


def with_broken(head: Head, batch: Batch, what: str) -> tuple[dict[str, Any], Tensor]:
    """Arguments with something in them that is refused where it is read, and what can be kept."""
    name, value = BROKEN[what]
    inputs = {**batch.tokens, "rows": batch.factors[head.rows]}
    if name == "row_index":
        inputs[name] = torch.arange(len(batch.token_ids))
    whole = name == "advantages"
    inputs[name] = inputs[name].clone()
    inputs[name][2 if whole else 4] = value
    kept = batch.inputs["mask"].clone()
    at = slice(3, 9) if whole else slice(4, 5)
    kept[at] = False
    if whole:  # but for tokens that a policy weight of 0 lets do without
        kept[at] = batch.inputs["mask"][at] & (batch.inputs["policy_weights"][at] == 0)
    return inputs, kept


@pytest.mark.parametrize("what", BROKEN)
@both_heads
def test_the_host_refuses_what_is_no_number(backend, head, what):
    batch = make_batch(head, LENGTHS)
    batch.inputs["mask"][4] = True
    inputs, _ = with_broken(head, batch, what)
    factors = {**batch.factors, head.rows: inputs.pop("rows")}
    name = rf"(row|logprobs)\W*4|{'' if BROKEN[what][0] == 'rows' else BROKEN[what][0]}\[[24]\] is"
    with pytest.raises(ValueError, match=name):
        head.run(factors, **inputs, params=params_of("grpo", **TERMS), backend=backend)


@pytest.mark.parametrize("name", ["dapo", "gspo"])
@both_heads
def test_what_the_host_refuses_does_not_count_unread(backend, head, name):
    batch, params, called = make_batch(head, LENGTHS), params_of(name, **TERMS), head.unread()
    batch.inputs["mask"][4] = True
    for what in BROKEN:
        inputs, kept = with_broken(head, batch, what)
        factors = {**batch.factors, head.rows: inputs.pop("rows")}
        found = called.run(factors, **inputs, params=params, backend=backend)
        as_if_deleted(head, found, batch, kept, params)
        dropped = int(batch.inputs["mask"].sum() - kept.sum())
        assert int(found[0].metrics.dropped_tokens) == dropped > 0, what
