"""The loop with a journal that keeps everything in memory: it needs no file, and no directory."""

from __future__ import annotations

import pytest
import torch
from runs.tiny import Stop, StopAfter, tiny_config
from trainer.memory_journal import MemoryJournal

from lvrpo.runs.setup import Setup
from lvrpo.runs.signals import Signals
from lvrpo.trainer import loop
from lvrpo.trainer.loop import check_ratio, train
from lvrpo.trainer.task import Task
from lvrpo.trainer.update import merge_updates

#: 8 prompts of each skill by two samplings, and 2 of them eight times by five and by three.
SAMPLES = 2 * 8 * 2 + 2 * 8 * (5 + 3)


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Task:
    setup = Setup(tiny_config())
    return setup.task(setup.frozen_parts(tmp_path_factory.mktemp("task")))


@pytest.fixture(scope="module")
def whole(task: Task) -> MemoryJournal:
    journal = MemoryJournal()
    train(tiny_config(), task, journal, Signals())
    return journal


def test_a_whole_run(whole):
    assert [row["step"] for row in whole.rows] == [1, 2, 3, 4, 5, 6]
    assert [snapshot.step for snapshot in whole.saved] == [2, 3, 4, 6]
    assert [snapshot.step for snapshot in whole.references] == [3]
    assert list(whole.evals) == [("warm start", 3), ("after", 6)]
    assert all(gallery for _, gallery in whole.evals.values())
    assert whole.sampled[-1] == ("after", SAMPLES, SAMPLES)
    assert whole.begun == ("cpu", "float32")
    assert whole.end is None


def test_the_reference_is_what_the_policy_begins_with(whole):
    (reference,) = whole.references
    begun = whole.saved[1].tensors
    assert {f"model.{name}" for name in reference.tensors} == begun.keys()
    assert all(torch.equal(t, begun[f"model.{name}"]) for name, t in reference.tensors.items())


@pytest.mark.parametrize("steps", [1, 3, 5])
def test_a_run_that_ends_hands_over_its_last_step_and_goes_on_from_it(task, whole, steps):
    journal = MemoryJournal()
    with pytest.raises(Stop) as stop:
        train(tiny_config(), task, journal, StopAfter(steps))
    assert journal.end is not None
    error, step, finished = journal.end
    assert (error, step) == (stop.value, steps)
    assert finished is not None
    assert finished.step == steps
    journal.saved.append(finished)
    train(tiny_config(), task, journal, Signals())
    ours, theirs = journal.saved[-1].tensors, whole.saved[-1].tensors
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
    assert [row["step"] for row in journal.rows] == [1, 2, 3, 4, 5, 6]
    assert journal.evals.keys() == whole.evals.keys()


@pytest.mark.parametrize(("passes", "minibatches"), [(1, 1), (2, 1), (1, 2), (2, 2)])
def test_a_step_has_an_update_for_every_minibatch_of_every_pass(
    task, monkeypatch, passes, minibatches
):
    updates: list[dict[str, float]] = []

    def told(*arguments):
        updates.append(gradient(*arguments))
        return updates[-1]

    gradient = loop.policy_gradient
    monkeypatch.setattr(loop, "policy_gradient", told)
    journal, count = MemoryJournal(), passes * minibatches
    config = tiny_config(
        f"optimizer.updates_per_rollout={passes}", f"optimizer.minibatches={minibatches}"
    )
    train(config, task, journal, Signals())
    rows = [row for row in journal.rows if row["phase"] == "grpo"]
    assert len(updates) == count * len(rows)
    for step, row in enumerate(rows):
        of_step = updates[step * count : (step + 1) * count]
        assert row.items() >= merge_updates(of_step).items()
        # The first update finds the weights that sampled.
        check_ratio(of_step[0])
    moved = [update["ratio/image/max"] > 1 + 1e-5 for update in updates]
    assert any(moved) == (count > 1)
