"""A run of several processes is that of one: the same samples, metrics and weights."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import pytest
import shared_runs
import shared_shares
import torch
from rank_pool import Ranks, ranks
from shared_runs import Told
from torch import Tensor

PLAIN = ("run.eval_items=5", "rollout.understand_prompts=5", "rollout.generate_prompts=4")
#: Settings, and a reward of answers in place of theirs.
RUNS = {
    "both skills": ((), ""),
    "minibatches": (("optimizer.minibatches=2", "optimizer.updates_per_rollout=2"), ""),
    "many packs, shuffled": (("optimizer.max_rows=40", "run.shuffle_rewards=true"), ""),
    "resampling": (("rollout.resample_rounds=2", "rewards.understand={constant=1.0}"), "constant"),
    "corrected sampler": (
        ("rollout.top_p=0.8", "loss.sampler_correction=tis", "rewards.truncated=mask"),
        "",
    ),
    "shared weights": (("run.shard=true",), ""),
    "shared weights, unequal packs": (
        (
            *("run.shard=true", "optimizer.max_rows=40", "optimizer.minibatches=2"),
            *("warm_start.generate_batch=1", "warm_start.understand_batch=1"),
        ),
        "",
    ),
    "answers alone": (
        ("rollout.generate_prompts=0", "warm_start.generate_batch=0", "run.eval_items=0"),
        "",
    ),
    "supervised": (("run.objective=supervised", "warm_start.understand_batch=3"), ""),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With the parts that every run begins with."""
    folder = tmp_path_factory.mktemp("parts")
    shared_runs.task_of(folder, PLAIN)
    return folder


@pytest.fixture(scope="module")
def groups() -> Iterator[dict[int, Ranks]]:
    with ranks(2) as two, ranks(4) as four:
        yield {2: two, 4: four}


def assert_same(found: Told, expected: Told) -> None:
    """To rounding; what a clock measured is left out."""
    assert found.error == expected.error
    assert found.sampled == expected.sampled
    for ours, theirs in zip(found.rows, expected.rows, strict=True):
        assert ours.keys() == theirs.keys()
        for name, value in theirs.items():
            if not name.startswith("time/"):
                assert same(ours[name], value), (theirs["step"], name, ours[name], value)
    assert found.evals.keys() == expected.evals.keys()
    for name, (measurements, gallery) in expected.evals.items():
        for ours, theirs in zip(found.evals[name][0], measurements, strict=True):
            assert (ours.uids, ours.scores.keys()) == (theirs.uids, theirs.scores.keys())
            for measure, scores in theirs.scores.items():
                assert all(map(same, ours.scores[measure], scores)), (name, theirs.sampling)
            assert all(map(same, ours.diversity, theirs.diversity))
        assert [item.answer for item in found.evals[name][1]] == [i.answer for i in gallery]
    for name, tensor in expected.saved[-1].tensors.items():
        torch.testing.assert_close(found.saved[-1].tensors[name], tensor)


def assert_near(told: Sequence[Told], sharded: Sequence[Told], alone: Told) -> None:
    """Ranks have the same weights to the bit, sharded or not, and those of one process nearly.

    bf16 rounds packs of other rows otherwise, by less than the weights have moved since step 1.
    """
    assert not alone.error
    assert told[0].sampled == alone.sampled
    assert told[0].rows[0]["phase"] == "warm_start"
    final, expected = (each.saved[-1].tensors for each in (told[0], alone))
    assert {tensor.dtype for tensor in final.values()} <= {torch.float32, torch.int64}
    for other in (*told[1:], *sharded):
        assert_same(other, told[0])
        for name, tensor in final.items():
            assert torch.equal(other.saved[-1].tensors[name], tensor), name
    assert apart(final, expected) < 0.2 * apart(alone.saved[0].tensors, expected)


def apart(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> float:
    """How far the weights of two snapshots are from each other."""
    names = [name for name in theirs if name.startswith("model.")]
    return math.hypot(*(float((ours[name] - theirs[name]).norm()) for name in names))


def same(found: object, expected: object) -> bool:
    if isinstance(expected, float) and isinstance(found, float):
        return math.isclose(found, expected, rel_tol=1e-5, abs_tol=1e-8)
    return found == expected


@pytest.mark.parametrize("name", RUNS)
def test_as_one_process(groups, folder, name):
    settings, reward = RUNS[name]
    alone = shared_runs.run(folder, (*PLAIN, *settings), reward)
    assert not alone.error
    for group in groups.values():
        for told in group.run(shared_runs.run, folder, (*PLAIN, *settings), reward):
            assert_same(told, alone)


@pytest.mark.parametrize("prompts", [(5, 4), (4, 0), (0, 4)])
def test_ranks_that_make_as_many_passes_as_any_other(groups, folder, prompts):
    settings = (
        *PLAIN,
        "optimizer.max_rows=40",
        "run.eval_items=0",
        *map("rollout.{}_prompts={}".format, ("understand", "generate"), prompts),
    )
    alone = shared_runs.run(folder, settings)
    for group in groups.values():
        for told in group.run(shared_runs.run, folder, settings, "", ((), ()), True):
            assert_same(told, alone)


def test_two_processes_in_bf16(groups, folder):
    settings = (*PLAIN, "run.precision=bf16", "run.checkpoint_every=1")
    alone = shared_runs.run(folder, settings)
    told = groups[2].run(shared_runs.run, folder, settings)
    assert_near(told, groups[2].run(shared_runs.run, folder, (*settings, "run.shard=true")), alone)


def test_an_error_of_one_is_of_all(groups, folder):
    settings = (*PLAIN, "rewards.understand={failing=1.0}", "run.eval_items=0")
    for told in groups[2].run(shared_runs.run, folder, settings, "failing"):
        assert told.error.startswith("RewardError: reward 'failing' raised KeyError: 'no such")
        assert [row["step"] for row in told.rows] == [1, 2, 3]


@pytest.mark.parametrize("before", [1, 2, 4])
def test_a_run_goes_on_with_other_processes(groups, folder, before):
    """Its last step is made by so many as did not make the others."""
    alone = shared_runs.run(folder, PLAIN)
    settings = (*PLAIN, "run.checkpoint_every=1", "run.keep_checkpoints=9")

    def run(size: int, *arguments: object) -> Told:
        if size == 1:
            return shared_runs.run(folder, settings, *arguments)
        return groups[size].run(shared_runs.run, folder, settings, *arguments)[0]

    begun = run(before)
    saved = [snapshot for snapshot in begun.saved if snapshot.step <= 5]
    went_on = run({1: 2, 2: 4, 4: 1}[before], "", (saved, begun.references))
    assert [row["step"] for row in went_on.rows] == [6]
    whole = went_on._replace(
        rows=[*begun.rows[:5], *went_on.rows],
        sampled=[*begun.sampled[:2], *went_on.sampled],
        evals=begun.evals | went_on.evals,
    )
    assert_same(whole, alone)


def test_samples_of_copies_of_a_prompt_are_told_apart(groups):
    for group in groups.values():
        group.run(shared_shares.check_copies)


@pytest.mark.parametrize("seed", range(6))
def test_what_ranks_learn_from_is_the_whole_and_each_group_once(groups, seed):
    for size, group in groups.items():
        group.run(shared_shares.check_shares, seed)
        rows = [sum(share["rows"]) for share in group.run(shared_shares.share, seed)]
        longest = max(shared_shares.whole(seed)["rows"])
        assert max(rows) <= sum(rows) / size + (1 - 1 / size) * longest


@pytest.mark.parametrize("name", shared_shares.MISTAKES)
def test_a_mistake_is_noticed(groups, name):
    assert any(groups[4].run(shared_shares.is_noticed, name))
