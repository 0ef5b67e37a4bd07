"""What trainers hand to the sampler corrections: padded tokens, gaps of any size, micro-batches."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

import lvrpo
from lvrpo import Rejection, SamplerCorrectionParams
from lvrpo.sampler_correction import SAMPLER_CORRECTION_PRESETS

INF, NAN = math.inf, math.nan
PARAMS = {name: SamplerCorrectionParams.preset(name) for name in SAMPLER_CORRECTION_PRESETS} | {
    "geometric mean": SamplerCorrectionParams(weight="seq_mean", low=0.9, high=INF),
    "no bound": SamplerCorrectionParams(high=INF),
    "no bound of a product": SamplerCorrectionParams(weight="seq_sum", high=INF, normalize=True),
    "rejections": SamplerCorrectionParams(
        weight="none",
        reject=(Rejection("k3", "token", high=0.2), Rejection("k2", "seq_mean", high=0.3)),
    ),
    "normalised": SamplerCorrectionParams(normalize=True, outside="zero"),
}
BOUNDLESS = ("no bound", "no bound of a product", "geometric mean", "seq_mask_tis")


def fields_of(stats: Any) -> dict[str, float]:
    return {f.name: float(getattr(stats, f.name)) for f in dataclasses.fields(stats)}


def unread(function: Callable[..., Any]) -> Callable[..., Any]:
    """In a graph, where no value is read and none refused."""
    torch._dynamo.reset()
    return torch.compile(function, fullgraph=True, backend="aot_eager")


def padded(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    old = -torch.rand(4, 7, dtype=torch.float64) - 0.1
    sampler = old + 0.3 * torch.randn(4, 7, dtype=torch.float64)
    sampler[1, 2] = NAN
    mask = torch.arange(7) < torch.tensor([7, 3, 0, 5])[:, None]
    mask[0, 3] = False
    return old.to(dtype), sampler.to(dtype), mask


# ---------------------------------------------------------------------------------- statistics


def test_what_the_sampler_did_not_score_is_in_no_statistic():
    old = torch.tensor([0.0, -1.0, -2.0, -3.0])
    sampler = torch.tensor([-1.0, NAN, NAN, NAN])
    stats = fields_of(lvrpo.sampler_weights(old, sampler, [0, 4]).stats)
    assert stats["gap"] == stats["gap_max"] == 1.0
    assert stats["kl"] == pytest.approx(math.e - 2, rel=1e-6)
    for name in ("ratio_mean", "ratio_min", "ratio_max"):
        assert stats[name] == pytest.approx(math.e, rel=1e-6)
    assert (stats["compared_tokens"], stats["active_tokens"]) == (1.0, 4.0)


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 2**31), share=st.floats(0, 1))
def test_statistics_are_those_of_the_scored_tokens_alone(seed, share):
    torch.manual_seed(seed)
    old = -torch.rand(20, dtype=torch.float64)
    sampler = old + 0.5 * torch.randn(20, dtype=torch.float64)
    scored = torch.rand(20) < share
    stats = fields_of(lvrpo.sampler_weights(old, sampler.where(scored, NAN), [0, 9, 20]).stats)
    gaps = (old - sampler)[scored].tolist()
    ratios = [math.exp(d) for d in gaps] or [0.0]
    n = max(len(gaps), 1)
    expected = {
        "gap": sum(abs(d) for d in gaps) / n,
        "gap_max": max((abs(d) for d in gaps), default=0.0),
        "kl": sum(math.exp(d) - 1 - d for d in gaps) / n,
        "ratio_mean": sum(ratios) / n,
        "ratio_min": min(ratios),
        "ratio_max": max(ratios),
        "compared_tokens": len(gaps),
        "active_tokens": 20,
    }
    for name, value in expected.items():
        assert stats[name] == pytest.approx(value, rel=1e-9, abs=1e-12), name


# ------------------------------------------------------------------------------- gaps of any size


GAPS = [0.0, 20.0, -20.0, 87.0, -87.0, 89.0, -89.0, 200.0, -200.0, 9999.0, -9999.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("gap", GAPS)
@pytest.mark.parametrize("name", PARAMS)
def test_a_gap_of_any_size_is_finite(name, gap, dtype):
    """One such token among others, and sequences of nothing else."""
    params = PARAMS[name]
    old = torch.tensor([-1.0, -2.0, -0.5, -1.5, -0.7], dtype=dtype)
    sampler = old.clone()
    sampler[1] -= gap
    sampler[3:] -= gap
    weights, stats = lvrpo.sampler_weights(old, sampler, [0, 3, 5], params=params)
    assert bool(weights.isfinite().all())
    assert all(math.isfinite(x) for x in fields_of(stats).values()), stats
    assert float(stats.gap_max) == pytest.approx(abs(gap), rel=1e-3)
    if name in BOUNDLESS:
        assert float(weights.max()) <= math.exp(20.001)
    if name == "no bound":
        expected = math.exp(min(float((old - sampler)[1]), 20.0))
        assert float(weights[1]) == pytest.approx(expected, rel=1e-3, abs=1e-30)


def test_decisions_are_of_the_gap_as_it_is():
    """A bound below e^-20 is not reached by what saturates at e^20, and k3 falls with a gap."""
    old, sampler = torch.tensor([-50.0, -25.0, 0.0]), torch.zeros(3)
    veto = SamplerCorrectionParams(reject=(Rejection("ratio", "token", low=1e-15),))
    assert lvrpo.sampler_weights(old, sampler, [0, 3], params=veto).weights[0] == 0
    k3 = SamplerCorrectionParams(weight="none", reject=(Rejection("k3", "token", high=30.0),))
    weights = lvrpo.sampler_weights(old, sampler, [0, 3], params=k3).weights
    assert weights.tolist() == [0.0, 1.0, 1.0]


# ---------------------------------------------------------------------- what nobody could refuse


@pytest.mark.parametrize("params", PARAMS.values(), ids=PARAMS.keys())
def test_a_bad_log_prob_is_refused_or_masked(params):
    old, sampler, mask = padded()
    at = torch.zeros_like(mask)
    at[0, 1] = at[3, 0] = True

    def call(old_logprobs: Tensor, sampler_logprobs: Tensor, mask: Tensor) -> Any:
        return lvrpo.sampler_weights(old_logprobs, sampler_logprobs, mask=mask, params=params)

    expected, of_masked = call(old, sampler, mask & ~at)
    graph = unread(call)
    for name, bad in (
        ("sampler_logprobs", INF),
        ("sampler_logprobs", -INF),
        ("old_logprobs", INF),
        ("old_logprobs", -INF),
        ("old_logprobs", NAN),
    ):
        given = {"old_logprobs": old, "sampler_logprobs": sampler}
        given[name] = given[name].masked_fill(at, bad)
        with pytest.raises(ValueError, match=rf"{name}\[0, 1\] is {bad}"):
            call(**given, mask=mask)
        weights, stats = graph(**given, mask=mask)
        torch.testing.assert_close(weights, expected)
        for field, value in fields_of(of_masked).items():
            assert float(getattr(stats, field)) == pytest.approx(value, rel=1e-6, abs=1e-7), field


@pytest.mark.parametrize("bad", [INF, -INF, NAN])
def test_a_bad_advantage_or_entropy_is_refused_or_masked(bad):
    old, sampler, mask = padded()
    advantages = torch.tensor([1.0, bad, -1.0, -1.0])

    def opsm(advantages: Tensor) -> Tensor:
        return lvrpo.off_policy_sequence_mask(old, sampler, advantages, threshold=0.01, mask=mask)

    with pytest.raises(ValueError, match="advantages"):
        opsm(advantages)
    ours = unread(opsm)(advantages)
    assert (ours[1] == 0).all()
    rest = torch.tensor([0, 2, 3])
    assert torch.equal(ours[rest], opsm(advantages.nan_to_num(0.0, 0.0, 0.0))[rest])

    entropy = torch.rand(4, 7)
    entropy[0, 0] = bad

    def top(entropy: Tensor) -> Tensor:
        return lvrpo.top_entropy_mask(entropy, fraction=0.3, mask=mask)

    with pytest.raises(ValueError, match=r"entropy\[0, 0\]"):
        top(entropy)
    without = mask.clone()
    without[0, 0] = False
    expected = lvrpo.top_entropy_mask(entropy, fraction=0.3, mask=without)
    assert torch.equal(unread(top)(entropy), expected)


# -------------------------------------------------------------------------------- types and shapes


def every_helper(old, sampler, advantages, mask, cu_seqlens=None) -> list[Tensor]:
    opsm = lvrpo.off_policy_sequence_mask
    return [
        *(
            lvrpo.sampler_weights(old, sampler, cu_seqlens, mask=mask, params=params).weights
            for params in PARAMS.values()
        ),
        opsm(old, sampler, advantages, cu_seqlens, threshold=0.05, mask=mask),
        lvrpo.top_entropy_mask(old, fraction=0.4, mask=mask),
    ]


ADVANTAGES = [1.0, -1.0, -0.5, -2.0]
OFFSETS = [0, 7, 14, 21, 28]
FORMS = {
    "packed, int64 offsets": (lambda x: x.reshape(-1), torch.tensor(OFFSETS)),
    "packed, int32 offsets": (lambda x: x.reshape(-1), torch.tensor(OFFSETS, dtype=torch.int32)),
    "packed, a list of offsets": (lambda x: x.reshape(-1), OFFSETS),
    "packed lists": (lambda x: x.reshape(-1).tolist(), OFFSETS),
    "padded lists": (lambda x: x.tolist(), None),
    "padded, made under inference_mode": (lambda x: x, None),
}


@pytest.mark.parametrize("mask_dtype", [torch.bool, torch.int64, torch.int32, torch.float32])
@pytest.mark.parametrize(("form", "offsets"), FORMS.values(), ids=FORMS.keys())
def test_every_form_of_the_same_tokens(form, offsets, mask_dtype):
    with torch.inference_mode("inference" in str(form)):
        old, sampler, mask = padded()
        advantages = torch.tensor(ADVANTAGES)
    expected = every_helper(old, sampler, advantages, mask)
    assert all(x.shape == (4, 7) for x in expected)
    ours = every_helper(form(old), form(sampler), ADVANTAGES, form(mask.to(mask_dtype)), offsets)
    for x, y in zip(ours, expected, strict=True):
        assert torch.equal(torch.as_tensor(form(y)), x)


def test_tensors_made_under_inference_mode():
    with torch.inference_mode():
        old, sampler, mask = padded()
        advantages = torch.tensor(ADVANTAGES)
    for factors in every_helper(old, sampler, advantages, mask):
        logprobs = torch.zeros(4, 7, requires_grad=True)
        (logprobs * factors).sum().backward()
        assert torch.equal(logprobs.grad, factors)


def test_lists_of_integers_and_of_none():
    ours = lvrpo.sampler_weights([[0, -1], [-2, -1]], [[0, None], [-1, -1]]).weights
    torch.testing.assert_close(ours, torch.tensor([[1.0, 1.0], [math.exp(-1), 1.0]]))


@pytest.mark.parametrize("form", ["[B]", "[B, 1]", "tokens"])
@pytest.mark.parametrize("packed", [False, True])
def test_advantages_per_sequence_or_token(form, packed):
    """The formula of the paper on padded tensors, as TRL has it for [B, 1] and [B, C]."""
    old, sampler, mask = padded(torch.float64)
    advantages = torch.tensor(ADVANTAGES, dtype=torch.float64)[:, None]
    if form == "tokens":
        advantages = advantages.expand(4, 7).clone()
        advantages[3, 1] = 0.5  # its own sign counts
    drift = ((sampler - old).nan_to_num() * mask).sum(1, keepdim=True)
    drift = drift / mask.sum(1, keepdim=True).clamp(min=1)
    expected = mask & ~((advantages < 0) & (drift > 0.02))
    given = advantages[:, 0] if form == "[B]" else advantages
    arguments = [old, sampler, given]
    if packed:
        arguments = [old.reshape(-1), sampler.reshape(-1), given, torch.tensor(OFFSETS)]
        if form == "tokens":
            arguments[2] = given.reshape(-1)
    shaped = mask.reshape(arguments[0].shape)
    ours = lvrpo.off_policy_sequence_mask(*arguments, threshold=0.02, mask=shaped)
    assert torch.equal(ours.reshape(4, 7), expected.double())
    assert 0 < int(expected.sum()) < int(mask.sum())


def test_advantages_that_may_be_either():
    """As many tokens as sequences, not one in each: no shape of one dimension says which."""
    old, sampler = torch.tensor([-1.0, -1.0]), torch.tensor([0.0, 0.0])
    opsm = lvrpo.off_policy_sequence_mask
    with pytest.raises(ValueError, match=r"which is \[B\] and \[T\]; give \[B, 1\]"):
        opsm(old, sampler, torch.tensor([1.0, -1.0]), [0, 2, 2], threshold=0.1)
    ours = opsm(old, sampler, torch.tensor([[1.0], [-1.0]]), [0, 2, 2], threshold=0.1)
    assert ours.tolist() == [1.0, 1.0]
    ours = opsm(old, sampler, torch.tensor([1.0, -1.0]), [0, 1, 2], threshold=0.1)
    assert ours.tolist() == [1.0, 0.0]


# --------------------------------------------------------------------------------- micro-batches


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 2**31),
    fraction=st.floats(0, 1),
    cuts=st.lists(st.integers(0, 40), max_size=6),
    dtype=st.sampled_from((torch.float32, torch.float64, torch.bfloat16)),
    as_number=st.booleans(),
)
def test_a_threshold_of_the_whole_picks_the_same_tokens_in_any_parts(
    seed, fraction, cuts, dtype, as_number
):
    torch.manual_seed(seed)
    entropy, mask = torch.rand(40).to(dtype), torch.rand(40) < 0.8
    whole = lvrpo.top_entropy_mask(entropy, fraction=fraction, mask=mask)
    threshold = lvrpo.top_entropy_threshold(entropy, fraction=fraction, mask=mask)
    if as_number:
        threshold = float(threshold)
    bounds = sorted({0, 40, *cuts})
    parts = [
        lvrpo.top_entropy_mask(entropy[a:b], threshold=threshold, mask=mask[a:b])
        for a, b in itertools.pairwise(bounds)
    ]
    assert torch.equal(torch.cat(parts), whole)
    if mask.any():
        quantile = torch.quantile(entropy.double()[mask], 1 - fraction)
        assert float(threshold) == pytest.approx(float(quantile), rel=1e-5)


def test_a_fraction_of_0_keeps_the_largest():
    entropy = torch.tensor([[0.1, 0.9], [0.9, 0.3]])
    assert lvrpo.top_entropy_mask(entropy, fraction=0).tolist() == [[0.0, 1.0], [1.0, 0.0]]
    assert float(lvrpo.top_entropy_threshold(torch.zeros(0), fraction=0.5)) == INF
    assert lvrpo.top_entropy_mask(torch.zeros(0), threshold=0.5).shape == (0,)


def normalised_as_verl(
    log_ratio: Tensor, mask: Tensor, kept: Tensor, level: str, low: float, high: float, zero: bool
) -> Tensor:
    """rollout_is_batch_normalize of verl 0.9: the mean is of bounded weights before rejection."""
    if level == "sequence":
        log_ratio = (log_ratio * mask).sum(1, keepdim=True).expand_as(log_ratio)
    weights = log_ratio.clamp(-20, 20).exp() * mask
    weights = weights * ((weights >= low) & (weights <= high)) if zero else weights.clamp(max=high)
    if level == "token":
        mean = (weights * mask).sum() / mask.sum()
    else:
        counts = mask.sum(1)
        by_sequence = (weights * mask).sum(1) / counts.clamp(min=1)
        mean = by_sequence[counts > 0].mean()
    return weights / mean * kept


@pytest.mark.parametrize("zero", [False, True], ids=["truncate", "zero"])
@pytest.mark.parametrize("rejects", [False, True])
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_normalising_is_verls(level, rejects, zero):
    old, sampler, mask = padded(torch.float64)
    gap = (old - sampler).nan_to_num()
    low, high = (0.7, 1.4) if zero else (0.0, 1.4)
    kept = mask & (gap.square() / 2 <= 0.03) if rejects else mask
    params = SamplerCorrectionParams(
        weight="token" if level == "token" else "seq_sum",
        low=low,
        high=high,
        outside="zero" if zero else "truncate",
        reject=(Rejection("k2", "token", high=0.03),) if rejects else (),
        normalize=True,
    )
    ours = lvrpo.sampler_weights(old, sampler, mask=mask, params=params).weights
    expected = normalised_as_verl(gap, mask, kept, level, low, high, zero)
    torch.testing.assert_close(ours, expected)
    assert expected.max() > 0


# --------------------------------------------------------------------------------------- graphs


def with_number(**change: Any) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda old, sampler: (
        lvrpo.sampler_weights(old, sampler, params=SamplerCorrectionParams(**change)).weights
    )


NUMBERS: dict[str, Callable[[float], Callable[[Tensor, Tensor], Tensor]]] = {
    "low": lambda x: with_number(low=0.6 + x),
    "high": lambda x: with_number(high=1 + x),
    "low and high, zeroed": lambda x: with_number(low=x, high=1 + x, outside="zero"),
    "high of a rejection": lambda x: with_number(reject=(Rejection("k2", "token", high=x),)),
    "low of a rejection": lambda x: with_number(
        reject=(Rejection("ratio", "seq_any", low=0.4 + x),)
    ),
    "threshold": lambda x: (
        lambda old, sampler: lvrpo.off_policy_sequence_mask(
            old, sampler, [1.0, -1.0, -1.0, -1.0], threshold=x
        )
    ),
    "fraction": lambda x: lambda old, sampler: lvrpo.top_entropy_mask(old, fraction=x),
    "threshold of entropy": lambda x: (
        lambda old, sampler: lvrpo.top_entropy_mask(-old, threshold=x)
    ),
}


@pytest.mark.parametrize("number", NUMBERS)
def test_a_number_is_not_a_constant_of_a_graph(number):
    old, sampler, _ = padded()

    def function(x: float) -> Tensor:
        return NUMBERS[number](x)(old, sampler)

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    graph = torch.compile(function, fullgraph=True, backend=counter)
    values = [0.02 + 0.05 * i for i in range(12)]
    results = [graph(x) for x in values]
    assert counter.frame_count <= 2
    for x, result in zip(values, results, strict=True):
        assert torch.equal(result, function(x))
    assert len({tuple(result.flatten().tolist()) for result in results}) > 1
