"""Heads that FSDP2 and DTensor have split give the gradients of whole ones."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import shared_models
import torch
from rank_pool import Ranks, ranks

from lvrpo import distributed


@pytest.fixture(scope="module")
def groups() -> Iterator[dict[int, Ranks]]:
    with ranks(2) as two, ranks(4) as four:
        yield {2: two, 4: four}


@pytest.mark.parametrize("size", [2, 4])
def test_fsdp(groups, size):
    groups[size].run(shared_models.check_fsdp)


def test_mixed_precision_of_fsdp(groups):
    groups[2].run(shared_models.check_mixed_precision)


@pytest.mark.parametrize("vocab", [23, 5], ids="{} columns".format)
@pytest.mark.parametrize("size", [2, 4])
def test_dtensor(groups, size, vocab):
    groups[size].run(shared_models.check_dtensor, vocab)


def test_fsdp_of_a_shared_vocabulary(groups):
    groups[4].run(shared_models.check_fsdp_of_a_shared_vocabulary)


@pytest.mark.parametrize(
    ("placement", "message"),
    [
        ("columns", "weight has placements (Shard(dim=1),), expected Shard(0)"),
        ("whole", "weight has placements (Replicate(),), expected Shard(0)"),
        ("descending", "weight is split over the ranks [1, 0], expected a mesh of ascending ranks"),
        ("rows", "hidden has placements (Shard(dim=0),), expected Replicate()"),
    ],
)
def test_other_placements(groups, placement, message):
    assert all(message in found for found in groups[2].run(shared_models.refused, placement))


@pytest.mark.parametrize("bias", [True, False])
def test_a_loss_head_is_the_head(bias):
    head = torch.nn.Linear(3, 5, bias=bias)
    ours, hidden = distributed.LossHead(head), torch.randn(2, 4, 3)
    assert torch.equal(ours(hidden), head(hidden))
    assert ours.state_dict().keys() == head.state_dict().keys()
    assert ours.weight is head.weight


def test_a_part_needs_shards():
    with pytest.raises(
        ValueError, match=r"shards is None and weight is no DTensor; make shards once"
    ):
        distributed.linear_logprobs(torch.zeros(1, 2), torch.zeros(3, 2), [0])
