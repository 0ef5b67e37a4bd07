"""What a trainer hands over: rewards that nobody gave, lists, other integers, graphs, schedules."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from presets import ADVANTAGE_FORMS
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from lvrpo import backends
from lvrpo.ops.normalize_advantages import normalize_advantages
from lvrpo.params.advantages import (
    ADVANTAGE_PRESETS,
    ADVANTAGE_STATS,
    AdvantageParams,
    Advantages,
)

pytestmark = pytest.mark.usefixtures("poison_empty")

INF, NAN = math.inf, math.nan
PARAMS = {name: AdvantageParams.preset(name) for name in ADVANTAGE_PRESETS} | {
    "clipped": AdvantageParams(clip=0.7),
    "batch scale, whitened": AdvantageParams(combine="sum", scale="batch", whiten="token"),
}


def flat(result: Advantages) -> list[Tensor]:
    fields = [getattr(result.stats, name) for name in (*ADVANTAGE_STATS, "all_zero")]
    return [result.values, result.per_reward, *fields]


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    torch._dynamo.reset()
    return torch.compile(function, fullgraph=True, backend="aot_eager")


#: Host: values are read and refused. Unread: a graph, in which they are not.
PATHS = {"host": lambda f: f, "unread": compiled}


@pytest.mark.parametrize("path", PATHS)
def test_a_sample_that_no_reward_scored(backend, path):
    r = torch.tensor([1.0, 0.0, NAN, 1.0])
    for name in ("grpo", "gdpo"):
        params = AdvantageParams.preset(name)
        call = PATHS[path](
            lambda r, p=params: normalize_advantages(r, 4, params=p, backend=backend)
        )
        expected = [0.57735, -1.15470, 0.0, 0.57735]
        assert call(r).values.tolist() == pytest.approx(expected, rel=1e-3)


def table_with_unscored(rewards: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    sizes = [5, 4, 1, 0, 6, 3]
    r = torch.rand(sum(sizes), rewards, dtype=torch.float64)
    r[1::4, 0] = NAN
    r[[0, 7, 9, 14]] = NAN  # the tenth is a group of its own
    r[16:] = NAN  # and so are the last three
    scored = ~r.isnan().all(1)
    return r, torch.tensor([0, *sizes]).cumsum(0), torch.randint(1, 20, (len(r),)), scored


@pytest.mark.parametrize(
    ("path", "rewards", "name"),
    [("host", rewards, name) for rewards in (1, 3) for name in PARAMS]
    + [("unread", 3, name) for name in ADVANTAGE_FORMS],
)
def test_an_unscored_sample_is_as_if_it_were_not_there(backend, path, rewards, name):
    params = PARAMS[name]
    r, groups, lengths, scored = table_with_unscored(rewards)

    def call(r: Tensor, groups: Tensor, lengths: Tensor) -> Advantages:
        return normalize_advantages(r, groups, lengths=lengths, params=params, backend=backend)

    ours = flat(PATHS[path](call)(r, groups, lengths))
    kept = torch.tensor([0, *scored.long().cumsum(0).tolist()])[groups]
    without = flat(call(r[scored], kept, lengths[scored]))
    for values, expected in zip(ours[:2], without[:2], strict=True):
        torch.testing.assert_close(values[scored], expected)
        assert (values[~scored] == 0).all()
    share = ours.pop(6) * len(r) / int(scored.sum())  # applicable is a fraction of all samples
    torch.testing.assert_close(share, without.pop(6))
    for statistic, expected in zip(ours[2:], without[2:], strict=True):
        torch.testing.assert_close(statistic, expected, equal_nan=True)


@pytest.mark.parametrize("params", PARAMS.values(), ids=PARAMS.keys())
def test_nobody_is_scored(backend, params):
    ours = normalize_advantages(
        torch.full((6, 2), NAN), 3, lengths=torch.arange(6), params=params, backend=backend
    )
    assert (ours.values == 0).all()
    assert (ours.per_reward == 0).all()
    assert bool(ours.stats.all_zero)


@pytest.mark.parametrize("name", ADVANTAGE_FORMS)
def test_what_nobody_could_refuse_does_not_count(backend, name):
    params = PARAMS[name]
    r, groups, lengths, _ = table_with_unscored(2)

    def call(r: Tensor) -> Advantages:
        return normalize_advantages(r, groups, lengths=lengths, params=params, backend=backend)

    graph = compiled(call)
    for bad in (INF, -INF):
        poisoned = r.where(~r.isnan(), bad)
        with pytest.raises(ValueError, match="expected a finite number"):
            call(poisoned)
        for ours, expected in zip(flat(graph(poisoned)), flat(call(r)), strict=True):
            torch.testing.assert_close(ours, expected, equal_nan=True)


def test_weights_and_lengths_that_nobody_could_refuse(backend):
    r, lengths = torch.rand(8, 2), torch.arange(8)
    params = AdvantageParams.preset("opo")

    def call(weights: Tensor, lengths: Tensor) -> Tensor:
        return normalize_advantages(
            r, 4, weights=weights, lengths=lengths, params=params, backend=backend
        ).values

    unread = compiled(call)
    for bad in (NAN, INF, -INF):
        ours = unread(torch.tensor([1.0, bad]), torch.where(lengths == 2, -7, lengths))
        expected = call(torch.tensor([1.0, 0.0]), torch.where(lengths == 2, 0, lengths))
        torch.testing.assert_close(ours, expected)


LENGTHS = [3, 1, 4, 2, 5, 6]
SAME = {
    "lists": {"rewards": [1.0, 0.0, 3.0, None, 2.0, 5.0], "lengths": LENGTHS, "groups": [0, 4, 6]},
    "lists of lists": {"rewards": [[1], [0], [3], [None], [2], [5]], "weights": [1.0]},
    "int32": {
        "groups": torch.tensor([0, 4, 6], dtype=torch.int32),
        "lengths": torch.tensor(LENGTHS, dtype=torch.int32),
    },
    "uint8 and int16": {
        "groups": torch.tensor([0, 4, 6], dtype=torch.uint8),
        "lengths": torch.tensor(LENGTHS, dtype=torch.int16),
    },
    "weights of another dtype": {"weights": torch.ones(1, dtype=torch.int64)},
    "a column": {"rewards": torch.tensor([1.0, 0.0, 3.0, NAN, 2.0, 5.0])[:, None]},
}


@pytest.mark.parametrize("name", ["decoupled", "opo", "gdpo_token"])
@pytest.mark.parametrize("change", SAME.values(), ids=SAME.keys())
def test_the_same_call_in_other_words(backend, change, name):
    plain = {
        "rewards": torch.tensor([1.0, 0.0, 3.0, NAN, 2.0, 5.0]),
        "groups": torch.tensor([0, 4, 6]),
        "lengths": torch.tensor(LENGTHS),
        "params": AdvantageParams.preset(name),
        "backend": backend,
    }
    device = plain["rewards"].device
    moved = {k: x.to(device) if isinstance(x, Tensor) else x for k, x in change.items()}
    for ours, expected in zip(
        flat(normalize_advantages(**plain | moved)),
        flat(normalize_advantages(**plain)),
        strict=True,
    ):
        assert ours.dtype == expected.dtype
        assert torch.equal(ours.nan_to_num(-7.0), expected.nan_to_num(-7.0))


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8, torch.bool], ids=str)
def test_rewards_of_any_dtype(backend, dtype):
    r = torch.tensor([0, 1, 1, 0, 1, 0]).to(dtype)
    ours = normalize_advantages(r, 3, backend=backend)
    expected = normalize_advantages(r.float(), 3, backend=backend)
    assert ours.values.dtype == torch.float32
    assert torch.equal(ours.values, expected.values)


def test_integers_that_fp32_cannot_tell_apart(backend):
    r = torch.tensor([2**24, 2**24 + 1])
    params = AdvantageParams.preset("dr_grpo")
    ours = normalize_advantages(r, 2, params=params, backend=backend)
    assert ours.values.tolist() == [-0.5, 0.5]


def test_tensors_made_under_inference_mode(backend):
    with torch.inference_mode():
        r, groups, lengths = torch.rand(6, 2), torch.tensor([0, 4, 6]), torch.arange(6)
    params = AdvantageParams.preset("gdpo_token")
    ours = normalize_advantages(r, groups, lengths=lengths, params=params, backend=backend).values
    weight = torch.ones(6, requires_grad=True)
    (ours * weight).sum().backward()
    assert torch.equal(weight.grad, ours)


@pytest.mark.parametrize("name", ADVANTAGE_FORMS)
def test_autocast_changes_nothing(backend, name):
    """An op of the fp32 list: what comes is taken as it is."""
    r, lengths = torch.rand(12, 2), torch.arange(12)
    call = {"lengths": lengths, "params": PARAMS[name], "backend": backend}
    with torch.autocast(r.device.type, torch.bfloat16):
        ours = normalize_advantages(r, 4, **call)
    for x, y in zip(flat(ours), flat(normalize_advantages(r, 4, **call)), strict=True):
        assert torch.equal(x, y)


def test_rewards_that_are_not_numbers():
    with pytest.raises(ValueError, match="rewards is a list that no tensor can be made of"):
        normalize_advantages([1.0, "two"], 2)


NUMBERS: dict[str, Callable[[Any], dict[str, Any]]] = {
    "eps": lambda x: {"params": AdvantageParams(eps=x)},
    "std_floor": lambda x: {"params": AdvantageParams(std_floor=x)},
    "clip": lambda x: {"params": AdvantageParams.preset("grpo", clip=x)},
    "params": lambda x: {"params": x},
    "weights": lambda x: {"weights": [x, 1 - x]},
    "groups": lambda x: {"groups": x},
}


@pytest.mark.parametrize("number", NUMBERS)
def test_a_number_is_not_a_constant_of_a_graph(backend, number):
    """A custom op's float would be: the ninth raises under fullgraph=True."""
    r = torch.rand(24, 2)
    values: list[Any] = [0.05 + 0.07 * i for i in range(12)]
    if number == "groups":
        r = torch.rand(2**3 * 3**2 * 5 * 7 * 11, 2)  # what many sizes divide
        values = [2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 14]
        if backends.triton_interprets():  # a millisecond for every sample
            r, values = torch.rand(24, 2), [2, 3, 4, 6, 8, 12]
    if number == "params":
        values = [AdvantageParams.preset("grpo_batch", eps=x, clip=1 + x) for x in values]

    def function(x: Any) -> Tensor:
        return normalize_advantages(
            **{"rewards": r, "groups": 12, "backend": backend} | NUMBERS[number](x)
        ).values

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    graph = torch.compile(function, fullgraph=True, backend=counter)
    results = [graph(x) for x in values]
    assert counter.frame_count <= 2
    for x, result in zip(values, results, strict=True):
        assert torch.equal(result, function(x))
