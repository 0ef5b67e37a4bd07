"""One whole step of the default configuration: rollout, rewards, advantages, update.

Small size has fewer prompts. Every step starts from the same weights; `stages_ms` has its stages.
"""

from __future__ import annotations

import copy
import dataclasses
import statistics
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import lvrpo
from lvrpo import backends
from lvrpo.runs.config_file import load_config
from lvrpo.runs.setup import FrozenParts, Setup
from lvrpo.testing import check_against_plain
from lvrpo.trainer.config import TrainConfig
from lvrpo.trainer.experience import Experience, gather_experience
from lvrpo.trainer.journal import Snapshot
from lvrpo.trainer.objective import Objective
from lvrpo.trainer.schedule import flow_schedule
from lvrpo.trainer.state import TrainState
from lvrpo.trainer.update import policy_gradient

SIZES = {"small": (4, 4, 3), "full": (32, 32, 7)}  # questions, drawings, rounds
#: Those that run on the host; the references first, which the others are held to.
BACKENDS = sorted(
    (x for x in backends.ALL if x.device in ("", "cpu") and not x.why_unavailable()),
    key=lambda backend: backend.device,
)


class Step:
    """The first policy step of a run, on one backend, as often as asked for."""

    def __init__(self, config: TrainConfig, parts: FrozenParts, backend: str) -> None:
        run = dataclasses.replace(config.run, backend=backend)
        self.config = dataclasses.replace(config, run=run)
        self.task = Setup(self.config).task(parts)
        self.schedule = flow_schedule(config.rollout)
        self.objective = Objective.from_config(config)
        self.reference = self.task.new_policy()
        self.reference.module.requires_grad_(False)
        self.rewards = self.task.make_rewards(self.reference)
        self.stages: dict[str, list[float]] = defaultdict(list)
        self.reset()

    def reset(self) -> None:
        """Every round starts from the same weights and does the same work."""
        self.policy = self.task.new_policy()
        model = self.policy.module
        weights = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
        warm = Snapshot(self.config.warm_start.steps, weights)
        self.state = TrainState(model, self.config, warm)

    def experience(self) -> tuple[Experience, dict[str, Any]]:
        return gather_experience(
            self.policy, self.task, self.rewards, self.config, self.schedule, self.state.step + 1
        )

    def gradient(self, found: Experience) -> dict[str, float]:
        policy, reference = self.policy, self.reference
        return policy_gradient(policy, reference, found, self.schedule, self.objective)

    def __call__(self) -> None:
        found, metrics = self.experience()
        began = time.perf_counter()
        self.gradient(found)
        self.state.update()
        metrics["time/update"] = time.perf_counter() - began
        for stage in ("rollout", "rewards", "advantages", "update"):
            self.stages[stage].append(metrics[f"time/{stage}"])

    def results(self, found: Experience, *, double: bool = False) -> dict[str, Tensor]:
        """Losses and gradients of the update from `found`."""
        step = copy.copy(self)
        step.reset()
        if double:
            step.reference = step.task.new_policy()
            for policy in (step.policy, step.reference):
                model = policy.module.double()
                model.velocity = model.latent_out  # which is otherwise rounded to fp32
        metrics = step.gradient(found)
        losses = {name: torch.tensor(metrics[name]) for name in ("loss/text", "loss/image")}
        named = step.state.model.named_parameters()
        return losses | {name: p.grad for name, p in named if p.grad is not None}


@pytest.fixture(scope="module")
def rounds(request: pytest.FixtureRequest) -> int:
    return SIZES[request.config.getoption("--size")][2]


@pytest.fixture(scope="module")
def steps(request: pytest.FixtureRequest, tmp_path_factory: Any) -> dict[str, Step]:
    """A step per backend, after their losses and gradients have passed the tolerance rule."""
    questions, drawings, _ = SIZES[request.config.getoption("--size")]
    config = load_config(
        overrides=[
            f"rollout.understand_prompts={questions}",
            f"rollout.generate_prompts={drawings}",
        ]
    )
    parts = Setup(config).frozen_parts(Path(tmp_path_factory.mktemp("task")))
    steps = {backend.name: Step(config, parts, backend.name) for backend in BACKENDS}
    found, _ = steps["torch"].experience()
    gold = steps["torch"].results(found, double=True)
    plain = steps["torch"].results(found)
    for name, step in steps.items():
        ours = step.results(found)
        assert ours.keys() == gold.keys()
        for key, value in ours.items():
            # Losses are means of terms of order 1; a gradient's elements are sums that cancel.
            scale = 1.0 if key.startswith("loss/") else gold[key].abs().max()
            check_against_plain(value, gold[key], plain[key], scale=scale, name=f"{name}: {key}")
    return steps


def bench_train_step(race: Any, publish: Any, steps: dict[str, Step], rounds: int) -> None:
    def before(name: str) -> None:
        steps[name].reset()

    rollout = next(iter(steps.values())).config.rollout
    prompts = f"{rollout.understand_prompts}+{rollout.generate_prompts} prompts"
    shape = f"{prompts} x {rollout.group_size}"
    found = race(f"train_step {shape}", steps, before=before, most=rounds)
    for name, step in steps.items():
        stages = {k: v[-found.rounds :] for k, v in step.stages.items()}
        publish(
            op="train_step",
            direction="whole",
            shape=shape,
            dtype="float32",
            provider=name,
            provider_version=torch.__version__ if name == "torch" else lvrpo.__version__,
            correct=True,
            precision="float32",
            rounds=found.rounds,
            stages_ms={k: round(1e3 * statistics.median(v), 3) for k, v in stages.items()},
            **found.times[name].facts(),
        )
