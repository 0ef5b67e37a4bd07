"""Ten steps of TRL's trainer with and without lvrpo, of the same seed, are the same ten steps."""

from __future__ import annotations

import math

import pytest

pytest.importorskip("trl", reason="pip install 'lvrpo[trl]'")
import trl
from integrations.trl_runs import Run, early_b, run, vowels

from lvrpo.integrations.trl import GRPOTrainer

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


def same_steps(ours: Run, theirs: Run) -> None:
    for step, (ours_logged, theirs_logged) in enumerate(
        zip(ours.logged, theirs.logged, strict=True)
    ):
        assert abs(ours.losses[step] - theirs.losses[step]) <= 1e-6
        apart = (ours.gradients[step] - theirs.gradients[step]).norm()
        assert apart <= 1e-5 * theirs.gradients[step].norm(), step
        assert ours_logged.keys() == theirs_logged.keys()
        for key in ours_logged.keys() - {"step_time"}:
            x, y = float(ours_logged[key]), float(theirs_logged[key])
            assert math.isclose(x, y, rel_tol=1e-4, abs_tol=1e-6), key
