"""Groups by name: samples in any order are what they are where their groups follow each other."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from presets import ADVANTAGE_FORMS
from torch import Tensor

from lvrpo.ops.normalize_advantages import normalize_advantages
from lvrpo.params.advantages import (
    ADVANTAGE_PRESETS,
    ADVANTAGE_STATS,
    AdvantageParams,
    Advantages,
)

pytestmark = pytest.mark.usefixtures("poison_empty")

#: From the number of a group to what it is called.
NAMES: dict[str, Callable[[int], Any]] = {
    "integers": lambda i: 17 - 5 * i,
    "strings": lambda i: f"prompt {i % 3}{i}",
    "mixed": lambda i: i if i % 2 else f"{i}",
    "uuids": lambda i: uuid.UUID(int=(i * 2**90 + 7)),
}


def table(sizes: list[int]) -> tuple[Tensor, list[int], Tensor]:
    """Rewards of which some do not apply, the number of each sample's group, and lengths."""
    batch = sum(sizes)
    rewards = torch.rand(batch, 2, dtype=torch.float64).round(decimals=1)
    rewards[torch.rand(batch, 2) < 0.2] = torch.nan
    numbers = [i for i, size in enumerate(sizes) for _ in range(size)]
    return rewards, numbers, torch.randint(1, 30, (batch,))


def flat(result: Advantages) -> list[Tensor]:
    fields = [getattr(result.stats, name) for name in (*ADVANTAGE_STATS, "all_zero")]
    return [result.values, result.per_reward, *fields]


@settings(
    max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    sizes=st.lists(st.integers(1, 6), min_size=1, max_size=6),
    names=st.sampled_from(list(NAMES.values())),
    preset=st.sampled_from(sorted(ADVANTAGE_PRESETS)),
    seed=st.integers(0, 2**31),
)
def test_any_order_and_any_names(backend, sizes, names, preset, seed):
    torch.manual_seed(seed)
    rewards, numbers, lengths = table(sizes)
    offsets = torch.tensor([0, *sizes]).cumsum(0)
    options = {"params": AdvantageParams.preset(preset), "backend": backend}
    together = normalize_advantages(rewards, offsets, lengths=lengths, **options)

    order = torch.randperm(len(rewards))
    ids = [names(numbers[i]) for i in order.tolist()]
    apart = normalize_advantages(rewards[order], group_ids=ids, lengths=lengths[order], **options)
    torch.testing.assert_close(apart.values, together.values[order])
    torch.testing.assert_close(apart.per_reward, together.per_reward[order])
    for ours, expected in zip(flat(apart)[2:], flat(together)[2:], strict=True):
        torch.testing.assert_close(ours, expected, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8])
def test_a_tensor_of_names(backend, dtype):
    rewards, numbers, _ = table([4, 1, 3])
    order = torch.randperm(8)
    ids = torch.tensor([3, 0, 9])[torch.tensor(numbers)][order].to(dtype)
    ours = normalize_advantages(rewards[order], group_ids=ids, backend=backend)
    by_list = normalize_advantages(rewards[order], group_ids=ids.tolist(), backend=backend)
    for x, y in zip(flat(ours), flat(by_list), strict=True):
        torch.testing.assert_close(x, y, equal_nan=True)


def test_an_array_of_objects():
    numpy = pytest.importorskip("numpy")
    rewards, ids = torch.tensor([1.0, 4.0, 0.0, 2.0]), ["b", "a", "b", "a"]
    expected = normalize_advantages(rewards, group_ids=ids).values
    for array in (numpy.array(ids), numpy.array(ids, dtype=object)):
        assert torch.equal(normalize_advantages(rewards, group_ids=array).values, expected)


@pytest.mark.parametrize("preset", ADVANTAGE_FORMS)
def test_a_graph_sorts_them_too(preset):
    rewards, numbers, lengths = table([3, 2, 4])
    order = torch.randperm(9)
    given = (rewards[order], torch.tensor(numbers)[order], lengths[order])

    def call(rewards: Tensor, ids: Tensor, lengths: Tensor) -> Tensor:
        params = AdvantageParams.preset(preset)
        return normalize_advantages(rewards, group_ids=ids, lengths=lengths, params=params).values

    torch._dynamo.reset()
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*given), call(*given))


def test_no_samples():
    assert normalize_advantages(torch.zeros(0), group_ids=[]).values.shape == (0,)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "groups and group_ids are both None"),
        ({"groups": 2, "group_ids": [1, 1, 2, 2]}, "both given"),
        ({"group_ids": [1, 2]}, r"group_ids has shape \(2,\), expected \[4\]"),
        ({"group_ids": torch.zeros(4)}, "group_ids is torch.float32, expected an integer dtype"),
        ({"group_ids": [0.5, 0.5, 1, 1]}, "group_ids has 0.5, a float"),
        ({"group_ids": [[1], [1], [2], [2]]}, r"group_ids has \[1\], a list"),
    ],
)
def test_what_names_no_group_is_refused(given, message):
    with pytest.raises(ValueError, match=message):
        normalize_advantages(torch.rand(4), **given)
