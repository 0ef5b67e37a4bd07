"""A step of either phase as the loop makes it, for a policy of any family, on any device."""

from __future__ import annotations

from typing import Any

from lvrpo.models.protocol import Policy
from lvrpo.trainer.config import TrainConfig
from lvrpo.trainer.experience import gather_experience
from lvrpo.trainer.minibatches import minibatches
from lvrpo.trainer.objective import Objective
from lvrpo.trainer.schedule import flow_schedule
from lvrpo.trainer.state import TrainState
from lvrpo.trainer.task import Task, warm_start_examples
from lvrpo.trainer.update import policy_gradient
from lvrpo.trainer.warm_start import supervised_gradient


def both_phases(
    config: TrainConfig, task: Task, policy: Policy, reference: Policy
) -> dict[str, Any]:
    """The warm start of one step, whose average is taken over, and a step of the policy phase.

    Returns:
        All metrics of both but the times.
    """
    state = TrainState(policy.module, config)
    questions, drawings = warm_start_examples(task.source, config.warm_start, 0, 1)
    found: dict[str, Any] = {}

    def note(what: str, metrics: dict[str, Any]) -> None:
        found.update({f"{what}: {name}": value for name, value in metrics.items()})

    note("imitation", supervised_gradient(policy, questions, drawings, seed=0, step=1))
    note("imitation", state.update())
    state.finish()
    schedule, objective = flow_schedule(config.rollout), Objective.from_config(config)
    experience, metrics = gather_experience(
        policy, task, task.make_rewards(reference), config, schedule, step=2
    )
    note("rollout", metrics)
    count = config.optimizer.minibatches
    for number, part in enumerate(minibatches(experience, 1, count, seed=0, step=2)):
        note(f"update {number}", policy_gradient(policy, reference, part, schedule, objective))
        note(f"update {number}", state.update())
    state.finish()
    return {name: value for name, value in found.items() if "time/" not in name}
