"""The whole run: supervised warm start, then rollout, rewards, advantages, updates, over and over.

The baseline that rewards are measured against goes on with supervised steps instead, with the same
data as the warm start and the optimizer of the policy phase. Either way "after" is of the weights
of the last step: only the warm start averages its own.

Steps are counted through both phases. Everything a step draws is keyed by (seed, step), so a run
that is killed and resumed continues bit for bit on a CPU: a snapshot holds the weights, their
running average, the optimizer and the step number, and nothing else is needed. Whatever else ends a
run, a signal or an error, the last finished step is saved first.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from lvrpo.data.example import SKILLS
from lvrpo.models.protocol import DivergedError, Policy
from lvrpo.trainer.config import ConfigError, TrainConfig
from lvrpo.trainer.evaluate import evaluate
from lvrpo.trainer.experience import gather_experience
from lvrpo.trainer.journal import Interrupts, Journal, Snapshot
from lvrpo.trainer.minibatches import minibatches
from lvrpo.trainer.objective import Objective
from lvrpo.trainer.placement import (
    compute_dtype,
    leaves_no_group,
    place_frozen,
    place_trained,
    whole,
)
from lvrpo.trainer.ranks import ALONE, Ranks
from lvrpo.trainer.schedule import flow_schedule, window_start
from lvrpo.trainer.state import TrainState, load_weights
from lvrpo.trainer.task import Rewards, Task, warm_start_examples
from lvrpo.trainer.update import merge_updates, policy_gradient
from lvrpo.trainer.warm_start import supervised_gradient

WARM_START, AFTER = "warm start", "after"


@dataclass(frozen=True)
class _Training:
    """What the functions below share."""

    config: TrainConfig
    task: Task
    policy: Policy
    state: TrainState
    journal: Journal
    interrupts: Interrupts
    ranks: Ranks

    @property
    def total(self) -> int:
        """Steps of both phases."""
        return self.config.warm_start.steps + self.config.run.steps


@leaves_no_group()
def train(
    config: TrainConfig,
    task: Task,
    journal: Journal,
    interrupts: Interrupts,
    ranks: Ranks = ALONE,
) -> None:
    """Run, or go on with, the training that `config` describes.

    Ranks that share it all call, and come to the same weights as one process, to rounding. Each
    has a journal of its own, which is told the same; all have to go on from the same snapshot.

    Args:
        config: in force.
        task: prompts, checks and rewards, and how a policy is made.
        journal: what the run goes on from, and what it tells.
        interrupts: when whatever ends the run has to wait.
        ranks: that share it.

    Raises:
        ConfigError: there are prompts that ask for what the policy cannot do.
        ValueError: the journal's snapshot is of another model.
        DivergedError: a gradient is not finite.
        RewardError: a reward function failed.
        SelfTestError: the update does not reproduce the rollout.
    """
    policy = ranks.together(lambda: place_trained(task.new_policy(), config.run))
    for skill in SKILLS:
        prompts = getattr(config.rollout, f"{skill}_prompts")
        if prompts and skill not in policy.skills:
            raise ConfigError(
                f"rollout.{skill}_prompts is {prompts}, expected 0: the policy can only "
                f"{' and '.join(sorted(policy.skills))}"
            )
    state = ranks.together(
        lambda: TrainState(policy.module, config, journal.latest(), journal.bridge)
    )
    training = _Training(config, task, policy, state, journal, interrupts, ranks)
    dtype = str(compute_dtype(config.run, policy)).removeprefix("torch.")
    ranks.together(lambda: journal.begin(device=str(policy.device), dtype=dtype))
    try:
        while state.step < config.warm_start.steps:
            _supervised_step(training, "warm_start")
        _policy_phase(training)
    except BaseException as error:
        interrupts.ignore()
        journal.ended(error, state.step, state.finished())
        ranks.part(error)
        raise


def _supervised_step(training: _Training, phase: str) -> None:
    config, state = training.config, training.state
    ranks, key = training.ranks, {"seed": config.run.seed, "step": state.step + 1}
    with training.interrupts.step():
        started = time.perf_counter()
        questions, drawings = warm_start_examples(training.task.source, config.warm_start, **key)
        metrics: dict[str, Any] = supervised_gradient(
            training.policy, questions, drawings, ranks=ranks, **key
        )
        with training.interrupts.held():
            metrics |= ranks.together(state.update)
            metrics["time/total"] = time.perf_counter() - started
            _finish_step(training, phase, metrics)


def _policy_phase(training: _Training) -> None:
    config = training.config
    reference = _reference(training)
    rewards = training.ranks.together(partial(training.task.make_rewards, reference))
    objective = Objective.from_config(config)
    with whole(reference):
        _evaluate_once(training, WARM_START, config.warm_start.steps, reference, rewards)
    while training.state.step < training.total:
        step, every = training.state.step, config.run.eval_every
        done = step - config.warm_start.steps
        if every and done and done % every == 0:
            with whole(training.policy, reference):
                _evaluate_once(training, f"step {step}", step, training.policy, rewards)
        if config.run.objective == "supervised":
            _supervised_step(training, "supervised")
        else:
            _grpo_step(training, reference, rewards, objective)
    with whole(training.policy, reference):  # which may be a reward
        _evaluate_once(training, AFTER, training.total, training.policy, rewards)


def _grpo_step(
    training: _Training, reference: Policy, rewards: Rewards, objective: Objective
) -> None:
    config, policy, state = training.config, training.policy, training.state
    ranks = training.ranks
    epochs, count = config.optimizer.updates_per_rollout, config.optimizer.minibatches
    with training.interrupts.step():
        started = time.perf_counter()
        step = state.step + 1
        schedule = flow_schedule(config.rollout, window_start(config, step))
        with whole(policy, reference):
            experience, metrics = gather_experience(
                policy, training.task, rewards, config, schedule, step, ranks
            )
        update_started = time.perf_counter()
        updates: list[dict[str, float]] = []
        for part in minibatches(experience, epochs, count, seed=config.run.seed, step=step):
            try:
                found = policy_gradient(policy, reference, part, schedule, objective, ranks)
            except ValueError as error:
                if not updates:
                    raise
                # Samples of this rollout have passed; the weights alone have changed since.
                raise DivergedError.of_samples("outputs", step) from error
            if not updates and step == config.warm_start.steps + 1:
                dtype = compute_dtype(config.run, policy)
                ranks.together(partial(check_ratio, found, dtype))
            is_last = len(updates) + 1 == epochs * count
            with training.interrupts.held():
                if not is_last:
                    state.keep()
                updates.append(found | ranks.together(state.update))
                if is_last:
                    metrics |= merge_updates(updates)
                    metrics["time/update"] = time.perf_counter() - update_started
                    metrics["time/total"] = time.perf_counter() - started
                    every, done = config.run.gallery_every, state.step - config.warm_start.steps
                    if every and done % every == 0:
                        journal, shown = training.journal, experience.shown
                        ranks.together(partial(journal.samples, step, shown))
                    _finish_step(training, "grpo", metrics)


def _finish_step(training: _Training, phase: str, metrics: dict[str, Any]) -> None:
    """Record a step whose weights are in place; its record comes before any snapshot of it."""
    config, state, journal = training.config, training.state, training.journal
    row = {"step": state.step + 1, "phase": phase, **metrics}
    training.ranks.together(lambda: journal.step(row))
    state.finish()
    last = state.step in (config.warm_start.steps, training.total)
    if last or state.step % config.run.checkpoint_every == 0:
        snapshot = Snapshot(state.step, state.tensors())
        training.ranks.together(lambda: journal.save(snapshot))


def _reference(training: _Training) -> Policy:
    """The policy of the end of the warm start: the KL's reference, and the frozen answerer."""
    state, journal, ranks = training.state, training.journal, training.ranks
    if state.step == training.config.warm_start.steps:
        snapshot = Snapshot(state.step, state.weights())
        ranks.together(lambda: journal.save_reference(snapshot))
    reference = training.task.new_policy()
    load_weights(reference.module, ranks.together(journal.reference))
    return place_frozen(reference, training.config.run)


def _evaluate_once(
    training: _Training, label: str, step: int, policy: Policy, rewards: Rewards
) -> None:
    # A run that was given more steps is evaluated again at its new end.
    journal, ranks = training.journal, training.ranks
    if ranks.first(lambda: journal.is_evaluated(label, step)):
        return
    ranks.together(lambda: journal.message(f"evaluating on held-out prompts: {label}"))
    found, gallery = evaluate(
        policy,
        training.task,
        rewards,
        training.config,
        label=label,
        step=step,
        progress=partial(journal.evaluating, label),
        ranks=ranks,
    )
    ranks.together(lambda: journal.evaluation(label, step, found, gallery))


class SelfTestError(RuntimeError):
    """The update does not reproduce the log-probabilities of the rollout."""


#: Two fp32 passes over the same tokens differ by rounding; a wrong mask, position or schedule
#: differs by orders of magnitude more. Narrow weights may be this many of their roundings off.
SELF_TEST_TOLERANCE, SELF_TEST_ROUNDINGS = 1e-3, 16


def check_ratio(metrics: dict[str, Any], dtype: torch.dtype = torch.float32) -> None:
    """Before the first update the policy is the sampler, so every ratio must be one.

    Args:
        metrics: of that update.
        dtype: of the policy's weights.

    Raises:
        SelfTestError: it is not; training on such ratios goes wrong slowly and in silence.
    """
    tolerance = max(SELF_TEST_TOLERANCE, SELF_TEST_ROUNDINGS * torch.finfo(dtype).eps)
    for key, value in metrics.items():
        is_extreme = key.startswith("ratio/") and key.endswith(("/min", "/max"))
        if is_extreme and not abs(value - 1) <= tolerance:
            raise SelfTestError(
                f"self test: {key} is {value:.6g} before the first update, expected 1 within "
                f"{tolerance:g}: rollout and update disagree about the same tokens"
            )
