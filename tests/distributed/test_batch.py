"""Samples that are dealt to ranks have the statistics of one batch."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import shared_batches
import torch
from loss_inputs import PARAMS
from rank_pool import Ranks, ranks

from lvrpo import AdvantageParams, LossParams
from lvrpo.params.advantages import ADVANTAGE_PRESETS

#: Samples of the ranks: groups are cut, a rank has none.
COUNTS = ([6, 6], [1, 11], [0, 12])


@pytest.fixture(scope="module")
def group() -> Iterator[Ranks]:
    with ranks(2) as group:
        yield group


@pytest.mark.parametrize("named", [False, True], ids=["offsets", "names in any order"])
@pytest.mark.parametrize("preset", ADVANTAGE_PRESETS)
def test_advantages(group, preset, named):
    for counts in COUNTS:
        params = AdvantageParams.preset(preset)
        group.run(shared_batches.check_advantages, counts, params, named)


def test_equal_groups_over_ranks(group):
    plain = AdvantageParams.preset("dr_grpo")
    given = [{"groups": 2, "params": plain}] * 2
    found = group.run(shared_batches.advantages, [[1.0], torch.tensor([3.0])], given)
    assert [x.tolist() for x in found] == [[-1.0], [1.0]]


@pytest.mark.parametrize(
    ("rewards", "given", "message"),
    [
        (
            [[1.0], [1.0, 2.0]],
            [{"groups": 2}] * 2,
            "groups is 2, expected a size >= 1 that divides",
        ),
        ([[1.0], [[1.0, 2.0]]], [{"groups": 2}] * 2, "rewards of a sample is .. on rank 0"),
        ([[1.0], [1]], [{"groups": 2}] * 2, "dtype of rewards is torch.float32 on rank 0"),
        ([[1.0], [1.0]], [{"groups": 2}, {"groups": 1}], "groups is 2 on rank 0"),
        ([[1.0], [1.0]], [{"group_ids": [1]}, {"group_ids": [1, 2]}], "group_ids has 2 entries"),
        ([[1.0], [1.0]], [{"group_ids": [1]}, {"groups": 2}], "ranks disagree: group_ids is given"),
    ],
)
def test_all_ranks_refuse_what_does_not_fit(group, rewards, given, message):
    found = group.outcomes(shared_batches.advantages, rewards, given)
    for error in found:
        assert isinstance(error, ValueError), getattr(error, "trace", error)
        assert message in str(error).replace("[]", "..")


@pytest.mark.parametrize("params", PARAMS.values(), ids=PARAMS)
def test_losses_add_up(group, params):
    for counts in COUNTS:
        group.run(shared_batches.check_loss, counts, params)


def test_denominators(group):
    params = [
        LossParams(aggregation="token_mean"),
        LossParams(aggregation="token_sum"),
        LossParams(),
        LossParams(count_empty=False),
    ]
    packed = torch.tensor([1.0, 0.0, 1.0, 0.0]), [0, 0, 1, 3, 4], params
    padded = [[True, False], [True, False], [False, False], [False, False]], None, params
    for given in (packed, padded):
        assert group.run(shared_batches.denominators, *given) == [[4.0, 1.0, 8.0, 4.0]] * 2


@pytest.mark.parametrize("fraction", [0.0, 0.2, 1.0])
def test_the_threshold_of_all_tokens(group, fraction):
    for counts in ([7, 13], [0, 9], [5, 5]):
        group.run(shared_batches.check_threshold, counts, fraction)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (([0.2, 0.3], 1.0), "ranks disagree: fraction is 0.2 on rank 0"),
        (([0.2, 2.0], 1.0), "fraction is 2.0"),
        (([0.2, 0.2], float("nan")), "entropy[0] is nan"),
    ],
)
def test_all_ranks_refuse_a_threshold(group, given, message):
    for error in group.outcomes(shared_batches.threshold, *given):
        assert isinstance(error, ValueError), getattr(error, "trace", error)
        assert message in str(error)
