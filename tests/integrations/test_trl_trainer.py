"""Ten steps of TRL's trainer with and without lvrpo, of the same seed, are the same ten steps."""

from __future__ import annotations

import math
import re

import pytest

pytest.importorskip("trl", reason="pip install 'lvrpo[trl]'")
import trl
from datasets import Dataset
from integrations.trl_runs import Run, early_b, run, vowels

from lvrpo.integrations.trl import GRPOTrainer

#: What a run logs of its speed.
TAKES_TIME = re.compile("time|per_second")
TWO_REWARDS = {"rewards": [vowels, early_b]}
#: By name: what a run has that is not TRL's default.
CONFIGURATIONS = {
    "defaults": {},
    "every default, on Qwen3": {"family": "Qwen3"},
    "old log-probs": {"num_iterations": 2},
    "accumulation and a larger generation": {
        "gradient_accumulation_steps": 2,
        "steps_per_generation": 4,
    },
    "a cap, a temperature and truncated completions masked": {
        "delta": 1.5,
        "temperature": 0.7,
        "mask_truncated_completions": True,
        "num_iterations": 2,
    },
    "GSPO": {
        "loss_type": "grpo",
        "importance_sampling_level": "sequence",
        "num_iterations": 2,
    },
    "LUSPO": {
        "loss_type": "luspo",
        "importance_sampling_level": "sequence",
        "gradient_accumulation_steps": 2,
        "num_iterations": 2,
    },
    "BNPO": {"loss_type": "bnpo", "gradient_accumulation_steps": 2},
    "Dr. GRPO": {"loss_type": "dr_grpo", "scale_rewards": "none"},
    "SAPO": {"loss_type": "sapo", "num_iterations": 2},
    "CISPO": {"loss_type": "cispo", "epsilon_high": 5.0, "num_iterations": 2},
    "VESPO": {"loss_type": "vespo", "num_iterations": 2},
    "GSPO with a KL": {
        "loss_type": "grpo",
        "importance_sampling_level": "sequence",
        "beta": 0.1,
        "num_iterations": 2,
    },
    "a KL with and without its correction": {
        "beta": 0.1,
        "use_bias_correction_kl": False,
        "num_iterations": 2,
    },
    "CISPO with the default bound": {"loss_type": "cispo", "num_iterations": 2},
    "SAPO by sequence": {
        "loss_type": "sapo",
        "importance_sampling_level": "sequence",
        "num_iterations": 2,
    },
    "80/20, off-policy sequences masked and an entropy bonus": {
        "top_entropy_quantile": 0.2,
        "off_policy_mask_threshold": 1e-4,
        "entropy_coef": 0.05,
        "gradient_accumulation_steps": 2,
        "num_iterations": 2,
    },
    "an entropy bonus that adapts": {
        "use_adaptive_entropy": True,
        "entropy_target": 2.6,
        "entropy_coef_delta": 0.02,
        "gradient_accumulation_steps": 2,
    },
    "a cap inside of the clip": {"delta": 1.1, "num_iterations": 2},
    "a head in fp32": {"cast_lm_head_to_fp32": True},
    "experts, with their auxiliary loss": {
        "family": "Qwen2Moe",
        "sizes": {"num_experts": 4, "moe_intermediate_size": 16, "decoder_sparse_step": 1},
        "router_aux_loss_coef": 0.1,
        "gradient_accumulation_steps": 2,
    },
    "evaluations": {
        "eval_strategy": "steps",
        "eval_steps": 5,
        "per_device_eval_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "given": {"eval_dataset": Dataset.from_dict({"prompt": ["a b", "k"]})},
    },
    "two rewards, summed": {**TWO_REWARDS, "reward_weights": [1.0, 0.5], "scale_rewards": "batch"},
    "two rewards, normalised": {
        **TWO_REWARDS,
        "multi_objective_aggregation": "normalize_then_sum",
    },
}
QUICK = ("defaults", "accumulation and a larger generation", "GSPO")


@pytest.mark.parametrize(
    "name",
    [pytest.param(x, marks=[] if x in QUICK else pytest.mark.slow) for x in CONFIGURATIONS],
)
def test_ten_steps_are_those_of_trl(name, tmp_path):
    theirs = run(trl.GRPOTrainer, tmp_path, **CONFIGURATIONS[name])
    ours = run(GRPOTrainer, tmp_path, **CONFIGURATIONS[name])
    assert len(ours.losses) == len(theirs.losses) == 10
    assert any(abs(loss) > 1e-3 for loss in theirs.losses)
    same_steps(ours, theirs)


@pytest.mark.slow
def test_ten_steps_of_an_adapter_are_those_of_trl(tmp_path):
    peft = pytest.importorskip("peft")
    adapter = peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    options = {"beta": 0.1, "num_iterations": 2, "given": {"peft_config": adapter}}
    same_steps(*(run(kind, tmp_path, **options) for kind in (GRPOTrainer, trl.GRPOTrainer)))


@pytest.mark.parametrize(
    "options",
    [
        {"cast_lm_head_to_fp32": True},
        pytest.param({}, marks=pytest.mark.slow),
        pytest.param({"given": {"share_prompts": True}}, marks=pytest.mark.slow),
    ],
    ids=["a head in fp32", "autocast", "shared prompts"],
)
def test_under_autocast_losses_are_those_of_trl_to_its_rounding(options, tmp_path):
    theirs = {name: value for name, value in options.items() if name != "given"}
    how = {"bf16": True, "per_device_train_batch_size": 8, "max_steps": 2, "num_iterations": 2}
    expected = run(trl.GRPOTrainer, tmp_path, **how, **theirs)
    found = run(GRPOTrainer, tmp_path, **how, **options)
    for x, y in zip(found.losses, expected.losses, strict=True):
        assert abs(x - y) < 1e-3
    for x, y in zip(found.gradients, expected.gradients, strict=True):
        assert (x - y).norm() < 2e-2 * y.norm()


def same_steps(ours: Run, theirs: Run) -> None:
    for step, (loss, their_loss) in enumerate(zip(ours.losses, theirs.losses, strict=True)):
        assert abs(loss - their_loss) <= 1e-6, step
        apart = (ours.gradients[step] - theirs.gradients[step]).norm()
        assert apart <= 1e-5 * theirs.gradients[step].norm(), step
    for logged, their_logged in zip(ours.logged, theirs.logged, strict=True):
        assert logged.keys() == their_logged.keys()
        for key in (key for key in logged if not TAKES_TIME.search(key)):
            x, y = float(logged[key]), float(their_logged[key])
            assert math.isclose(x, y, rel_tol=1e-4, abs_tol=1e-6), key
