"""A run that computes in bf16, against the same one in fp32."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from runs.tiny import Stop, StopAfter, tiny_config
from trainer.memory_journal import MemoryJournal

from lvrpo.models.unified import model
from lvrpo.runs.setup import Setup
from lvrpo.runs.signals import Signals
from lvrpo.trainer import loop
from lvrpo.trainer.loop import train
from lvrpo.trainer.placement import leaves_no_group, place_frozen, place_trained, whole

BF16, UNMEASURED = "run.precision=bf16", "run.eval_items=0"
#: A warm start that learns something, and no evaluation.
LEARNS = (
    "warm_start.steps=60",
    "run.steps=0",
    "warm_start.understand_batch=16",
    "run.eval_items=0",
)


def trained(
    folder: Path, *overrides: str, journal: MemoryJournal | None = None, steps: int = 0
) -> MemoryJournal:
    config = tiny_config(*overrides)
    setup = Setup(config)
    task = setup.task(setup.frozen_parts(folder / config.run.precision))
    journal = journal or MemoryJournal()
    if steps:
        with pytest.raises(Stop):
            train(config, task, journal, StopAfter(steps))
    else:
        train(config, task, journal, Signals())
    return journal


def test_a_run_learns_the_same(tmp_path):
    """Its losses are those of fp32 to the digits that bf16 has, and so is how far it comes."""
    wide, narrow = (trained(tmp_path, *LEARNS, *more).rows for more in ((), (BF16,)))
    assert wide[-1]["loss/text"] < 0.8 * wide[0]["loss/text"]
    for name in ("loss/text", "loss/image"):
        found = [row[name] for row in narrow]
        assert found == pytest.approx([row[name] for row in wide], rel=2**-4)


@leaves_no_group()
def test_updates_are_smaller_than_the_roundings_of_what_computes(tmp_path):
    """Most weights of a step move by less than their copy in bf16 can tell, and are not lost."""
    config = tiny_config(BF16)
    setup = Setup(config)
    policy = place_trained(setup.new_policy(setup.unfitted_parts()), config.run)
    reference = place_frozen(setup.new_policy(setup.unfitted_parts()), config.run)
    assert {p.dtype for p in reference.network.parameters()} == {torch.bfloat16}
    with whole(policy):
        computing = {name: p.clone() for name, p in policy.module.named_parameters()}
        assert {p.dtype for p in computing.values()} == {torch.bfloat16}
    journal = trained(tmp_path, BF16, "warm_start.steps=1", "warm_start.lr=1e-5", steps=1)
    after = journal.saved[-1].tensors["model.head.weight"]
    assert after.dtype == torch.float32
    head = policy.module.state_dict()["head.weight"].to_local()
    assert (after != head).double().mean() > 0.9
    assert (after.bfloat16() == computing["head.weight"]).double().mean() > 0.5


def test_what_is_saved_is_in_fp32_and_goes_on_bit_for_bit(tmp_path):
    whole_run = trained(tmp_path, BF16)
    assert whole_run.begun == ("cpu", "bfloat16")
    resumed = trained(tmp_path, BF16, steps=2)
    assert resumed.end is not None
    assert resumed.end[2] is not None
    resumed.saved = [resumed.end[2]]
    trained(tmp_path, BF16, journal=resumed)
    ours, theirs = resumed.saved[-1].tensors, whole_run.saved[-1].tensors
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
    assert {tensor.dtype for tensor in ours.values()} == {torch.float32}


def test_a_pass_that_is_cut_off_leaves_the_weights_in_fp32(tmp_path, monkeypatch):
    whole_run = trained(tmp_path, BF16, UNMEASURED)
    gather, attend, rollouts = loop.gather_experience, model.packed_attention, []

    def gather_experience(*given, **named):
        rollouts.append("of a step")
        return gather(*given, **named)

    def packed_attention(*given, **named):
        if len(rollouts) == 2:
            raise Stop
        return attend(*given, **named)

    monkeypatch.setattr(loop, "gather_experience", gather_experience)
    monkeypatch.setattr(model, "packed_attention", packed_attention)
    cut = trained(tmp_path, BF16, UNMEASURED, steps=99)
    monkeypatch.undo()
    assert cut.end is not None
    assert cut.end[2] is not None
    assert cut.end[2].step == 4  # the first of the policy phase
    assert {tensor.dtype for tensor in cut.end[2].tensors.values()} == {torch.float32}
    cut.saved = [cut.end[2]]
    trained(tmp_path, BF16, UNMEASURED, journal=cut)
    ours, theirs = cut.saved[-1].tensors, whole_run.saved[-1].tensors
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


def test_a_run_of_one_process_leaves_no_group_behind(tmp_path):
    trained(tmp_path, BF16, steps=1)
    assert not torch.distributed.is_initialized()
