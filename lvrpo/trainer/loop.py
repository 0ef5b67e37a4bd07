"""The whole run: supervised warm start, then rollout, rewards, advantages, update, over and over.

Steps are counted through both phases. Everything a step draws is keyed by (seed, step), so a run
that is killed and resumed continues bit for bit on a CPU: a checkpoint holds the weights, their
running average, the optimizer and the step number, and nothing else is needed. Whatever else ends a
run, a signal or an error, the last finished step is saved first.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from lvrpo.models.flow import FlowSchedule
from lvrpo.models.protocol import DivergedError, Policy
from lvrpo.runs.changes import rate_bridge
from lvrpo.runs.checkpoint import (
    CheckpointError,
    checkpoints,
    load_newest,
    save_checkpoint,
    step_of,
)
from lvrpo.runs.log import RunWriter, read_changes, read_evals, save_gallery
from lvrpo.runs.setup import Task
from lvrpo.runs.signals import Signals
from lvrpo.trainer.config import TrainConfig
from lvrpo.trainer.evaluate import evaluate
from lvrpo.trainer.experience import gather_experience
from lvrpo.trainer.objective import Objective
from lvrpo.trainer.schedule import flow_schedule
from lvrpo.trainer.state import TrainState, load_weights
from lvrpo.trainer.update import policy_gradient
from lvrpo.trainer.warm_start import supervised_gradient

WARM_START, AFTER = "warm start", "after"


@dataclass(frozen=True)
class Progress:
    """One finished step, for whoever shows it."""

    step: int
    total: int
    phase: str
    metrics: dict[str, Any]


@dataclass(frozen=True)
class Listener:
    """Where a run tells how it goes; the default says nothing."""

    progress: Callable[[Progress], None] = lambda progress: None
    message: Callable[[str], None] = lambda message: None
    evaluation: Callable[[str, int, int], None] = lambda label, done, total: None


@dataclass
class Run:
    """What the functions below share."""

    config: TrainConfig
    task: Task
    directory: Path
    state: TrainState
    log: RunWriter
    listener: Listener
    signals: Signals
    saved: int  # step of the newest checkpoint

    @property
    def total(self) -> int:
        """Steps of both phases."""
        return self.config.warm_start.steps + self.config.run.steps


def train(config: TrainConfig, task: Task, directory: Path, listener: Listener) -> None:
    """Run, or go on with, the training that `config` describes.

    Raises:
        CheckpointError: the newest checkpoint is damaged or foreign, or the disk is full.
        DivergedError: a gradient is not finite.
        RewardError: a reward function failed.
        Stopped: a signal ended the run.
    """
    state = TrainState.initial(config, task, rate_bridge(config, read_changes(directory)))
    newest = load_newest(directory / "checkpoints")
    if newest is not None:
        state.restore(newest, config)
        listener.message(f"going on after step {state.step}")
    resume_from = None
    if newest is not None or (directory / "metrics.jsonl").exists():
        resume_from = state.step
    phase = "warm_start" if state.step <= config.warm_start.steps else "grpo"
    with (
        Signals() as signals,
        RunWriter(directory, resume_from=resume_from, phase=phase) as log,
    ):
        for note in log.notes:
            listener.message(note)
        run = Run(config, task, directory, state, log, listener, signals, saved=state.step)
        try:
            _warm_start(run)
            _grpo(run)
        except BaseException as error:
            signals.ignore()
            note = _save_last_step(run, error)
            with contextlib.suppress(OSError):  # the terminal may be what ended the run
                listener.message(note)
            raise


def _warm_start(run: Run) -> None:
    section, state = run.config.warm_start, run.state
    while state.step < section.steps:
        with run.signals.step():
            started = time.perf_counter()
            step = state.step + 1
            questions, drawings = run.task.warm_start_examples(step)
            metrics: dict[str, Any] = supervised_gradient(
                run.task.policy(state.model),
                questions,
                drawings,
                seed=run.config.run.seed,
                step=step,
            )
            with run.signals.held():
                metrics |= state.supervised_step(run.config)
                metrics["time/total"] = time.perf_counter() - started
                _finish_step(run, "warm_start", metrics)


def _grpo(run: Run) -> None:
    config, state = run.config, run.state
    reference = _reference(run)
    schedule = flow_schedule(config.rollout)
    objective = Objective.from_config(config)
    _evaluate_once(run, WARM_START, config.warm_start.steps, reference, reference, schedule)
    while state.step < run.total:
        with run.signals.step():
            started = time.perf_counter()
            step = state.step + 1
            policy = run.task.policy(state.model)
            experience, metrics = gather_experience(
                policy, reference, run.task, config, schedule, step
            )
            update_started = time.perf_counter()
            for update in range(config.optimizer.updates_per_rollout):
                metrics |= policy_gradient(policy, reference, experience, schedule, objective)
                if update == 0 and step == config.warm_start.steps + 1:
                    check_ratio(metrics)
                with run.signals.held():
                    if update + 1 < config.optimizer.updates_per_rollout:
                        state.keep()
                    metrics |= state.policy_step(config)
                    if update + 1 == config.optimizer.updates_per_rollout:
                        metrics["time/update"] = time.perf_counter() - update_started
                        metrics["time/total"] = time.perf_counter() - started
                        _finish_step(run, "grpo", metrics)
    _evaluate_once(run, AFTER, run.total, run.task.policy(state.average), reference, schedule)


def _finish_step(run: Run, phase: str, metrics: dict[str, Any]) -> None:
    state = run.state
    run.log.write_metrics({"step": state.step + 1, "phase": phase, **metrics})
    state.finish()
    last = state.step in (run.config.warm_start.steps, run.total)
    if last or state.step % run.config.run.checkpoint_every == 0:
        _save(run)
    run.listener.progress(Progress(state.step, run.total, phase, metrics))


def _save(run: Run, more: int = 0) -> None:
    """Save the last finished step; its rows reach the disk first."""
    run.log.flush()
    save_checkpoint(
        run.directory / "checkpoints",
        run.state.step,
        run.state.finished_tensors(),
        run.state.made_with,
        keep=run.config.run.keep_checkpoints + more,
    )
    run.saved = run.state.step


def _save_last_step(run: Run, error: BaseException) -> str:
    """Save what a run that ends would lose; returns what became of it, as a sentence.

    No other checkpoint goes for it: where the weights are what ended the run, those are needed.
    """
    step = run.state.step
    if run.saved < step and not isinstance(error, CheckpointError):
        try:
            _save(run, more=1)
        except (CheckpointError, OSError, MemoryError) as failed:
            return f"step {step} could not be saved: {failed}"
    if run.saved < step:
        return f"step {step} is lost; the newest checkpoint is of step {run.saved}"
    earlier = [str(step_of(path)) for path in checkpoints(run.directory / "checkpoints")[:-1]]
    if isinstance(error, DivergedError) and earlier:
        return f"step {step} is saved; --resume-at goes back to step {' or '.join(earlier)}"
    return f"step {step} is saved"


def _reference(run: Run) -> Policy:
    """The policy of the end of the warm start: the KL's reference, and the frozen answerer.

    It is kept in a folder of its own, because the checkpoints of the warm start are deleted.
    """
    folder, state = run.directory / "reference", run.state
    model = run.task.new_model()
    if state.step == run.config.warm_start.steps:
        state.begin_policy_phase(run.config)
        save_checkpoint(folder, state.step, state.model.state_dict(), state.made_with, keep=1)
    saved = load_newest(folder)
    if saved is None:
        raise FileNotFoundError(f"{folder}: the reference policy of this run is missing")
    saved.require(state.made_with)
    load_weights(model, saved, "")
    return run.task.policy(model.requires_grad_(False))


def _evaluate_once(
    run: Run, label: str, step: int, policy: Policy, reference: Policy, schedule: FlowSchedule
) -> None:
    # A run that was given more steps is evaluated again at its new end.
    done = [(row.get("label"), row["step"]) for row in read_evals(run.directory)]
    if (label, step) in done:
        return
    run.listener.message(f"evaluating on held-out prompts: {label}")
    row, gallery = evaluate(
        policy,
        run.task,
        run.config.rollout,
        schedule,
        reference=reference,
        items=run.config.run.eval_items,
        gallery_items=run.config.run.gallery_items,
        seed=run.config.run.seed,
        progress=partial(run.listener.evaluation, label),
    )
    save_gallery(run.directory, label, gallery)
    run.log.write_eval({"step": step, "label": label, **row})


class SelfTestError(RuntimeError):
    """The update does not reproduce the log-probabilities of the rollout."""


#: Two fp32 passes over the same tokens differ by rounding; a wrong mask, position or schedule
#: differs by orders of magnitude more.
SELF_TEST_TOLERANCE = 1e-3


def check_ratio(metrics: dict[str, Any]) -> None:
    """Before the first update the policy is the sampler, so every ratio must be one.

    Raises:
        SelfTestError: it is not; training on such ratios goes wrong slowly and in silence.
    """
    for key, value in metrics.items():
        is_extreme = key.startswith("ratio/") and key.endswith(("/min", "/max"))
        if is_extreme and not abs(value - 1) <= SELF_TEST_TOLERANCE:
            raise SelfTestError(
                f"self test: {key} is {value:.6g} before the first update, expected 1 within "
                f"{SELF_TEST_TOLERANCE}: rollout and update disagree about the same tokens"
            )
