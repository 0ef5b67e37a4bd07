"""Work is dealt to ranks whole and evenly; what ranks make of errors, one process does too."""

from __future__ import annotations

import pickle
import random
from collections.abc import Sequence
from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st
from mistakes import Mistake

from lvrpo.data.example import Example
from lvrpo.runs.signals import Stopped
from lvrpo.trainer.ranks import ALONE, Ranks, balance
from lvrpo.trainer.sharing import of_rank, places

COSTS = st.lists(st.integers(0, 1000), max_size=40)
SIZES = st.integers(1, 9)


@given(COSTS, SIZES)
def test_no_rank_has_more_than_graham_s_bound(costs, size):
    owners = balance(costs, size)
    loads = [sum(of_rank(costs, owners, rank)) for rank in range(size)]
    assert sum(loads) == sum(costs)
    assert set(owners) <= set(range(size))
    assert max(loads) <= sum(costs) / size + (1 - 1 / size) * max(costs, default=0)


@given(st.lists(st.integers(0, 100), max_size=7), st.integers(1, 3))
def test_the_longest_first_is_four_thirds_of_the_best_deal_at_most(costs, size):
    def busiest(owners: Sequence[int]) -> int:
        return max(sum(of_rank(costs, owners, rank)) for rank in range(size))

    best = min(map(busiest, product(range(size), repeat=len(costs))))
    assert busiest(balance(costs, size)) <= (4 / 3 - 1 / (3 * size)) * best + 1e-9


@given(st.integers(0, 30), SIZES)
def test_equal_pieces_are_dealt_as_evenly_as_they_go(count, size):
    owners = balance([7.0] * count, size)
    counts = [owners.count(rank) for rank in range(size)]
    assert max(counts) - min(counts) <= 1


@given(SIZES, st.integers(1, 4), st.randoms(use_true_random=False))
def test_what_is_balanced_stays_where_it_is(size, each, draw):
    owners = [rank for rank in range(size) for _ in range(each)]
    draw.shuffle(owners)
    assert balance([5] * len(owners), size, owners) == owners


@given(st.lists(st.integers(0, 8), max_size=30), SIZES)
def test_copies_of_a_prompt_are_dealt_together(numbers, size):
    examples = [Example("generate", f"p{number}", "draw") for number in numbers]
    owners = Ranks(0, size).deal(examples)
    pairs = {(example.uid, owner) for example, owner in zip(examples, owners, strict=True)}
    assert len(owners) == len(examples)
    assert len(pairs) == len(set(numbers))


@given(st.lists(st.integers(0, 4), max_size=20))
def test_groups_find_their_place_again(owners):
    sent = [group for rank in range(5) for group in of_rank(range(len(owners)), owners, rank)]
    assert [sent[place] for place in places(owners)] == list(range(len(owners)))


def test_alone_errors_and_results_are_as_they_are():
    error = KeyError("x")

    def fail() -> None:
        raise error

    with pytest.raises(KeyError) as raised:
        ALONE.together(fail)
    assert raised.value is error
    assert (ALONE.together(lambda: 3), ALONE.first(lambda: 4), ALONE.gather(5)) == (3, 4, [5])


def test_a_signal_can_be_told_to_others():
    told = pickle.loads(pickle.dumps(Stopped(15)))
    assert (told.signum, str(told)) == (15, "stopped by SIGTERM")


BOUND, BEST = (
    test_no_rank_has_more_than_graham_s_bound,
    test_the_longest_first_is_four_thirds_of_the_best_deal_at_most,
)
MISTAKES = {
    "loads are not counted": Mistake(
        balance, "loads[rank] += cost", "loads[rank] += 0", BOUND, {"costs": [3, 2], "size": 2}
    ),
    "the shortest first": Mistake(
        balance, "-costs[i]", "costs[i]", BEST, {"costs": [1, 1, 2], "size": 2}
    ),
    "pieces leave a rank for an equal one": Mistake(
        balance,
        "next((i for i in left if preferred[i] in idle), i)",
        "i",
        test_what_is_balanced_stays_where_it_is,
        {"size": 4, "each": 4, "draw": random.Random(1)},
    ),
    "a place is the group": Mistake(
        places,
        "found[group] = place",
        "found[place] = group",
        test_groups_find_their_place_again,
        {"owners": [2, 0, 1, 0]},
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_noticed(name):
    assert MISTAKES[name].is_noticed()
