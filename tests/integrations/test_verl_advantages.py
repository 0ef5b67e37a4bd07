"""Every estimator that lvrpo has for verl against verl's own, on groups in any order."""

from __future__ import annotations

import uuid
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("verl", reason="pip install 'lvrpo[verl]'")
import numpy
from verl.protocol import DataProto
from verl.trainer.config import AlgoConfig
from verl.trainer.ppo import core_algos

from lvrpo.integrations import verl as ours
from lvrpo.integrations.verl.advantages import UNREACHED

ours.register()

#: verl's own, in fp32 inside whatever it is given.
IN_FP32 = ("grpo_vectorized", "gdpo")


def batch(seed: int, sizes: tuple[int, ...], holes: bool) -> dict[str, Any]:
    """Responses of several prompts in any order, rewards at their last token."""
    torch.manual_seed(seed)
    count = sum(sizes)
    lengths = torch.randint(1, 9, (count, 1))
    mask = (torch.arange(9) < lengths).long()
    if holes:
        mask[:, 1:] *= (torch.rand(count, 8) < 0.7).long()
    rewards = torch.zeros(count, 9, dtype=torch.float64)
    outcome = torch.rand(count, dtype=torch.float64).round(decimals=1)
    last = (mask * torch.arange(9)).argmax(1)
    rewards[torch.arange(count), last] = outcome
    ids = [str(uuid.UUID(int=i)) for i, size in enumerate(sizes) for _ in range(size)]
    order = torch.randperm(count).tolist()
    logits = torch.randn(count, 9, 5, dtype=torch.float64).log_softmax(-1)
    return {
        "token_level_rewards": rewards,
        "response_mask": mask,
        "index": numpy.array([ids[i] for i in order], dtype=object),
        "reward_baselines": torch.rand(count, dtype=torch.float64),
        "old_log_probs": logits[..., 0],
        "sum_pi_squared": logits.exp().square().sum(-1),
        "rollout_is_weights": torch.rand(count, 9, dtype=torch.float64) + 0.5,
    }


def both(name: str, x: dict[str, Any], config: AlgoConfig, **more: Any) -> list[Tensor]:
    """Advantages and returns of lvrpo, then of verl, which writes into its rewards."""
    theirs = core_algos.get_adv_estimator_fn(name)
    taken = theirs.__code__.co_varnames[: theirs.__code__.co_argcount]
    given = {key: value for key, value in x.items() if key in taken}
    given |= {key: value for key, value in {"config": config, **more}.items() if key in taken}
    found = ours.ESTIMATORS[name](**x | given)
    if "norm_adv_by_std_in_grpo" in taken:  # which verl's trainer gives to "grpo" alone
        given["norm_adv_by_std_in_grpo"] = config.norm_adv_by_std_in_grpo
    expected = theirs(**{k: v.clone() if isinstance(v, Tensor) else v for k, v in given.items()})
    return [*found, *expected]


@pytest.mark.parametrize("by_std", [True, False])
@pytest.mark.parametrize("name", ours.ESTIMATORS)
def test_an_estimator_is_verls(name, by_std):
    for seed in range(12):
        sizes = (4, 2, 3, 5) if name == "grpo_passk" or seed % 2 else (4, 1, 3, 5, 1)
        holes = seed % 3 == 0 and name != "optimal_token_baseline"
        x = batch(seed, sizes, holes)
        config = AlgoConfig(gamma=0.9, norm_adv_by_std_in_grpo=by_std)
        advantages, returns, expected, expected_returns = both(name, x, config)
        tolerance = 2e-6 if name in IN_FP32 or by_std else 1e-7
        # What verl has between the steps of a response, nobody trains on.
        mask = x["response_mask"]
        assert torch.equal(advantages, advantages * mask)
        close(advantages, expected * mask, tolerance)
        close(returns * mask, expected_returns * mask, tolerance)


def close(found: Tensor, expected: Tensor, tolerance: float) -> None:
    assert found.shape == expected.shape
    difference = (found - expected).abs().max()
    assert difference <= tolerance * max(1.0, float(expected.abs().max()))


@pytest.mark.parametrize("weights", [None, [1.0, 0.25, 3.0]])
def test_gdpo_of_several_rewards(weights):
    x = batch(5, (4, 1, 3, 5), holes=False)
    keys = ["correct", "format", "length"]
    rewards = {key: numpy.random.default_rng(i).random(13) for i, key in enumerate(keys)}
    config = AlgoConfig(gdpo_reward_keys=keys, gdpo_reward_weights=weights)
    prompts = torch.zeros(13, 2)
    attention = torch.cat([torch.ones(13, 2), x["response_mask"]], 1)
    more = {
        "non_tensor_batch": rewards,
        "batch": {"prompts": prompts, "attention_mask": attention.long()},
    }
    advantages, _, expected, _ = both("gdpo", x, config, **more)
    close(advantages, expected, 2e-6)


@pytest.mark.parametrize("name", [n for n in ours.ESTIMATORS if n not in UNREACHED])
def test_verls_trainer_finds_it_by_name(name):
    trainer = pytest.importorskip("verl.trainer.ppo.ray_trainer", reason="it has more needs")
    x = batch(2, (3, 2, 4), holes=False)
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
    x = batch(0, (2, 2), holes=False)
    with pytest.raises(ValueError, match="lvrpo for verl: index is None"):
        ours.ESTIMATORS["rloo"](x["token_level_rewards"], x["response_mask"])


def test_columns_behind_a_tool_are_no_steps():
    x = batch(0, (2, 2), holes=True)
    x["response_mask"][0] = torch.tensor([1, 0, 1, 0, 0, 0, 0, 0, 0])
    with pytest.raises(ValueError, match=r"response_mask .* 'tir_optimal_token_baseline'"):
        ours.ESTIMATORS["optimal_token_baseline"](**x)


def test_a_baseline_needs_what_the_actor_sums():
    x = batch(0, (2, 2), holes=False)
    x["sum_pi_squared"] = None
    with pytest.raises(ValueError, match="calculate_sum_pi_squared=True"):
        ours.ESTIMATORS["tir_optimal_token_baseline"](**x)
    with pytest.raises(ValueError, match="handle_zero_tail is False"):
        ours.ESTIMATORS["tir_optimal_token_baseline"](**x, handle_zero_tail=False)
