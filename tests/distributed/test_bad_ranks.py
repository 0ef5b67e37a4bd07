"""Ranks that differ, refuse, die or never come end every rank's call, with words and in time."""

from __future__ import annotations

import re
from collections.abc import Iterator

import bad_ranks
import pytest
from rank_pool import Ranks, on_gpus, ranks

SIZE = 2


@pytest.fixture(scope="module")
def group() -> Iterator[Ranks]:
    with ranks(SIZE) as group:
        yield group


def messages(group: Ranks, kind: type[Exception], *call: object) -> list[str]:
    found = group.outcomes(*call)
    assert [type(x) for x in found] == [kind] * len(found), [getattr(x, "trace", x) for x in found]
    return [str(x) for x in found]


@pytest.mark.parametrize("name", bad_ranks.DIFFERENT)
def test_all_ranks_refuse_what_one_does(group, name):
    for message in messages(group, ValueError, bad_ranks.differ, name):
        assert re.search(bad_ranks.DIFFERENT[name][1], message), message
        assert message.startswith("distributed.linear_grpo_loss: ")
    group.run(bad_ranks.agree)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (([4, 4], [0, 5], [None] * 2), "do not cover the vocabulary at column 4"),
        (([4, 4], [0, 3], [None] * 2), "overlap at column 3"),
        (([4, 4], [1, 5], [None] * 2), "do not cover the vocabulary at column 0"),
        (([4, 4], None, [9] * 2), "vocab_size is 9, but the shards .* have 8 columns"),
        (([0, 0], None, [None] * 2), "expected at least one column"),
        (([4, 4], None, [8, None]), "ranks disagree: vocab_size"),
        (([4, 4], [0, None], [None] * 2), "ranks disagree: first is given"),
    ],
)
def test_shards_are_the_vocabulary(group, given, message):
    call = bad_ranks.shards, *given, ["float32"] * 2
    for found in messages(group, ValueError, *call):
        assert re.search(message, found), found


def test_shards_have_one_dtype(group):
    call = bad_ranks.shards, [4, 4], None, [None] * 2, ["float32", "bfloat16"]
    for message in messages(group, ValueError, *call):
        assert "dtype is torch.float32 on rank 0 of the group, but torch.bfloat16" in message


def test_shards_that_fit(group):
    found = group.run(bad_ranks.shards, [5, 0], [0, 5], [5] * 2, ["float32"] * 2)
    assert found == [((0, 5), (5, 5))] * 2
    found = group.run(bad_ranks.shards, [3, 5], [5, 0], [None] * 2, ["float32"] * 2)
    assert found == [((5, 8), (0, 5))] * 2


def test_a_row_that_is_no_distribution_on_one_rank(group):
    for message in messages(group, ValueError, bad_ranks.not_a_number):
        assert "row 0 of hidden @ weight.T + bias has no finite log-sum-exp" in message


def test_logits_whose_digits_are_lost(group):
    group.run(bad_ranks.far_apart, 4000.0)
    for message in messages(group, ValueError, bad_ranks.far_apart, 4200.0):
        assert "beyond 4,096 in fp32" in message


@pytest.mark.parametrize("call", [bad_ranks.die_before_the_others, bad_ranks.stand_still])
def test_a_rank_that_does_not_come_ends_the_others(call):
    with ranks(SIZE, timeout=3.0) as group:
        group.run(bad_ranks.agree)
        found = group.outcomes(call)
    if on_gpus(SIZE):  # NCCL's watchdog ends the process
        assert isinstance(found[0], RuntimeError | ChildProcessError), found
    else:
        assert isinstance(found[0], RuntimeError), found
        assert "distributed.linear_grpo_loss: a rank of the group did not answer" in str(found[0])
