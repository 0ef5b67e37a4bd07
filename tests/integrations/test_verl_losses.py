"""Every policy loss that lvrpo registers with verl against verl's own, by value and gradient."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

import lvrpo
from lvrpo.params.from_verl import AGGREGATIONS, KLS, LOSSES, OWN_AGGREGATION, OWN_KL

pytest.importorskip("verl", reason="pip install 'lvrpo[verl]'")
from verl.trainer.ppo import core_algos
from verl.workers.config import ActorConfig, PolicyLossConfig

from lvrpo.integrations import verl as ours

ours.register()

GLOBAL_INFO: list[dict[str, Any]] = [
    {},
    {"dp_size": 2, "batch_num_tokens": 77, "global_batch_size": 9, "loss_scale_factor": 11},
]


def actor(loss: str, mode: str = "token-mean", **options: Any) -> ActorConfig:
    policy = {"loss_mode": loss, "dro_beta": 0.3, "clip_cov_lb": 0.01, "clip_cov_ub": 0.6}
    policy |= {"clip_cov_ratio": 1.0, "kl_cov_ratio": 0.3}
    given = {"clip_ratio_low": 0.2, "clip_ratio_high": 0.3, "tau_neg": 1.3} | options
    return ActorConfig(
        strategy="fsdp",
        rollout_n=4,
        ppo_micro_batch_size_per_gpu=1,
        loss_agg_mode=mode,
        policy_loss=PolicyLossConfig(**policy),
        **given,
    )


def batch(seed: int, spread: float, by_sequence: bool) -> dict[str, Tensor]:
    """Five ragged responses with holes, one of them empty, and one without an advantage."""
    torch.manual_seed(seed)
    shape = (5, 7)
    mask = (torch.rand(shape) < 0.7).long()
    mask[:4, 0], mask[4] = 1, 0
    old = -torch.rand(shape, dtype=torch.float64) * 3
    advantages = torch.randn(shape, dtype=torch.float64)
    if by_sequence:
        advantages = advantages[:, :1].expand(shape).clone()
    advantages[1] = 0.0
    return {
        "old_log_prob": old,
        "log_prob": (old + spread * torch.randn(shape, dtype=torch.float64)).clamp(max=-1e-3),
        "advantages": advantages,
        "response_mask": mask,
    }


def loss_and_gradient(
    name: str, x: dict[str, Tensor], **options: Any
) -> tuple[Tensor, Tensor, dict[str, Any]]:
    log_prob = x["log_prob"].clone().requires_grad_()
    given = x | {"log_prob": log_prob, "advantages": x["advantages"].clone()}
    loss, metrics = core_algos.get_policy_loss_fn(name)(**given, **options)
    loss.backward()
    return loss.detach(), log_prob.grad * x["response_mask"], metrics


def assert_same(found: tuple[Any, ...], expected: tuple[Any, ...]) -> None:
    # verl adds 1e-8 to the lengths of responses.
    assert float(found[0]) == pytest.approx(float(expected[0]), rel=1e-7, abs=1e-8)
    assert found[1].tolist() == [
        pytest.approx(row, rel=1e-7, abs=1e-8) for row in expected[1].tolist()
    ]


#: Losses whose clip fractions are of the tokens that a bound holds. Those of the others count
#: tokens without an advantage too, or on both sides of the clip.
COUNTED = ("vanilla", "cispo", "gspo")


@pytest.mark.parametrize("loss", LOSSES)
def test_a_registered_loss_is_verls(loss):
    cases = itertools.product(AGGREGATIONS, GLOBAL_INFO, (False, True), (0.05, 0.5, 2.0))
    for seed, (mode, info, weighted, spread) in enumerate(cases):
        x = batch(seed, spread, by_sequence=loss == "geo_mean")
        config = actor(loss, mode, loss_scale_factor=info.get("loss_scale_factor"))
        config.global_batch_info.update(info)
        options = {"loss_agg_mode": mode, "config": config}
        if weighted and loss not in OWN_KL:
            options["rollout_is_weights"] = torch.rand(5, 7, dtype=torch.float64) + 0.1
        *found, metrics = loss_and_gradient(f"lvrpo_{loss}", x, **options)
        *expected, counted = loss_and_gradient(loss, x, **options)
        assert_same(found, expected)
        for name in counted if loss in COUNTED else ():
            assert metrics[name] == pytest.approx(counted[name], abs=1e-6), name
        if "actor/ppo_kl" in counted:
            assert metrics["actor/ppo_kl"] == pytest.approx(counted["actor/ppo_kl"], abs=1e-6)


def whole_loss(
    x: dict[str, Tensor], more: dict[str, Tensor], params: lvrpo.LossParams, loss: str
) -> tuple[Tensor, Tensor, Tensor]:
    log_prob = x["log_prob"].clone().requires_grad_()
    entropy = more["entropy"].clone().requires_grad_()
    old, advantages, mask = x["old_log_prob"], x["advantages"], x["response_mask"]
    if loss == "dro":
        more = {"ref_logprobs": old}
    if loss == "geo_mean":
        advantages = advantages[:, 0]
    result = lvrpo.grpo_loss(
        *(log_prob, old, advantages),
        mask=mask,
        ref_logprobs=more["ref_logprobs"],
        entropy=entropy,
        params=params,
    )
    result.loss.backward()
    return result.loss.detach(), log_prob.grad, entropy.grad


def verls_whole_loss(
    x: dict[str, Tensor], more: dict[str, Tensor], config: ActorConfig, loss: str
) -> tuple[Tensor, Tensor, Tensor]:
    log_prob = x["log_prob"].clone().requires_grad_()
    entropy = more["entropy"].clone().requires_grad_()
    mode, mask = config.loss_agg_mode, x["response_mask"]
    total, _ = core_algos.get_policy_loss_fn(loss)(
        **x | {"log_prob": log_prob}, loss_agg_mode=mode, config=config
    )
    total = total - config.entropy_coeff * core_algos.agg_loss(entropy, mask, mode)
    if config.use_kl_loss:
        kld = core_algos.kl_penalty(log_prob, more["ref_logprobs"], config.kl_loss_type)
        total = total + config.kl_loss_coef * core_algos.agg_loss(kld, mask, mode)
    total.backward()
    return total.detach(), log_prob.grad * mask, entropy.grad


#: Losses that `LossParams` says alone, without a choice of tokens.
SAID = [loss for loss in LOSSES if loss not in ("clip_cov", "kl_cov")]


@pytest.mark.parametrize("loss", SAID)
@pytest.mark.parametrize("kl", [None, *KLS, "k1+", "k3+", "abs+"])
def test_from_verl_is_the_whole_loss(loss, kl):
    """With KL and entropy bonus in one call, as verl's `ppo_loss` adds them up."""
    for seed, mode in enumerate(AGGREGATIONS):
        options: dict[str, Any] = {"entropy_coeff": 0.02, "kl_loss_coef": 0.1}
        options |= {} if kl is None else {"use_kl_loss": True, "kl_loss_type": kl}
        config = actor(loss, mode, **options)
        try:
            params = lvrpo.LossParams.from_verl(config, response_length=7)
        except ValueError as error:
            assert_refusal_is_right(str(error), loss, mode, kl)
            continue
        x = batch(seed, 0.5, by_sequence=loss == "geo_mean")
        if loss == "geo_mean":  # verl averages its policy loss over empty responses, too
            x["response_mask"][4, 0] = 1
        more = {
            "ref_logprobs": -torch.rand(5, 7).double() * 3,
            "entropy": torch.rand(5, 7).double(),
        }
        found = whole_loss(x, more, params, loss)
        expected = verls_whole_loss(x, more, config, loss)
        assert_same(found, expected)


def assert_refusal_is_right(message: str, loss: str, mode: str, kl: str | None) -> None:
    if "aggregation of its own" in message:
        assert mode != OWN_AGGREGATION.get(loss, mode)
    else:
        assert "divergence of its own" in message
        assert loss in OWN_KL
        assert kl is not None


REFUSED = {
    "bypass_mode": ("bypass_mode", {}, "policy_loss.loss_mode is 'bypass_mode'"),
    "a loss of nobody": ("lvrpo_ppo", {}, "policy_loss.loss_mode is 'lvrpo_ppo', no loss of verl"),
    "a cap in the clip": ("vanilla", {"clip_ratio_c": 1.1}, "clip_ratio_c is 1.1, inside the clip"),
    "sapo over tokens": (
        "sapo",
        {"entropy_coeff": 0.1},
        "entropy_coeff is 0.1, but 'sapo' has an agg",
    ),
    "two divergences": (
        "lvrpo_dro",
        {"use_kl_loss": True},
        "use_kl_loss is True, but 'dro' has a div",
    ),
    "a full KL": (
        "lvrpo",
        {"use_kl_loss": True, "kl_loss_type": "full"},
        "kl_loss_type is 'full', no estimator",
    ),
    "a length of nobody": (
        "gspo",
        {"mode": "seq-mean-token-sum-norm"},
        "loss_scale_factor is None, which is the padded length",
    ),
}


@pytest.mark.parametrize(("loss", "options", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_what_cannot_be_said_is_refused_by_name(loss, options, message):
    with pytest.raises(ValueError, match=f"lvrpo for verl: {message}"):
        lvrpo.LossParams.from_verl(actor(loss, **options))


@pytest.mark.parametrize("loss", OWN_KL)
def test_weights_of_a_divergence_are_refused(loss):
    weights = torch.ones(5, 7)
    with pytest.raises(ValueError, match="rollout_is_weights is 'given'"):
        ours.policy_loss(
            loss, **batch(0, 0.5, False), config=actor(loss), rollout_is_weights=weights
        )


def test_advantages_of_both_signs_have_no_geometric_mean():
    with pytest.raises(ValueError, match="advantages is 'given', of both signs in one response"):
        ours.policy_loss("geo_mean", **batch(0, 0.5, False), config=actor("geo_mean"))


def test_ranks_need_the_counts_of_all():
    config = actor("vanilla")
    config.global_batch_info["dp_size"] = 2
    with pytest.raises(ValueError, match=r"batch_num_tokens'.* is None, but dp_size is 2"):
        ours.policy_loss("vanilla", **batch(0, 0.5, False), config=config)


def test_clip_cov_leaves_out_the_share_that_it_is_told():
    """verl draws the same number of tokens, by another generator."""
    x = batch(3, 0.05, False)
    x["response_mask"] = torch.ones(5, 7)
    config = actor("clip_cov")
    object.__setattr__(config.policy_loss, "clip_cov_ratio", 0.1)
    object.__setattr__(config.policy_loss, "clip_cov_lb", -100.0)
    gradients = [
        loss_and_gradient(name, x, config=config)[1] for name in ("clip_cov", "lvrpo_clip_cov")
    ]
    without_advantage = 7
    assert [int((g == 0).sum()) for g in gradients] == pytest.approx(
        [without_advantage + 3] * 2, abs=3
    )
    kept = (gradients[0] != 0) & (gradients[1] != 0)
    torch.testing.assert_close(gradients[0][kept], gradients[1][kept])


def test_registering_again_changes_nothing():
    before = core_algos.get_policy_loss_fn("vanilla")
    ours.register()
    assert core_algos.get_policy_loss_fn("vanilla") is before
    for name, estimator in ours.ESTIMATORS.items():
        registered = core_algos.ADV_ESTIMATOR_REGISTRY.get(f"lvrpo_{name}", estimator)
        assert registered is estimator
