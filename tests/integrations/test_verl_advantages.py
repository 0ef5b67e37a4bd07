"""Every estimator that lvrpo has for verl against verl's own, on groups in any order."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("verl", reason="pip install 'lvrpo[verl]'")
import numpy
from verl.protocol import DataProto
from verl.trainer.config import AlgoConfig
from verl.trainer.ppo import core_algos

from lvrpo.integrations import verl as ours
from lvrpo.integrations.verl import parity
from lvrpo.integrations.verl.advantages import UNREACHED

ours.register()


@pytest.mark.parametrize("name", ours.ESTIMATORS)
def test_an_estimator_is_verls(name):
    outcomes = parity.estimator(name)
    assert [outcome for outcome in outcomes if not outcome.agrees] == []
    refused = {outcome.refused for outcome in outcomes} - {None}
    assert bool(refused) == (name == "optimal_token_baseline")


def test_every_estimator_of_verl_is_there_but_that_of_a_critic():
    verls = {name for name in core_algos.ADV_ESTIMATOR_REGISTRY if not name.startswith("lvrpo")}
    assert verls - ours.ESTIMATORS.keys() == {"gae"}
    losses = {name for name in core_algos.POLICY_LOSS_REGISTRY if not name.startswith("lvrpo")}
    named = {f"lvrpo_{name}" for name in losses} - core_algos.POLICY_LOSS_REGISTRY.keys()
    assert named == {"lvrpo_bypass_mode"}


def close(found: Tensor, expected: Tensor, tolerance: float) -> None:
    assert found.shape == expected.shape
    difference = (found - expected).abs().max()
    assert difference <= tolerance * max(1.0, float(expected.abs().max()))


@pytest.mark.parametrize("weights", [None, [1.0, 0.25, 3.0]])
def test_gdpo_of_several_rewards(weights):
    x = parity.responses(5, (4, 1, 3, 5), holes=False)
    keys = ["correct", "format", "length"]
    rewards = {key: numpy.random.default_rng(i).random(13) for i, key in enumerate(keys)}
    config = AlgoConfig(gdpo_reward_keys=keys, gdpo_reward_weights=weights)
    prompts = torch.zeros(13, 2)
    attention = torch.cat([torch.ones(13, 2), x["response_mask"]], 1)
    given = {key: x[key] for key in ("token_level_rewards", "response_mask", "index")} | {
        "config": config,
        "non_tensor_batch": rewards,
        "batch": {"prompts": prompts, "attention_mask": attention.long()},
    }
    found = ours.ESTIMATORS["gdpo"](**given)[0]
    close(found, core_algos.get_adv_estimator_fn("gdpo")(**given)[0], 2e-6)


@pytest.mark.parametrize("name", [n for n in ours.ESTIMATORS if n not in UNREACHED])
def test_verls_trainer_finds_it_by_name(name):
    trainer = pytest.importorskip("verl.trainer.ppo.ray_trainer", reason="it has more needs")
    x = parity.responses(2, (3, 2, 4), holes=False)
    tensors = {key: x[key] for key in ("token_level_rewards", "response_mask", "reward_baselines")}
    config = AlgoConfig(gamma=0.9)

    def advantages(estimator: str) -> Tensor:
        given = {key: value.clone() for key, value in tensors.items()}
        data = DataProto.from_single_dict(given | {"uid": x["index"]})
        return trainer.compute_advantage(data, estimator, config=config).batch["advantages"]

    if name in ("grpo", "grpo_vectorized"):
        expected = advantages("grpo")
    else:
        expected = advantages(name)
    close(advantages(f"lvrpo_{name}"), expected, 2e-6)


def test_the_group_of_a_response_has_to_be_known():
    x = parity.responses(0, (2, 2), holes=False)
    with pytest.raises(ValueError, match="lvrpo for verl: index is None"):
        ours.ESTIMATORS["rloo"](x["token_level_rewards"], x["response_mask"])


def test_columns_behind_a_tool_are_no_steps():
    x = parity.responses(0, (2, 2), holes=False)
    x["response_mask"][0] = torch.tensor([1, 0, 1, 0, 0, 0, 0, 0, 0])
    with pytest.raises(ValueError, match=r"response_mask .* 'tir_optimal_token_baseline'"):
        ours.ESTIMATORS["optimal_token_baseline"](**x)


def test_a_baseline_needs_what_the_actor_sums():
    x = parity.responses(0, (2, 2), holes=False)
    x["sum_pi_squared"] = None
    with pytest.raises(ValueError, match="calculate_sum_pi_squared=True"):
        ours.ESTIMATORS["tir_optimal_token_baseline"](**x)
    with pytest.raises(ValueError, match="handle_zero_tail is False"):
        ours.ESTIMATORS["tir_optimal_token_baseline"](**x, handle_zero_tail=False)
