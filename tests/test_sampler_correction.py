"""Sampler-mismatch corrections against formulas written per sequence, in plain Python."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import lvrpo
from lvrpo import Rejection, SamplerCorrectionParams
from lvrpo.testing import check_against_plain

INF, NAN = math.inf, math.nan
LENGTHS = [5, 0, 1, 9, 3, 0]
PARAMS = {
    **{name: SamplerCorrectionParams.preset(name) for name in ("tis", "icepop", "veto")},
    "seq_mask_tis": SamplerCorrectionParams.preset(
        "seq_mask_tis", reject=(Rejection("ratio", "seq_mean", low=0.8, high=1.2),)
    ),
    "sequence_truncate": SamplerCorrectionParams.preset("sequence_truncate", low=0.5, high=1.5),
    "sequence_mask": SamplerCorrectionParams.preset("sequence_mask", high=1.5),
    "geometric mean": SamplerCorrectionParams(weight="seq_mean", low=0.9, high=1.1),
    "token, normalised": SamplerCorrectionParams(normalize=True),
    "token, normalised before a rejection": SamplerCorrectionParams(
        normalize=True, reject=(Rejection("k2", "seq_any", high=0.2),)
    ),
    "sequence mask, normalised": SamplerCorrectionParams(
        weight="seq_sum", high=1.5, outside="zero", normalize=True
    ),
    "chain": SamplerCorrectionParams(
        reject=(Rejection("k3", "token", high=0.2), Rejection("k2", "seq_mean", high=0.3))
    ),
    **{
        f"{statistic} {level}": SamplerCorrectionParams(
            weight="none", reject=(Rejection(statistic, level, low=low, high=high),)
        )
        for statistic, low, high in (("ratio", 0.7, 1.4), ("k2", 0.0, 0.15), ("k3", 0.0, 0.15))
        for level in ("token", "seq_sum", "seq_mean", "seq_any")
    },
}


def make_inputs(lengths, dtype=torch.float32, spread=0.4):
    tokens = sum(lengths)
    old = -torch.rand(tokens, dtype=torch.float64) * 3 - 0.1
    return {
        "old_logprobs": old.to(dtype),
        "sampler_logprobs": (old + spread * torch.randn(tokens)).to(dtype),
        "cu_seqlens": torch.tensor([0, *lengths]).cumsum(0),
        "mask": torch.arange(tokens) % 4 != 1,
    }


def keeps(rejection, gaps):
    """Whether each token of one sequence stays, from its o - u."""
    k = {
        "ratio": lambda d: d,
        "k2": lambda d: d * d / 2,
        "k3": lambda d: math.exp(d) - 1 - d,
    }[rejection.statistic]
    final = math.exp if rejection.statistic == "ratio" else float
    stats = [k(d) for d in gaps]
    if rejection.level == "seq_sum":
        stats = [sum(stats)] * len(stats)
    elif rejection.level == "seq_mean":
        stats = [sum(stats) / len(stats)] * len(stats)
    stays = [rejection.low <= final(x) <= rejection.high for x in stats]
    return [all(stays)] * len(stays) if rejection.level == "seq_any" else stays


def bound(ratio, params):
    if params.weight == "none":
        return 1.0
    if params.outside == "truncate":
        return min(max(ratio, params.low), params.high)
    return ratio if params.low <= ratio <= params.high else 0.0


def expected_weights(inputs, params):
    old, sampler = inputs["old_logprobs"].double(), inputs["sampler_logprobs"].double()
    weights, means, sequences = [0.0] * len(old), [], []
    for begin, end in zip(inputs["cu_seqlens"][:-1], inputs["cu_seqlens"][1:], strict=True):
        tokens = [t for t in range(int(begin), int(end)) if inputs["mask"][t]]
        gaps = [float(old[t] - sampler[t]) for t in tokens]
        if not tokens:
            continue
        own = {
            "none": [0.0] * len(gaps),
            "token": gaps,
            "seq_sum": [sum(gaps)] * len(gaps),
            "seq_mean": [sum(gaps) / len(gaps)] * len(gaps),
        }[params.weight]
        stays = [all(v) for v in zip(*(keeps(r, gaps) for r in params.reject), strict=True)]
        bounded = [bound(math.exp(d), params) for d in own]
        means += bounded
        sequences.append(sum(bounded) / len(bounded))
        for t, weight, stay in zip(tokens, bounded, stays or [True] * len(gaps), strict=True):
            weights[t] = weight if stay else 0.0
    if params.weight in ("seq_sum", "seq_mean"):
        means = sequences
    if params.normalize and means and sum(means) / len(means) > 1e-8:
        weights = [w * len(means) / sum(means) for w in weights]
    return torch.tensor(weights, dtype=torch.float64)


def assert_follows_formula(inputs, params):
    ours = lvrpo.sampler_weights(**inputs, params=params).weights
    gold = expected_weights(inputs, params)
    # The exponent of a product adds up differences of log-probs of order 1 to 3.
    size = 4.0 * max(len(ours), 1) ** 0.5
    scale = gold.abs() * size if ours.dtype == torch.float32 else gold.abs() * 10 * size
    check_against_plain(ours, gold, gold.to(ours.dtype), scale=scale)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("params", PARAMS.values(), ids=PARAMS.keys())
def test_weights_follow_the_formula(params, dtype):
    inputs = make_inputs(LENGTHS, dtype)
    assert_follows_formula(inputs, params)
    weights = lvrpo.sampler_weights(**inputs, params=params).weights
    assert weights.dtype == dtype
    assert len(weights.unique()) > 1, "the case tells tokens apart"


@settings(deadline=None, max_examples=40)
@given(
    lengths=st.lists(st.integers(0, 7), max_size=8),
    name=st.sampled_from(list(PARAMS)),
    seed=st.integers(0, 2**31),
)
def test_ragged_offsets(lengths, name, seed):
    torch.manual_seed(seed)
    assert_follows_formula(make_inputs(lengths), PARAMS[name])


def trl_weights(old, sampler, mask, mode, low, high):
    """TRL's correction on padded [B, L] tensors, as its documentation defines it."""
    gap = (old - sampler) * mask
    if mode.startswith("sequence"):
        gap = gap.sum(dim=1, keepdim=True)
    ratio = gap.exp()
    if mode.endswith("truncate"):
        return ratio.clamp(min=low, max=high).expand_as(old)
    outside = (ratio < (-INF if low is None else low)) | (ratio > high)
    return ratio.masked_fill(outside, 0.0).expand_as(old)


@pytest.mark.parametrize("low", [None, 0.8])
@pytest.mark.parametrize(
    "mode", ["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"]
)
def test_the_four_modes_of_trl(mode, low):
    rows, length = 6, 11
    old = -torch.rand(rows, length, dtype=torch.float64)
    sampler = old + 0.5 * torch.randn(rows, length)
    mask = torch.arange(length) < torch.tensor([11, 3, 0, 7, 1, 9])[:, None]
    theirs = trl_weights(old, sampler, mask, mode, low, 3.0)[mask]
    packed = {"old_logprobs": old[mask], "sampler_logprobs": sampler[mask]}
    cu_seqlens = torch.cat([torch.zeros(1, dtype=torch.int64), mask.sum(1).cumsum(0)])
    params = SamplerCorrectionParams.preset(mode, low=low or 0.0)
    ours = lvrpo.sampler_weights(**packed, cu_seqlens=cu_seqlens, params=params).weights
    check_against_plain(ours, theirs, theirs, scale=100.0)
    assert torch.equal(ours == 0, theirs == 0)
    if mode.startswith("token"):
        assert torch.equal(ours, theirs)


def test_a_ratio_at_a_bound_stays():
    inputs = {"old_logprobs": torch.zeros(2), "cu_seqlens": torch.tensor([0, 2])}
    params = SamplerCorrectionParams(
        low=1.0, high=1.0, outside="zero", reject=(Rejection("ratio", "token", low=1.0, high=1.0),)
    )
    result = lvrpo.sampler_weights(**inputs, sampler_logprobs=torch.zeros(2), params=params)
    assert result.weights.tolist() == [1.0, 1.0]


def test_a_product_that_overflows_is_bounded():
    inputs = {"old_logprobs": torch.zeros(4), "cu_seqlens": torch.tensor([0, 2, 4])}
    sampler = torch.tensor([-400.0, -600.0, 400.0, 600.0])
    for mode, expected in (("sequence_truncate", 3.0), ("sequence_mask", 0.0)):
        params = SamplerCorrectionParams.preset(mode)
        result = lvrpo.sampler_weights(**inputs, sampler_logprobs=sampler, params=params)
        assert result.weights.tolist() == [expected, expected, 0.0, 0.0]


@pytest.mark.parametrize("params", PARAMS.values(), ids=PARAMS.keys())
def test_masked_tokens_may_hold_anything(params):
    inputs = make_inputs(LENGTHS)
    clean = lvrpo.sampler_weights(**inputs, params=params)
    poisoned = {
        name: torch.where(inputs["mask"], inputs[name], bad)
        for name, bad in (("old_logprobs", NAN), ("sampler_logprobs", -INF))
    }
    result = lvrpo.sampler_weights(**inputs | poisoned, params=params)
    assert torch.equal(result.weights, clean.weights)
    assert (result.weights[~inputs["mask"]] == 0).all()
    for field in dataclasses.fields(result.stats):
        assert torch.equal(getattr(result.stats, field.name), getattr(clean.stats, field.name))


def test_a_token_that_the_sampler_did_not_score_counts_as_no_mismatch():
    inputs = make_inputs(LENGTHS)
    unscored = torch.arange(len(inputs["mask"])) % 5 == 0
    gone = torch.where(unscored, NAN, inputs["sampler_logprobs"])
    same = torch.where(unscored, inputs["old_logprobs"], inputs["sampler_logprobs"])
    for params in PARAMS.values():
        ours = lvrpo.sampler_weights(**inputs | {"sampler_logprobs": gone}, params=params)
        expected = lvrpo.sampler_weights(**inputs | {"sampler_logprobs": same}, params=params)
        assert torch.equal(ours.weights, expected.weights)


def test_statistics():
    inputs = make_inputs(LENGTHS, torch.float64)
    params = SamplerCorrectionParams(
        low=0.8, high=1.2, reject=(Rejection("k2", "token", high=0.1),)
    )
    weights, stats = lvrpo.sampler_weights(**inputs, params=params)
    gap = (inputs["old_logprobs"] - inputs["sampler_logprobs"])[inputs["mask"]]
    ratio, rejected = gap.exp(), gap.square() / 2 > 0.1
    moved = ((ratio < 0.8) | (ratio > 1.2)) & ~rejected
    active = weights[inputs["mask"]]
    expected = {
        "gap": gap.abs().mean(),
        "gap_max": gap.abs().max(),
        "kl": (ratio - 1 - gap).mean(),
        "ratio_mean": ratio.mean(),
        "ratio_min": ratio.min(),
        "ratio_max": ratio.max(),
        "truncated": moved.double().mean(),
        "dropped": rejected.double().mean(),
        "effective_sample_size": active.sum() ** 2 / active.square().sum() / len(active),
        "active_tokens": torch.tensor(float(len(active)), dtype=torch.float64),
        "compared_tokens": torch.tensor(float(len(active)), dtype=torch.float64),
    }
    assert expected.keys() == {field.name for field in dataclasses.fields(stats)}
    assert 0 < expected["truncated"] < 1
    assert 0 < expected["dropped"] < 1
    for name, value in expected.items():
        check_against_plain(getattr(stats, name), value, value, scale=1 + value.abs(), name=name)


@pytest.mark.parametrize("lengths", [[], [0, 0], [3, 2]], ids=str)
def test_nothing_to_correct(lengths):
    inputs = make_inputs(lengths) | {"mask": torch.zeros(sum(lengths), dtype=torch.bool)}
    for params in PARAMS.values():
        weights, stats = lvrpo.sampler_weights(**inputs, params=params)
        assert weights.tolist() == [0.0] * sum(lengths)
        values = [float(getattr(stats, field.name)) for field in dataclasses.fields(stats)]
        assert values == [0.0] * len(values)


def test_off_policy_sequences():
    inputs = make_inputs([4, 4, 4, 0, 2])
    advantages = torch.tensor([-1.0, 1.0, -1.0, -1.0, -1.0])
    sampler = inputs["old_logprobs"] + torch.tensor([0.5] * 8 + [0.1] * 4 + [0.3] * 2)
    # One large gap inside the mask, and one outside that must not count.
    sampler[8] += 0.1
    sampler[9] = NAN
    mask = torch.arange(14) != 9
    keep = lvrpo.off_policy_sequence_mask(
        inputs["old_logprobs"],
        sampler,
        advantages,
        inputs["cu_seqlens"],
        threshold=0.2,
        mask=mask,
    )
    assert keep.tolist() == [0.0] * 4 + [1.0] * 4 + [1.0, 0.0, 1.0, 1.0] + [0.0] * 2


@pytest.mark.parametrize("fraction", [0.0, 0.2, 0.25, 0.5, 0.999, 1.0])
@pytest.mark.parametrize("tokens", [1, 2, 20, 77])
def test_top_entropy_is_a_quantile_of_the_active_tokens(tokens, fraction):
    entropy = torch.rand(tokens, dtype=torch.float64)
    mask = torch.arange(tokens) % 3 != 1
    threshold = torch.quantile(entropy[mask], 1 - fraction)
    expected = mask & (entropy >= threshold)
    poisoned = torch.where(mask, entropy, NAN)
    ours = lvrpo.top_entropy_mask(poisoned, fraction=fraction, mask=mask)
    assert torch.equal(ours, expected.double())


def test_top_entropy_of_nothing():
    none = torch.zeros(3, dtype=torch.bool)
    assert lvrpo.top_entropy_mask(torch.zeros(0), fraction=0.5).shape == (0,)
    assert lvrpo.top_entropy_mask(torch.zeros(3), fraction=0.5, mask=none).tolist() == [0.0] * 3


def test_no_gradient_flows():
    inputs = make_inputs(LENGTHS)
    inputs["old_logprobs"].requires_grad_()
    result = lvrpo.sampler_weights(**inputs)
    assert not result.weights.requires_grad
    assert not result.stats.kl.requires_grad


#: Every weight, statistic and level; compiling takes its time.
COMPILED = (
    *("icepop", "chain", "sequence mask, normalised", "geometric mean"),
    *("k3 seq_any", "ratio seq_sum", "k2 seq_mean"),
)


def test_everything_compiles():
    inputs = make_inputs(LENGTHS)
    advantages = torch.randn(len(LENGTHS))

    def everything(old_logprobs, sampler_logprobs, cu_seqlens, mask):
        outputs = [
            lvrpo.sampler_weights(
                old_logprobs, sampler_logprobs, cu_seqlens, mask=mask, params=params
            ).weights
            for params in (PARAMS[name] for name in COMPILED)
        ]
        outputs.append(lvrpo.top_entropy_mask(-old_logprobs, fraction=0.3, mask=mask))
        opsm = lvrpo.off_policy_sequence_mask
        outputs.append(
            opsm(old_logprobs, sampler_logprobs, advantages, cu_seqlens, threshold=0.1, mask=mask)
        )
        return outputs

    compiled = torch.compile(everything, fullgraph=True, backend="aot_eager")
    for ours, expected in zip(compiled(**inputs), everything(**inputs), strict=True):
        assert torch.equal(ours, expected)


def test_narrow_log_probs_are_computed_wide():
    inputs = make_inputs(LENGTHS, torch.bfloat16)
    wide = {k: x.float() if x.is_floating_point() else x for k, x in inputs.items()}
    narrow = lvrpo.sampler_weights(**inputs).weights
    assert torch.equal(narrow, lvrpo.sampler_weights(**wide).weights)


def test_the_weights_fit_grpo_loss():
    inputs = make_inputs(LENGTHS)
    weights = lvrpo.sampler_weights(**inputs).weights
    old, cu_seqlens = inputs["old_logprobs"], inputs["cu_seqlens"]
    advantages = torch.randn(len(LENGTHS))
    params = lvrpo.LossParams.preset("bnpo")
    by = {"mask": inputs["mask"], "params": params}
    whole = lvrpo.grpo_loss(old, None, advantages, cu_seqlens, policy_weights=weights, **by)
    tokens = advantages.repeat_interleave(cu_seqlens.diff()) * weights
    folded = lvrpo.grpo_loss(old, None, tokens, cu_seqlens, **by)
    check_against_plain(whole.loss, folded.loss.double(), folded.loss, scale=1.0)


BAD_PARAMS = {
    "weight is 'seq'": {"weight": "seq"},
    "outside is 'drop'": {"outside": "drop"},
    "low is -0.5": {"low": -0.5},
    "low is nan": {"low": NAN},
    "high is 0.5": {"low": 0.9, "high": 0.5},
    "high is nan": {"high": NAN},
    "reject is [": {"reject": [Rejection("k2", "token")]},
}


@pytest.mark.parametrize("message", BAD_PARAMS)
def test_bad_params(message):
    with pytest.raises(ValueError, match=message.replace("[", r"\[")):
        SamplerCorrectionParams(**BAD_PARAMS[message])


def test_bad_names():
    with pytest.raises(ValueError, match="preset is 'tiss', expected one of tis, icepop"):
        SamplerCorrectionParams.preset("tiss")
    with pytest.raises(ValueError, match="statistic is 'k1'"):
        Rejection("k1", "token")
    with pytest.raises(ValueError, match="level is 'seq_max'"):
        Rejection("k2", "seq_max")


BAD_INPUTS = {
    r"sampler_logprobs has shape \(3,\), expected \[18\]": {"sampler_logprobs": torch.zeros(3)},
    r"old_logprobs has shape \(6, 3\), a sequence a row": {"old_logprobs": torch.zeros(6, 3)},
    r"old_logprobs has shape \(6, 3, 1\)": {"old_logprobs": torch.zeros(6, 3, 1)},
    "cu_seqlens is None": {"cu_seqlens": None},
    "old_logprobs is torch.int64": {"old_logprobs": torch.zeros(18, dtype=torch.int64)},
    r"mask\[0\] is -1.0, expected 0, or": {"mask": -torch.ones(18)},
    r"mask has shape \(17,\), expected \[18\]": {"mask": torch.ones(17)},
    "cu_seqlens ends at 17, expected 18": {"cu_seqlens": torch.tensor([0, 17])},
    "cu_seqlens decreases from 9 to 8": {"cu_seqlens": torch.tensor([0, 9, 8, 18])},
    r"old_logprobs\[0\] is nan": {"old_logprobs": torch.full((18,), NAN)},
    r"sampler_logprobs\[0\] is -inf": {"sampler_logprobs": torch.full((18,), -INF)},
    "on different devices": {"mask": torch.ones(18, dtype=torch.bool, device="meta")},
}


@pytest.mark.parametrize("message", BAD_INPUTS)
def test_bad_inputs(message):
    inputs = make_inputs(LENGTHS) | BAD_INPUTS[message]
    with pytest.raises(ValueError, match=f"^sampler_weights: .*{message}"):
        lvrpo.sampler_weights(**inputs)


def test_bad_inputs_of_the_masks():
    inputs = make_inputs([2, 1])
    both = (inputs["old_logprobs"], inputs["sampler_logprobs"])
    opsm, offsets = lvrpo.off_policy_sequence_mask, inputs["cu_seqlens"]
    with pytest.raises(
        ValueError, match=r"advantages has shape \(4,\), expected \[2\] or \[2, 1\]"
    ):
        opsm(*both, torch.zeros(4), offsets, threshold=0.1)
    with pytest.raises(ValueError, match=r"advantages, by token\[2\] is nan, expected finite"):
        opsm(*both, torch.tensor([0.0, NAN]), offsets, threshold=0.1)
    with pytest.raises(ValueError, match="threshold is -1"):
        opsm(*both, torch.zeros(2), offsets, threshold=-1)
    with pytest.raises(ValueError, match=r"fraction is 1\.5, expected in"):
        lvrpo.top_entropy_mask(torch.zeros(3), fraction=1.5)
    with pytest.raises(ValueError, match=r"fraction is 0\.5 and threshold is 1\.0, expected one"):
        lvrpo.top_entropy_mask(torch.zeros(3), fraction=0.5, threshold=1.0)
    with pytest.raises(ValueError, match="fraction is None and threshold is None"):
        lvrpo.top_entropy_mask(torch.zeros(3))
    with pytest.raises(ValueError, match="threshold is nan"):
        lvrpo.top_entropy_mask(torch.zeros(3), threshold=NAN)
    with pytest.raises(ValueError, match=r"threshold has shape \(2,\), expected one number"):
        lvrpo.top_entropy_mask(torch.zeros(3), threshold=torch.zeros(2))
    with pytest.raises(ValueError, match=r"entropy\[0\] is inf"):
        lvrpo.top_entropy_mask(torch.full((3,), INF), fraction=0.5)
