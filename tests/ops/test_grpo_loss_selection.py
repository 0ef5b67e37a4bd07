"""Tokens that keep their policy term by entropy or by the sampler, and the bonus with its own mean.

Of grpo_loss and the two ops that form its log-probs, against the rules written in plain PyTorch.
"""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import numpy as np
import plain_losses
import pytest
import torch
from fused_inputs import HEADS, VOCAB, Batch, Head, differentiated, make_batch, params_of
from loss_inputs import reference
from mutants.grpo_loss import SELECTION_MUTANTS
from runnable import WITH_KERNELS
from torch import Tensor

import lvrpo
from lvrpo import backends
from lvrpo.params.policy_loss import LOSS_PRESETS, LossParams
from lvrpo.token_selection import TokenSelection

pytestmark = pytest.mark.usefixtures("poison_empty")

LENGTHS = [3, 0, 6, 1, 4, 7]
TOKENS, ROWS, COLUMNS = sum(LENGTHS), len(LENGTHS), max(LENGTHS)
#: Of the linear head: rows of a chunk, of a sequence longer than that among others.
BUDGET = 3 * VOCAB * 8
THRESHOLD = 0.12


class LogProbs(Head):
    """grpo_loss, whose factors are the log-probs and entropies themselves."""

    def factors(self, logits: Tensor) -> dict[str, Tensor]:
        ids = torch.randint(0, VOCAB, (len(logits),), generator=torch.Generator().manual_seed(5))
        logprobs, entropy = plain_losses.softmax_terms(logits, ids)
        return {"logprobs": logprobs, "entropy": entropy}

    def run(self, factors: Any, **inputs: Any) -> Any:
        return super().run(factors, **{k: x for k, x in inputs.items() if k != "token_ids"})


OPS = {"logprobs": LogProbs(lvrpo.grpo_loss, "logprobs"), **HEADS}
every_op = pytest.mark.parametrize("head", OPS.values(), ids=OPS)


def terms(head: Head, factors: dict[str, Tensor], batch: Batch) -> tuple[Tensor, Tensor]:
    """Log-probs and entropies of the tokens."""
    if isinstance(head, LogProbs):
        return factors["logprobs"], factors["entropy"]
    return plain_losses.softmax_terms(head.logits(factors), batch.token_ids)


def batch_of(head: Head) -> tuple[Batch, Tensor]:
    """Inputs, and log-probs of a sampler from which some sequences are far and some tokens miss."""
    batch, made = make_batch(head, LENGTHS), torch.Generator().manual_seed(11)
    logp = terms(head, batch.factors, batch)[0]
    far = torch.tensor([0.4, 0.0, 0.5, 0.3, 0.1, 0.0]).double()
    apart = far.repeat_interleave(torch.tensor(LENGTHS))
    sampler = logp + apart + 0.15 * torch.randn(TOKENS, generator=made).double()
    old = logp + apart / 2 + 0.2 * torch.randn(TOKENS, generator=made).double()
    batch.inputs["old_logprobs"] = old
    # Of the far sequences one has a positive advantage.
    batch.inputs["advantages"] = torch.tensor([1.2, 0.5, -0.7, -0.9, -0.4, -0.3]).double()
    sampler[torch.arange(TOKENS) % 6 == 2] = torch.nan
    return batch, sampler


def selected(
    logp: Tensor, entropy: Tensor, batch: Batch, sampler: Tensor, options: dict[str, Any]
) -> tuple[Tensor, Tensor]:
    """Which tokens entropy keeps, and which of them all keeps: by the definitions, in a loop."""
    mask, a = batch.plainly["mask"], batch.plainly["advantages"]
    high = mask.clone()
    if "top_entropy" in options:
        most = np.quantile(entropy[mask].numpy(), 1 - options["top_entropy"])
        high &= entropy >= float(most)
    if "entropy_threshold" in options:
        high &= entropy >= float(options["entropy_threshold"])
    kept = high.clone()
    if "off_policy_threshold" in options:
        reported = options.get("sampler_logprobs", batch.inputs["old_logprobs"])
        for at in torch.arange(TOKENS).split(batch.lengths):
            on = at[mask[at]]
            mean = (reported[on] - logp[on]).nan_to_num().sum() / max(len(on), 1)
            if mean > options["off_policy_threshold"]:
                kept[at[a[at] < 0]] = False
    return high, kept


def expected(
    head: Head, batch: Batch, sampler: Tensor, params: LossParams, options: dict[str, Any]
) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and gradients."""
    own = params.entropy_aggregation is not None
    others = dataclasses.replace(params, entropy_coef=0.0) if own else params

    def loss(**leaves: Tensor) -> tuple[Tensor]:
        logp, entropy = terms(head, leaves, batch)
        high, kept = selected(logp.detach(), entropy.detach(), batch, sampler, options)
        given = {k: x for k, x in batch.plainly.items() if k != "token_ids"}
        given["weights"] = given["weights"] * kept
        found = plain_losses.policy_loss(logp, entropy, **given, params=others)
        if own:
            found = found - params.entropy_coef * entropy[high].mean()
        return (found,)

    (found,), gradients = differentiated(loss, batch.factors)
    return found.detach(), gradients


def close(found: Any, wanted: tuple[Tensor, dict[str, Tensor]]) -> None:
    torch.testing.assert_close(found[0].loss.detach(), wanted[0])
    torch.testing.assert_close(found[1], wanted[1])


def chunked(head: Head) -> dict[str, Any]:
    return {"memory_budget": BUDGET} if head.rows == "hidden" else {}


#: By what is asked: arguments, where "sampler_logprobs" True stands for those of the batch.
OPTIONS: dict[str, dict[str, Any]] = {
    "most tokens": {"top_entropy": 0.7},
    "few tokens": {"top_entropy": 0.2},
    "the largest": {"top_entropy": 0.0},
    "all tokens": {"top_entropy": 1.0},
    "threshold": {"entropy_threshold": 1.0},
    "off policy": {"off_policy_threshold": THRESHOLD, "sampler_logprobs": True},
    "off the old policy": {"off_policy_threshold": 0.01},
    "entropy and off policy": {
        "top_entropy": 0.5,
        "off_policy_threshold": THRESHOLD,
        "sampler_logprobs": True,
    },
    "threshold and off policy": {
        "entropy_threshold": torch.tensor(0.9).double(),
        "off_policy_threshold": THRESHOLD,
        "sampler_logprobs": True,
    },
}
BONUSES: dict[str, dict[str, Any]] = {
    "no bonus": {},
    "bonus of the loss": {"entropy_coef": 0.2},
    "bonus with its own mean": {"entropy_coef": 0.2, "entropy_aggregation": "token_mean"},
}


def given_to(options: dict[str, Any], sampler: Tensor) -> dict[str, Any]:
    changes = {"sampler_logprobs": sampler} if "sampler_logprobs" in options else {}
    return options | changes


@pytest.mark.parametrize("bonus", BONUSES)
@pytest.mark.parametrize("name", LOSS_PRESETS)
@every_op
def test_every_loss_drops_what_the_rules_drop(backend, head, name, bonus):
    batch, sampler = batch_of(head)
    every = 4 if backends.triton_interprets() else 1  # whose launches take a second
    asked = list(OPTIONS.values())[::every]
    for options, beta in zip(asked, itertools.cycle([0.0, 0.3]), strict=False):
        given = given_to(options, sampler)
        params = params_of(name, beta=beta, kl_factor="ratio", **BONUSES[bonus])
        found = head.run(
            batch.factors, **batch.tokens, **given, **chunked(head), params=params, backend=backend
        )
        close(found, expected(head, batch, sampler, params, given))


def test_the_rules_drop_some_tokens_and_keep_others():
    batch, sampler = batch_of(OPS["logprobs"])
    logp, entropy = terms(OPS["logprobs"], batch.factors, batch)
    mask = batch.inputs["mask"]
    for name, options in OPTIONS.items():
        high, kept = selected(logp, entropy, batch, sampler, given_to(options, sampler))
        assert name == "all tokens" or 0 < int(kept.sum()) < int(mask.sum())
        assert ("off" in name) == bool((high != kept).any())


@pytest.mark.parametrize("options", OPTIONS)
@every_op
def test_metrics_are_those_of_all_tokens(backend, head, options):
    batch, sampler = batch_of(head)
    params = params_of("grpo", beta=0.3, entropy_coef=0.1)
    plain, chosen = (
        head.run(batch.factors, **batch.tokens, **given, params=params, backend=backend)[0].metrics
        for given in ({}, given_to(OPTIONS[options], sampler))
    )
    without = {"policy_loss": torch.zeros(())}
    torch.testing.assert_close(chosen.as_dict() | without, plain.as_dict() | without)


@pytest.mark.parametrize("options", OPTIONS)
@every_op
def test_advantages_per_token_decide_for_their_tokens(backend, head, options):
    batch, sampler = batch_of(head)
    made = torch.Generator().manual_seed(2)
    batch.inputs["advantages"] = torch.randn(TOKENS, generator=made).double()
    given = given_to(OPTIONS[options], sampler)
    params = params_of("dapo", beta=0.3, **BONUSES["bonus with its own mean"])
    found = head.run(
        batch.factors, **batch.tokens, **given, **chunked(head), params=params, backend=backend
    )
    close(found, expected(head, batch, sampler, params, given))


@pytest.mark.parametrize("options", OPTIONS)
@every_op
def test_padded_tokens_are_packed_ones(backend, head, options):
    batch, sampler = batch_of(head)
    given = given_to(OPTIONS[options], sampler)
    params = params_of("gspo", beta=0.3, **BONUSES["bonus with its own mean"])
    packed = head.run(batch.factors, **batch.tokens, **given, params=params, backend=backend)
    inside = torch.arange(COLUMNS) < torch.tensor(LENGTHS)[:, None]

    def padded(x: Tensor, fill: float = 0) -> Tensor:
        wide = x.new_full((ROWS, COLUMNS, *x.shape[1:]), fill)
        wide[inside] = x
        return wide

    of_tokens = {k: x for k, x in batch.inputs.items() if k not in ("advantages", "mask")}
    nan = float("nan")
    inputs = {k: padded(x, nan) for k, x in of_tokens.items()}
    inputs |= {k: padded(x, nan) for k, x in given.items() if k == "sampler_logprobs"}
    is_wide = {k: k in (head.rows, "entropy") for k in batch.factors}
    found = head.run(
        {k: padded(x) if is_wide[k] else x for k, x in batch.factors.items()},
        token_ids=padded(batch.token_ids),
        mask=padded(batch.inputs["mask"]).long(),
        advantages=batch.inputs["advantages"][:, None],
        **{**given, **inputs},
        params=params,
        backend=backend,
    )
    gradients = {k: x[inside] if is_wide[k] else x for k, x in found[1].items()}
    close((found[0], gradients), (packed[0].loss.detach(), packed[1]))


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("head", HEADS.values(), ids=HEADS)
def test_tokens_that_share_rows(backend, head, options):
    # Rows in another order, and some of them for two tokens.
    batch, sampler = batch_of(head)
    rows = torch.randperm(TOKENS, generator=torch.Generator().manual_seed(3)) // 2 + 4
    shared = Batch(head.where(batch.factors, rows), batch.token_ids, LENGTHS, batch.inputs)
    given = given_to(OPTIONS[options], sampler)
    params = params_of("grpo", beta=0.3, **BONUSES["bonus with its own mean"])
    loss, gradients = expected(head, shared, sampler, params, given)
    of_rows = torch.zeros_like(batch.factors[head.rows]).index_add(0, rows, gradients[head.rows])
    found = head.run(
        batch.factors,
        **batch.tokens,
        **given,
        **chunked(head),
        row_index=rows,
        params=params,
        backend=backend,
    )
    close(found, (loss, {**gradients, head.rows: of_rows}))


@pytest.mark.parametrize("as_denominator", [float, torch.tensor], ids=["number", "tensor"])
@every_op
def test_parts_with_one_threshold_add_up_to_the_whole(backend, head, as_denominator):
    batch, _ = batch_of(head)
    mask, params = batch.inputs["mask"], params_of("dapo", beta=0.3)
    entropy = terms(head, batch.factors, batch)[1]
    # Between two entropies, so that no rounding decides.
    threshold = lvrpo.top_entropy_threshold(entropy, fraction=0.45, mask=mask)
    options = {"params": params, "backend": backend, "denominator": float(mask.sum())}
    whole = head.run(batch.factors, **batch.tokens, **options, top_entropy=0.45)
    options["denominator"] = as_denominator(options["denominator"])
    losses = []
    for parts in (range(3), range(3, ROWS)):
        outside = torch.tensor([i not in parts for i in range(ROWS)])
        outside = outside.repeat_interleave(torch.tensor(LENGTHS))
        tokens = batch.tokens | {"mask": mask & ~outside}
        losses.append(head.run(batch.factors, **tokens, **options, entropy_threshold=threshold))
    loss = losses[0][0].loss + losses[1][0].loss
    gradients = {k: losses[0][1][k] + losses[1][1][k] for k in whole[1]}
    torch.testing.assert_close(loss.detach(), whole[0].loss.detach())
    torch.testing.assert_close(gradients, whole[1])


@every_op
def test_a_denominator_that_is_a_tensor_leaves_the_bonus_its_own(backend, head):
    batch, _ = batch_of(head)
    params = params_of("dapo", beta=0.3, **BONUSES["bonus with its own mean"])
    options = {"params": params, "backend": backend, "top_entropy": 0.5}
    by_number, by_tensor = (
        head.run(batch.factors, **batch.tokens, **options, denominator=count)
        for count in (57.0, torch.tensor(57))
    )
    close(by_tensor, (by_number[0].loss.detach(), by_number[1]))


@pytest.mark.parametrize("what", [*OPTIONS, "no option"])
@every_op
def test_masked_tokens_may_hold_anything(backend, head, what):
    batch, sampler = batch_of(head)
    mask = batch.inputs["mask"]
    given = given_to(OPTIONS.get(what, {}), sampler)
    params = params_of("grpo", beta=0.3, **BONUSES["bonus with its own mean"])
    wanted = head.run(batch.factors, **batch.tokens, **given, params=params, backend=backend)
    for value in (torch.nan, torch.inf, -torch.inf, 1e38):
        spoilt = {k: torch.where(mask, x, value) for k, x in given.items() if k[0] == "s"}
        factors = dict(batch.factors)
        for name in {head.rows, "entropy"} & set(factors):
            on = mask[:, None] if factors[name].dim() == 2 else mask
            factors[name] = torch.where(on, factors[name], value)
        found = head.run(
            factors, **batch.tokens, **{**given, **spoilt}, params=params, backend=backend
        )
        close(found, (wanted[0].loss.detach(), wanted[1]))


@pytest.mark.parametrize("lengths", [[], [0, 0], [2, 3]], ids=str)
@pytest.mark.parametrize("options", OPTIONS)
@every_op
def test_nothing_active_is_no_loss(backend, head, options, lengths):
    batch = make_batch(head, lengths)
    tokens = batch.tokens | {"mask": torch.zeros(sum(lengths), dtype=torch.bool)}
    given = given_to(OPTIONS[options], batch.inputs["old_logprobs"])
    params = params_of("dapo", beta=0.3, **BONUSES["bonus with its own mean"])
    result, gradients = head.run(batch.factors, **tokens, **given, params=params, backend=backend)
    assert float(result.loss.detach()) == 0.0
    assert all((gradient == 0).all() for gradient in gradients.values())


@pytest.mark.parametrize("mutant", SELECTION_MUTANTS.values(), ids=SELECTION_MUTANTS)
def test_the_comparison_rejects_mutants(mutant):
    batch, sampler = batch_of(OPS["logprobs"])
    params = params_of("dapo", beta=0.3, **BONUSES["bonus with its own mean"])
    inputs = {k: x for k, x in batch.tokens.items() if k != "token_ids"} | {"params": params}
    assert int(batch.inputs["mask"].sum()) == 16  # so that thresholds are entropies of tokens

    def compare() -> None:
        for fraction, threshold in itertools.product([0.2, 0.4, 0.8], [0.05, 0.1, 0.2]):
            inputs["selection"] = TokenSelection(fraction, None, threshold, sampler)
            runs = (differentiated(f, batch.factors, **inputs) for f in (reference, mutant))
            wanted, found = ([result[0], gradients] for result, gradients in runs)
            torch.testing.assert_close(found, wanted)

    with pytest.raises(AssertionError):
        compare()


@every_op
def test_on_policy_without_a_sampler_nothing_has_moved(backend, head):
    batch, _ = batch_of(head)
    inputs = batch.tokens | {"old_logprobs": None, "params": params_of("grpo"), "backend": backend}
    wanted = head.run(batch.factors, **inputs)
    found = head.run(batch.factors, **inputs, off_policy_threshold=0.0)
    close(found, (wanted[0].loss.detach(), wanted[1]))


ERRORS: dict[str, tuple[dict[str, Any], str]] = {
    "fraction above 1": ({"top_entropy": 1.5}, r"top_entropy is 1.5, expected in \[0, 1\]"),
    "fraction below 0": ({"top_entropy": -0.1}, r"top_entropy is -0.1, expected in \[0, 1\]"),
    "no fraction": ({"top_entropy": float("nan")}, "top_entropy is nan"),
    "both": (
        {"top_entropy": 0.5, "entropy_threshold": 1.0},
        "top_entropy is 0.5 and entropy_threshold is 1.0, expected one of them",
    ),
    "no threshold": ({"entropy_threshold": float("nan")}, "entropy_threshold is nan"),
    "two thresholds": (
        {"entropy_threshold": torch.zeros(2)},
        r"entropy_threshold has shape \(2,\), expected one number",
    ),
    "negative": ({"off_policy_threshold": -0.1}, "off_policy_threshold is -0.1, expected >= 0"),
    "unused": (
        {"sampler_logprobs": torch.zeros(TOKENS)},
        "sampler_logprobs is given, but off_policy_threshold is None",
    ),
    "shape": (
        {"sampler_logprobs": torch.zeros(TOKENS - 1), "off_policy_threshold": 0.1},
        rf"sampler_logprobs has shape \({TOKENS - 1},\), expected \[{TOKENS}\]",
    ),
    "dtype": (
        {"sampler_logprobs": torch.zeros(TOKENS).long(), "off_policy_threshold": 0.1},
        "sampler_logprobs is torch.int64, expected a floating dtype",
    ),
    "infinite": (
        {"sampler_logprobs": torch.full((TOKENS,), -torch.inf), "off_policy_threshold": 0.1},
        r"sampler_logprobs\[0\] is -inf, expected finite, or NaN for none",
    ),
}


@pytest.mark.parametrize("what", ERRORS)
@every_op
def test_errors(backend, head, what):
    batch, _ = batch_of(head)
    given, message = ERRORS[what]
    with pytest.raises(ValueError, match=message):
        head.run(batch.factors, **batch.tokens, **given, params=params_of("grpo"), backend=backend)


@pytest.mark.parametrize("given", [{"top_entropy": 0.5}, {"entropy_threshold": 1.0}], ids=str)
def test_entropies_are_needed(backend, given):
    batch, _ = batch_of(OPS["logprobs"])
    factors = {"logprobs": batch.factors["logprobs"]}
    with pytest.raises(ValueError, match="entropy is None, but top_entropy is"):
        OPS["logprobs"].run(factors, **batch.tokens, **given, backend=backend)


def test_the_bonus_has_no_other_name():
    with pytest.raises(ValueError, match="entropy_aggregation is 'token_sum', expected one of"):
        LossParams(entropy_aggregation="token_sum")  # type: ignore[arg-type]


@pytest.mark.parametrize("backend", WITH_KERNELS, indirect=True)
@every_op
def test_a_compiled_graph_drops_the_same(backend, head):
    batch, sampler = batch_of(head)
    params = params_of("gspo", beta=0.3, **BONUSES["bonus with its own mean"])
    called = head.unread()
    for options in ("entropy and off policy", "threshold and off policy"):
        given = given_to(OPTIONS[options], sampler) | {"params": params, "backend": backend}
        found, wanted = (op.run(batch.factors, **batch.tokens, **given) for op in (called, head))
        close(found, (wanted[0].loss.detach(), wanted[1]))


@pytest.mark.parametrize("backend", WITH_KERNELS, indirect=True)
@pytest.mark.parametrize("name", ["old_logprobs", "ref_logprobs", "policy_weights", "advantages"])
@every_op
def test_unread_a_token_that_is_no_number_has_no_say(backend, head, name):
    batch, sampler = batch_of(head)
    called, params = head.unread(), params_of("dapo", **BONUSES["bonus with its own mean"])
    made = torch.Generator().manual_seed(2)
    batch.inputs["advantages"] = torch.randn(TOKENS, generator=made).double()
    batch.inputs["policy_weights"].clamp_(min=0.5)
    given = given_to(OPTIONS["entropy and off policy"], sampler)
    given |= {"params": params, "backend": backend}
    entropy = terms(head, batch.factors, batch)[1]
    # The token whose entropy all thresholds depend on.
    at = int(torch.where(batch.inputs["mask"], entropy, 0.0).argmax())
    without = batch.inputs["mask"] & (torch.arange(TOKENS) != at)
    wanted = head.run(batch.factors, **batch.tokens | {"mask": without}, **given)
    broken = batch.inputs[name].clone()
    broken[at] = torch.nan
    found = called.run(batch.factors, **batch.tokens | {name: broken}, **given)
    close(found, (wanted[0].loss.detach(), wanted[1]))
    assert int(found[0].metrics.dropped_tokens) == 1
