"""Every policy loss that lvrpo has for verl against verl's own, by value and gradient."""

from __future__ import annotations

import itertools

import pytest
import torch

import lvrpo
from lvrpo.params.from_verl import LOSSES, OWN_AGGREGATION, OWN_KL

pytest.importorskip("verl", reason="pip install 'lvrpo[verl]'")
from omegaconf import OmegaConf
from verl.trainer.ppo import core_algos

from lvrpo.integrations import verl as ours
from lvrpo.integrations.verl import parity
from lvrpo.integrations.verl.parity import actor

ours.register()


@pytest.mark.parametrize("loss", LOSSES)
def test_a_registered_loss_is_verls(loss):
    outcomes = parity.registered(loss)
    assert [outcome for outcome in outcomes if not outcome.agrees] == []
    refused = {outcome.refused for outcome in outcomes} - {None}
    assert all("rollout_is_weights is 'given'" in str(reason) for reason in refused)
    assert bool(refused) == (loss in OWN_KL)


@pytest.mark.parametrize("loss", [loss for loss in LOSSES if loss not in parity.CHOOSING])
def test_from_verl_is_the_whole_loss(loss):
    outcomes = parity.in_one_call(loss)
    assert [outcome for outcome in outcomes if not outcome.agrees] == []
    refused = {outcome.refused for outcome in outcomes} - {None}
    wanted = {
        "an aggregation of its own": loss in OWN_AGGREGATION,
        "a divergence of its own": loss in OWN_KL,
    }
    for reason, expected in wanted.items():
        assert any(reason in str(message) for message in refused) == expected
    assert sum(outcome.refused is None for outcome in outcomes) >= 10


#: Losses whose clip fractions are of the tokens that a bound holds. Those of the others count
#: tokens without an advantage too, or on both sides of the clip.
COUNTED = ("vanilla", "cispo", "gspo")


@pytest.mark.parametrize("loss", LOSSES)
def test_metrics_are_verls(loss):
    for seed, spread in itertools.product(range(3), parity.SPREADS):
        x = parity.tokens(loss, seed, spread)
        config = actor(loss)
        metrics = core_algos.get_policy_loss_fn(f"lvrpo_{loss}")(**x, config=config)[1]
        expected = core_algos.get_policy_loss_fn(loss)(**x, config=config)[1]
        names = expected if loss in COUNTED else expected.keys() & {"actor/ppo_kl"}
        for name in names:
            assert metrics[name] == pytest.approx(expected[name], abs=1e-6), name


@pytest.mark.parametrize("loss", ["vanilla", "gspo"])
def test_verls_actor_takes_it_by_name(loss):
    """With a KL and an entropy bonus that verl adds, from unpadded log-probs of a model."""
    losses = pytest.importorskip("verl.workers.utils.losses", reason="it has more needs")
    from tensordict import TensorDict

    torch.manual_seed(0)
    lengths = torch.tensor([4, 1, 3])
    mask = (torch.arange(4) < lengths[:, None]).long()
    count = int(lengths.sum()) + 2 * 3
    results = []
    for name in (f"lvrpo_{loss}", loss):
        torch.manual_seed(1)
        data = {
            "prompts": torch.ones(3, 2).long(),
            "responses": torch.ones(3, 4).long(),
            "attention_mask": torch.cat([torch.ones(3, 2).long(), mask], 1),
            "response_mask": mask,
            "old_log_probs": -torch.rand(3, 4),
            "ref_log_prob": -torch.rand(3, 4),
            "advantages": torch.randn(3, 4),
        }
        batch = TensorDict(data, batch_size=3)
        for key, value in (("dp_size", 1), ("batch_num_tokens", 8), ("global_batch_size", 3)):
            batch.set_non_tensor(key, value)
        log_probs = (-torch.rand(count)).requires_grad_()
        output = {"log_probs": log_probs, "entropy": torch.rand(count)}
        config = actor(name, use_kl_loss=True, entropy_coeff=0.01)
        total, metrics = losses.ppo_loss(config, output, batch)
        total.backward()
        results.append((total.detach(), log_probs.grad, metrics["actor/ppo_kl"].aggregate()))
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(torch.as_tensor(found), torch.as_tensor(expected))


def test_the_name_alone_is_vanilla():
    x = parity.tokens("vanilla", 0, 0.5)
    config = actor("vanilla")
    found = core_algos.get_policy_loss_fn("lvrpo")(**x, config=config)[0]
    assert torch.equal(found, ours.policy_loss("vanilla", **x, config=config)[0])
    by_name = [lvrpo.LossParams.from_verl(actor(name)) for name in ("lvrpo", "lvrpo_vanilla")]
    assert by_name == [lvrpo.LossParams.from_verl(config)] * 2


def test_a_config_of_omegaconf_says_the_same():
    config = actor("lvrpo_gspo", "seq-mean-token-sum-norm", loss_scale_factor=11, use_kl_loss=True)
    loaded = OmegaConf.create(
        {name: getattr(config, name) for name in READ}
        | {"policy_loss": {"loss_mode": config.policy_loss.loss_mode}}
    )
    assert lvrpo.LossParams.from_verl(loaded) == lvrpo.LossParams.from_verl(config)


#: What `LossParams.from_verl` reads of an ActorConfig for this loss.
READ = (
    *("clip_ratio", "clip_ratio_low", "clip_ratio_high", "clip_ratio_c"),
    *("loss_agg_mode", "loss_scale_factor", "entropy_coeff"),
    *("use_kl_loss", "kl_loss_coef", "kl_loss_type"),
)


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
        {"aggregation": "seq-mean-token-sum-norm"},
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
            loss, **parity.tokens("vanilla", 0, 0.5), config=actor(loss), rollout_is_weights=weights
        )


def test_advantages_of_both_signs_have_no_geometric_mean():
    with pytest.raises(ValueError, match="advantages is 'given', of both signs in one response"):
        ours.policy_loss("geo_mean", **parity.tokens("vanilla", 0, 0.5), config=actor("geo_mean"))


def test_ranks_need_the_counts_of_all():
    config = actor("vanilla")
    config.global_batch_info["dp_size"] = 2
    with pytest.raises(ValueError, match=r"batch_num_tokens'.* is None, but dp_size is 2"):
        ours.policy_loss("vanilla", **parity.tokens("vanilla", 0, 0.5), config=config)


def test_clip_cov_leaves_out_the_share_that_it_is_told():
    x = parity.tokens("clip_cov", 3, 0.01)
    x["log_prob"].requires_grad_()
    config = actor("clip_cov")
    options = {"clip_cov_ratio": 0.2, "clip_cov_lb": -100.0, "clip_cov_ub": 100.0}
    for name, value in options.items():
        object.__setattr__(config.policy_loss, name, value)
    active = (x["response_mask"] > 0) & (x["advantages"] != 0)
    drawn = set()
    for _ in range(8):
        loss = ours.policy_loss("clip_cov", **x, config=config)[0]
        (gradient,) = torch.autograd.grad(loss, x["log_prob"])
        left_out = active & (gradient == 0)
        # Tokens without an advantage may be among those that are drawn.
        assert int(left_out.sum()) <= int(0.2 * x["response_mask"].sum())
        drawn.add(tuple(left_out.flatten().tolist()))
    assert len(drawn) > 1


def test_registering_again_changes_nothing():
    before = core_algos.get_policy_loss_fn("vanilla")
    ours.register()
    assert core_algos.get_policy_loss_fn("vanilla") is before
    for name, estimator in ours.ESTIMATORS.items():
        registered = core_algos.ADV_ESTIMATOR_REGISTRY.get(f"lvrpo_{name}", estimator)
        assert registered is estimator
