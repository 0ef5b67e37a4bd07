from __future__ import annotations

import math

import pytest
import torch
from loss_inputs import INF, make_inputs

from lvrpo.dtypes import numbers_by_name
from lvrpo.ops.grpo_loss import LOSS_PRESETS, LossParams, grpo_loss
from lvrpo.params.policy_loss import LOSS_CHOICES, LOSS_NUMBERS

NAN_AT_1 = torch.tensor([0.0, math.nan])
BAD = {
    "padded with offsets": (
        {"logprobs": torch.zeros(1, 2)},
        r"cu_seqlens is given, but logprobs has shape \(1, 2\), a sequence a row",
    ),
    "packed without offsets": (
        {"cu_seqlens": None},
        r"cu_seqlens is None, but logprobs has shape \(2,\); packed tokens",
    ),
    "three-dimensional": ({"logprobs": torch.zeros(1, 2, 1)}, r"logprobs has shape \(1, 2, 1\)"),
    "integer log-probs": ({"logprobs": torch.zeros(2).long()}, "logprobs is torch.int64"),
    "old too short": ({"old_logprobs": torch.zeros(1)}, r"old_logprobs has shape \(1,\)"),
    "advantages neither [B] nor [T]": (
        {"advantages": torch.zeros(3)},
        r"advantages has shape \(3,\), expected \[B\] = \[1\] or \[T\] = \[2\]",
    ),
    "no advantages": ({"advantages": None}, r"advantages has shape \(\), expected \[B\] = \[1\]"),
    "advantage NaN": ({"advantages": NAN_AT_1}, r"advantages\[1\] is nan"),
    "offsets end early": ({"cu_seqlens": torch.tensor([0, 1])}, "cu_seqlens ends at 1, expected 2"),
    "float offsets": ({"cu_seqlens": torch.tensor([0.0, 2.0])}, "cu_seqlens is torch.float32"),
    "offsets of words": ({"cu_seqlens": "ab"}, "cu_seqlens is a str that no tensor can be made of"),
    "mask of another shape": ({"mask": torch.ones(3)}, r"mask has shape \(3,\), expected \[2\]"),
    "negative mask": ({"mask": torch.tensor([1, -1])}, r"mask\[1\] is -1, expected 0, or a number"),
    "mask NaN": ({"mask": NAN_AT_1}, r"mask\[1\] is nan"),
    "level of nothing": ({"level": "word"}, "level is 'word', expected 'token' or 'sequence'"),
    "level that does not fit": (
        {"level": "token"},
        r"advantages has shape \(1,\), expected \[T\] = \[2\]",
    ),
    "level that nobody said": (
        {"advantages": torch.ones(2), "cu_seqlens": torch.tensor([0, 2, 2])},
        r"advantages has shape \(2,\), which is \[B\] and \[T\]; say which with level=",
    ),
    "overflow without a limit": (
        {
            "logprobs": torch.zeros(2),
            "old_logprobs": torch.tensor([-200.0, 0.0]),
            "advantages": -torch.ones(1),
            "params": LossParams(log_ratio_limit=None),
        },
        "the loss is inf, from finite inputs; params.log_ratio_limit is None",
    ),
    "beta without reference": ({"params": LossParams(beta=0.1)}, "ref_logprobs is None, but beta"),
    "entropy bonus without entropy": (
        {"params": LossParams(entropy_coef=0.1)},
        "entropy is None, but entropy_coef is 0.1",
    ),
    "negative weight": (
        {"policy_weights": torch.tensor([1.0, -1.0])},
        r"policy_weights\[1\] is -1",
    ),
    "infinite weight": (
        {"policy_weights": torch.tensor([INF, 1.0])},
        r"policy_weights\[0\] is inf",
    ),
    "denominator zero": ({"denominator": 0.0}, "denominator is 0.0, but 2 tokens are active"),
    "denominator tensor zero": ({"denominator": torch.tensor(0)}, "denominator is 0.0"),
    "negative denominator": ({"denominator": -1}, "denominator is -1"),
    "denominator NaN": ({"denominator": torch.tensor(math.nan)}, "denominator is nan"),
    "denominator vector": ({"denominator": torch.ones(2)}, r"denominator has shape \(2,\)"),
    "log-prob NaN": ({"logprobs": NAN_AT_1}, r"logprobs\[1\] is nan"),
    "log-prob -inf": ({"logprobs": torch.tensor([-INF, 0.0])}, r"logprobs\[0\] is -inf"),
    "old log-prob NaN": ({"old_logprobs": NAN_AT_1}, r"old_logprobs\[1\] is nan"),
    "reference NaN": (
        {"ref_logprobs": NAN_AT_1, "params": LossParams(beta=0.1)},
        r"ref_logprobs\[1\] is nan",
    ),
    "entropy NaN": ({"entropy": NAN_AT_1}, r"entropy\[1\] is nan"),
    "advantages per token for a sequence": (
        {"advantages": torch.zeros(2), "params": LossParams(ratio="seq_mean")},
        r"advantages has shape \(2,\), but ratio 'seq_mean' takes one per sequence, \[1\]",
    ),
    "unknown backend": ({"backend": "cudnn"}, "backend is 'cudnn'"),
}


@pytest.mark.parametrize(("change", "message"), BAD.values(), ids=BAD.keys())
def test_bad_input(backend, change, message, monkeypatch):
    monkeypatch.setenv("LVRPO_CHECK", "1")  # also on a GPU
    change = {
        k: x.to(torch.zeros(0).device) if torch.is_tensor(x) else x for k, x in change.items()
    }
    arguments = {
        "logprobs": torch.zeros(2),
        "old_logprobs": None,
        "advantages": torch.ones(1),
        "cu_seqlens": torch.tensor([0, 2]),
        "backend": backend,
    }
    with pytest.raises(ValueError, match=message):
        grpo_loss(**arguments | change)


BAD_PARAMS = {
    "ratio": ({"ratio": "word"}, "ratio is 'word', expected one of none, token, seq_mean"),
    "kl": ({"kl": "k4"}, "kl is 'k4'"),
    "aggregation": ({"aggregation": "sum"}, "aggregation is 'sum'"),
    "clip_low": ({"clip_low": -0.1}, "clip_low is -0.1"),
    "beta": ({"beta": -1.0}, "beta is -1.0"),
    "entropy_coef": ({"entropy_coef": INF}, "entropy_coef is inf"),
    "clip_high": ({"clip_high": -0.1}, "clip_high is -0.1, expected >= 0$"),
    "negative weight": (
        {"surrogate": "detached", "clip_low": INF, "clip_high": -1.1},
        'clip_high is -1.1, expected >= -1 for surrogate "detached"',
    ),
    "weight between crossed bounds": (
        {"surrogate": "detached", "clip_low": 0.2, "clip_high": -0.3},
        r"clip_high is -0.3, expected >= -0.2 for surrogate \"detached\" and this clip_low",
    ),
    "cap of nothing": ({"ratio_cap": 0.0}, "ratio_cap is 0.0, expected > 0"),
    "cap without ratio": (
        {"ratio_cap": 3.0, "ratio": "none"},
        'ratio_cap is 3.0, but ratio is "none"',
    ),
    "cap of a gate": (
        {"surrogate": "sigmoid", "ratio_cap": 3.0},
        "ratio_cap is 3.0, but surrogate is 'sigmoid'",
    ),
    "cap of a trust region": (
        {"surrogate": "binary_kl", "ratio_cap": 0.0},
        "ratio_cap is 0.0, expected > 0",
    ),
    "surrogate": ({"surrogate": "ppo"}, "surrogate is 'ppo', expected one of clip"),
    "cispo of a sum": (
        {"surrogate": "detached", "ratio": "seq_sum"},
        "ratio is 'seq_sum', but surrogate 'detached' is defined for token, seq_mean",
    ),
    "vespo of a token": (
        {"surrogate": "gamma"},
        "ratio is 'token'.*'gamma' is defined for seq_sum",
    ),
    "gmpo of a token": ({"surrogate": "log_clip"}, "ratio is 'token'.*defined for seq_mean"),
    "gate": ({"gate_pos": 0.0}, "gate_pos is 0.0"),
    "gamma": ({"gamma_neg": (1.0, -1.0)}, r"gamma_neg is \(1.0, -1.0\)"),
    "kl_factor": ({"kl_factor": "rho"}, "kl_factor is 'rho'"),
    "kl_gradient": ({"kl_gradient": "k1"}, "kl_gradient is 'k1'"),
    "log_ratio_limit": ({"log_ratio_limit": 0.0}, "log_ratio_limit is 0.0"),
    "kl_limit": ({"kl_limit": -1.0}, "kl_limit is -1.0"),
    "kl_log_ratio_limit": ({"kl_log_ratio_limit": 0.0}, "kl_log_ratio_limit is 0.0"),
    "no max_length": ({"aggregation": "seq_mean_token_sum_norm"}, "max_length is None"),
    "max_length unused": ({"max_length": 8}, "max_length is 8, but aggregation"),
}


@pytest.mark.parametrize(("change", "message"), BAD_PARAMS.values(), ids=BAD_PARAMS.keys())
def test_bad_params(change, message):
    with pytest.raises(ValueError, match=message):
        LossParams(**change)


@pytest.mark.parametrize("name", LOSS_CHOICES)
def test_the_op_refuses_a_choice_that_does_not_exist(name):
    choices = dict.fromkeys(LOSS_CHOICES, 0) | {name: 9}
    token, none = torch.zeros(1), [None] * 4
    numbers = numbers_by_name(LOSS_NUMBERS, LossParams().numbers())
    with pytest.raises(RuntimeError, match=f"{name} is 9"):
        torch.ops.lvrpo.grpo_loss_fwd(
            *(token, None, token, torch.tensor([0, 1]), *none, numbers, False),
            count_empty=True,
            **choices,
        )


def test_the_weights_that_were_also_a_mask_name_their_successors():
    with pytest.raises(TypeError, match=r"token_weights is gone; give mask=.*and policy_weights="):
        grpo_loss(torch.zeros(1), None, [1.0], [0, 1], token_weights=torch.ones(1))


@pytest.mark.parametrize("kl_factor", ["none", "ratio", "sequence_ratio"])
def test_a_reference_for_the_metric_alone_does_not_reach_the_loss(backend, kl_factor):
    logprobs = torch.tensor([-100.0, -1.0], requires_grad=True)
    loss, metrics = grpo_loss(
        logprobs,
        None,
        torch.ones(1),
        torch.tensor([0, 2]),
        ref_logprobs=torch.tensor([-1.0, -1.0]),
        params=LossParams(kl_factor=kl_factor),
        backend=backend,
    )
    loss.backward()
    assert float(loss.detach()) == -1.0
    assert float(metrics.kl) == pytest.approx((math.exp(20) - 21) / 2)
    assert logprobs.grad.tolist() == [-0.5, -0.5]


def test_the_result_unpacks_like_that_of_the_flow_loss(backend):
    loss, metrics = grpo_loss(
        torch.zeros(2), None, torch.ones(1), torch.tensor([0, 2]), backend=backend
    )
    assert float(loss) == float(metrics.policy_loss) == -1.0


def test_unknown_preset():
    with pytest.raises(ValueError, match="preset is 'ppo2', expected one of grpo"):
        LossParams.preset("ppo2")


def test_which_presets_see_whole_sequences():
    length = {"dr_grpo": {"max_length": 8}}
    presets = {name: LossParams.preset(name, **length.get(name, {})) for name in LOSS_PRESETS}
    whole = {name for name, params in presets.items() if params.sequence_level}
    assert whole == {"gspo", "gspo_token", "luspo", "gmpo", "rloo", "vespo"}


@pytest.mark.parametrize("name", ["sapo", "cispo", "dppo_tv", "dppo_kl", "vespo"])
@pytest.mark.parametrize("gap", [-90.0, 90.0])
def test_a_ratio_past_the_range_of_floats_is_harmless(backend, name, gap):
    logprobs = torch.tensor([-1.0, min(gap, 0.0)], requires_grad=True)
    old = torch.tensor([-1.0, min(-gap, 0.0)])
    loss, _ = grpo_loss(
        logprobs,
        old,
        torch.ones(2),
        torch.tensor([0, 1, 2]),
        params=LossParams.preset(name),
        backend=backend,
    )
    loss.backward()
    assert logprobs.grad.isfinite().all()
    assert loss.isfinite()


@pytest.mark.parametrize("preset", LOSS_PRESETS)
def test_what_kernels_take_as_it_is_gives_what_is_converted_first(preset):
    length = {"max_length": 4} if preset == "dr_grpo" else {}
    params = LossParams.preset(preset, beta=0.1, entropy_coef=0.01, **length)
    data = make_inputs((3, 0, 4), dtype=torch.float32)
    data |= {"entropy": -data["logprobs"], "mask": torch.arange(7) != 2}

    def told(**changes):
        given = data | changes
        leaves = [given[name].detach().requires_grad_() for name in ("logprobs", "entropy")]
        given |= {"logprobs": leaves[0], "entropy": leaves[1], "params": params}
        loss, metrics = grpo_loss(**given)
        loss.backward()
        with torch.no_grad():
            assert torch.equal(grpo_loss(**given).loss, loss)
        return [loss.detach(), metrics.sums, metrics.extremes, *(leaf.grad for leaf in leaves)]

    for changes in (
        {"cu_seqlens": data["cu_seqlens"].int()},
        {"cu_seqlens": data["cu_seqlens"].tolist()},
        {"mask": data["mask"].float()},
        {"level": "sequence"},
        {"advantages": data["advantages"].unsqueeze(1)},
    ):
        for ours, theirs in zip(told(), told(**changes), strict=True):
            assert torch.equal(ours, theirs)
