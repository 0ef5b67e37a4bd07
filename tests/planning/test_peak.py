"""The forecast of a run's peak, against a run of a few steps in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from lvrpo.planning.memory import Numerics
from lvrpo.runs.config_file import load_config
from lvrpo.runs.plan import plan_run

SHORT = [
    "warm_start.steps=1",
    "run.steps=2",
    "run.eval_items=16",
    "run.frontier_items=0",
    "rewards.generate={ r_ins = 1.0 }",
]
CONFIGS = {
    "as it comes": [],
    "answers of many groups": [
        "rollout.generate_prompts=0",
        "rollout.understand_prompts=64",
        "optimizer.minibatches=1",
        "warm_start.generate_batch=0",
        "warm_start.understand_batch=16",
        "model.hidden=64",
        "model.layers=5",
        "model.mlp=320",
    ],
    "drawings in several buffers": [
        "rollout.understand_prompts=0",
        "rollout.group_size=16",
        "rollout.generate_prompts=6",
        "optimizer.max_rows=1024",
        "warm_start.understand_batch=8",
        "warm_start.generate_batch=4",
        "model.hidden=192",
        "model.heads=8",
        "model.layers=2",
        "model.mlp=512",
    ],
}


@pytest.mark.slow
@pytest.mark.parametrize("overrides", CONFIGS.values(), ids=CONFIGS)
def test_the_peak_is_forecast_within_15_percent(overrides):
    script = Path(__file__).with_name("measured_peak.py")
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(script), *SHORT, *overrides]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    measured = int(done.stdout)
    config = load_config(overrides=[*SHORT, *overrides])
    forecast = max(plan_run(config, Numerics()).to_dict()["peak"].values())
    print(f"forecast {forecast / 1e6:.1f} MB, measured {measured / 1e6:.1f} MB")
    assert abs(forecast - measured) <= 0.15 * measured
