from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mutants.normalize_advantages import BEST_MUTANTS, LENGTH_MUTANTS, MUTANTS
from torch import Tensor

from lvrpo.backends import library
from lvrpo.dtypes import numbers_by_name
from lvrpo.ops.normalize_advantages import normalize_advantages
from lvrpo.params.advantages import (
    ADVANTAGE_CHOICES,
    ADVANTAGE_NUMBERS,
    ADVANTAGE_PRESETS,
    ADVANTAGE_STATS,
    AdvantageParams,
    Advantages,
)
from lvrpo.reference.normalize_advantages import normalize_advantages as reference
from lvrpo.testing import check_op

pytestmark = pytest.mark.usefixtures("poison_empty")

NAN = math.nan
# group sizes, number of rewards
SHAPES = {
    "one group": ([8], 1),
    "equal groups": ([4] * 6, 3),
    "ragged groups, one of them empty and one of a single sample": ([3, 1, 0, 7, 2], 2),
    "more groups than one thread's share": ([2] * 600, 2),
}
PARAMS = {name: AdvantageParams.preset(name) for name in ADVANTAGE_PRESETS} | {
    "population std": AdvantageParams(ddof=0, whiten=False),
    "batch scale": AdvantageParams(scale="batch", whiten=False),
    "sum, batch scale": AdvantageParams(combine="sum", scale="batch", baseline="leave_one_out"),
    "decoupled, spread of the others": AdvantageParams(scale="leave_one_out"),
    "decoupled, by length": AdvantageParams(baseline="length", scale="batch", clip=1.5),
    "decoupled, fraction of nonzero": AdvantageParams(scale="nonzero", baseline="leave_one_out"),
    "unscaled, no baseline": AdvantageParams(scale="none", baseline="none"),
    "pass@k, whitened": AdvantageParams(
        combine="sum", baseline="second_best", scale="leave_one_out"
    ),
    "floor and clip": AdvantageParams(std_floor=0.4, clip=1.1),
    "no eps": AdvantageParams(eps=0.0, std_floor=0.0),
}


def make_inputs(sizes: list[int], rewards: int, dtype: torch.dtype = torch.float32) -> dict:
    """Odd rewards are 0 or 1, some of the last reward's are missing, the last two rows are equal.

    No reward scores the third sample.
    """
    torch.manual_seed(sum(sizes) + rewards)
    batch = sum(sizes)
    table = torch.randn(batch, rewards) * 0.3 + 0.5
    table[:, 1::2] = (table[:, 1::2] > 0.5).float()
    table[:, -1].masked_fill_(torch.arange(batch) % 3 == 1, NAN if rewards > 1 else 0.25)
    table[-2:] = table[-1:]
    table[2:3] = NAN
    return {
        "rewards": table.to(dtype),
        "groups": torch.tensor([0, *sizes]).cumsum(0),
        "weights": torch.tensor([1.0, 0.5, 2.0][:rewards], dtype=torch.float64),
        "lengths": torch.randint(0, 50, (batch,)),
    }


def flat(result: Advantages) -> tuple[Tensor, ...]:
    stats = [getattr(result.stats, name) for name in (*ADVANTAGE_STATS, "all_zero")]
    return numbers((result.values, result.per_reward, *stats))


def numbers(outputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """All but all_zero; NaN, the statistic of a reward that applies nowhere, as a number."""
    return tuple(x.nan_to_num(nan=-7.0) for x in outputs[:-1])


def run_op(rewards, groups, weights, lengths, params, backend=None):
    return flat(
        normalize_advantages(
            rewards, groups, weights=weights, lengths=lengths, params=params, backend=backend
        )
    )


def run_reference(rewards, groups, weights, lengths, params):
    return numbers(reference(rewards, groups, weights, lengths, params=params))


def scales(inputs: dict) -> dict[str, Tensor | float]:
    # An advantage is a difference of numbers of order 1, and may cancel.
    if inputs["rewards"].dtype != torch.float64:
        return {"out0": 1.0, "out1": 1.0}
    # fp64 in, fp64 out: then dividing by a small deviation costs digits too, and the backends add
    # in different orders.
    return {f"out{i}": 100.0 for i in range(7)}


def check(backend: str, inputs: dict) -> None:
    op = functools.partial(run_op, backend=backend)
    check_op(op, run_reference, inputs, scales=scales(inputs))


RAGGED = SHAPES["ragged groups, one of them empty and one of a single sample"]


@pytest.mark.parametrize("params", PARAMS.values(), ids=PARAMS.keys())
def test_matches_reference(backend, params):
    check(backend, make_inputs(*RAGGED, torch.float64) | {"params": params})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_dtype(backend, dtype):
    check(backend, make_inputs(*RAGGED, dtype) | {"params": AdvantageParams()})


@pytest.mark.parametrize("name", ["decoupled", "grpo_batch", "opo"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_every_shape(backend, shape, name):
    check(backend, make_inputs(*shape) | {"params": AdvantageParams.preset(name)})


@settings(
    max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    sizes=st.lists(st.integers(0, 10), min_size=1, max_size=8),
    rewards=st.integers(1, 3),
    params=st.sampled_from(list(PARAMS.values())),
)
def test_any_groups(backend, sizes, rewards, params):
    if sum(sizes) < 2:
        sizes = [*sizes, 2]
    check(backend, make_inputs(sizes, rewards, torch.float64) | {"params": params})


@pytest.mark.parametrize("name", [name for name in ADVANTAGE_PRESETS if name != "reinforce_pp"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_nothing_to_compare_is_exactly_zero(backend, name, dtype):
    # 0.1 and 1/3 are not exact in binary, so their mean over 3 or 7 is not the number itself.
    r = torch.tensor([0.1] * 3 + [1 / 3] * 7 + [5.0], dtype=dtype)
    offsets = torch.tensor([0, 3, 10, 11])
    params = AdvantageParams.preset(name, eps=0.0, std_floor=0.0)
    lengths = torch.arange(11)
    ours = normalize_advantages(r, offsets, lengths=lengths, params=params, backend=backend)
    assert (ours.values == 0).all()
    assert (ours.stats.share == 0).all()
    assert bool(ours.stats.all_zero)
    assert ours.stats.constant_groups.tolist() == [1.0]


def test_rewards_that_cancel_are_a_constant_sum(backend):
    r = torch.tensor([[0.3, 0.7], [0.7, 0.3], [0.1, 0.9]], dtype=torch.float64)
    params = AdvantageParams.preset("paper", eps=0.0)
    assert (normalize_advantages(r, 3, params=params, backend=backend).values == 0).all()


def test_missing_reward_counts_as_the_mean_of_its_group(backend):
    r = torch.tensor([[1.0, 0.0], [0.0, NAN], [1.0, 1.0], [0.0, NAN]])
    with_gaps = normalize_advantages(r, 4, params=AdvantageParams(whiten=False), backend=backend)
    assert with_gaps.per_reward[[1, 3], 1].tolist() == [0.0, 0.0]
    pair = normalize_advantages(
        torch.tensor([0.0, 1.0]), 2, params=AdvantageParams(whiten=False), backend=backend
    )
    torch.testing.assert_close(with_gaps.per_reward[[0, 2], 1], pair.values)
    assert with_gaps.stats.applicable.tolist() == [1.0, 0.5]


def test_reward_that_applies_nowhere(backend):
    r = torch.tensor([[1.0, NAN], [0.0, NAN]])
    ours = normalize_advantages(r, 2, backend=backend)
    assert ours.per_reward[:, 1].tolist() == [0.0, 0.0]
    assert ours.stats.applicable.tolist() == [1.0, 0.0]
    for statistic in (ours.stats.mean, ours.stats.std, ours.stats.constant_groups):
        assert statistic.isnan().tolist() == [False, True]


def test_parts_add_up_and_shares_to_one(backend):
    inputs = make_inputs([4] * 6, 3)
    for params in PARAMS.values():
        ours = normalize_advantages(**inputs, params=params, backend=backend)
        torch.testing.assert_close(ours.per_reward.sum(1), ours.values)
        torch.testing.assert_close(ours.stats.share.sum(), torch.tensor(1.0))
        assert not bool(ours.stats.all_zero)


def test_floor_keeps_noise_small_where_a_binary_reward_agrees(backend):
    noise = 0.5 + 1e-3 * torch.randn(8)
    r = torch.stack([noise, torch.ones(8)], dim=1)
    blown_up = normalize_advantages(r, 8, params=AdvantageParams.preset("paper"), backend=backend)
    assert blown_up.values.abs().max() > 1
    params = AdvantageParams.preset("paper", std_floor=0.05)
    kept = normalize_advantages(r, 8, params=params, backend=backend)
    assert kept.values.abs().max() < 0.1


@pytest.mark.parametrize("params", PARAMS.values(), ids=PARAMS.keys())
def test_order_of_groups_and_samples_does_not_matter(backend, params):
    inputs = make_inputs([4] * 6, 3)
    r, lengths = inputs["rewards"], inputs["lengths"]
    order = torch.randperm(6)[:, None] * 4 + torch.stack([torch.randperm(4) for _ in range(6)])
    order = order.flatten()
    ours = normalize_advantages(r, 4, lengths=lengths, params=params, backend=backend)
    moved = normalize_advantages(
        r[order], 4, lengths=lengths[order], params=params, backend=backend
    )
    torch.testing.assert_close(moved.values, ours.values[order])
    torch.testing.assert_close(moved.stats.share, ours.stats.share)


def test_an_unwhitened_group_does_not_see_the_batch(backend):
    r = torch.rand(32, 2)
    params = AdvantageParams(whiten=False)
    batch = normalize_advantages(r, 8, params=params, backend=backend).values
    alone = [normalize_advantages(g, 8, params=params, backend=backend).values for g in r.split(8)]
    assert torch.equal(batch, torch.cat(alone))


def test_int_groups_one_reward_and_list_weights(backend):
    r = torch.rand(12)
    ours = normalize_advantages(r, 4, weights=[1.0], backend=backend)
    same = normalize_advantages(
        r[:, None], torch.tensor([0, 4, 8, 12]), weights=torch.ones(1), backend=backend
    )
    assert torch.equal(ours.values, same.values)
    assert ours.per_reward.shape == (12, 1)


def test_rewards_are_data(backend):
    r = torch.rand(8, 2, requires_grad=True)
    assert not normalize_advantages(r, 4, backend=backend).values.requires_grad


def test_empty_batch(backend):
    for groups in (4, torch.tensor([0]), torch.tensor([0, 0, 0])):
        ours = normalize_advantages(torch.zeros(0, 2), groups, backend=backend)
        assert ours.values.shape == (0,)
        assert ours.per_reward.shape == (0, 2)
        assert bool(ours.stats.all_zero)


def test_non_contiguous_rewards(backend):
    base = torch.rand(3, 16)
    ours = normalize_advantages(base.T[::2], 4, backend=backend)
    same = normalize_advantages(base.T[::2].contiguous(), 4, backend=backend)
    assert torch.equal(ours.values, same.values)


@pytest.mark.parametrize("name", ["decoupled", "gdpo_token", "grpo_batch", "gpg"])
def test_same_bits_for_any_number_of_threads(name):
    inputs = make_inputs([2] * 600, 2) | {"params": AdvantageParams.preset(name)}
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = run_op(**inputs)
        torch.set_num_threads(3)
        three = run_op(**inputs)
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(one, three, strict=True))


def op_arguments() -> tuple[Tensor, ...]:
    weights = torch.ones(2, dtype=torch.float64)
    return torch.rand(6, 2), torch.tensor([0, 2, 6]), weights, torch.arange(6)


def test_opcheck():
    op = torch.ops.lvrpo.normalize_advantages.default
    rewards, offsets, weights, lengths = op_arguments()
    for params, counted in (
        (AdvantageParams(baseline="length", whiten="token"), lengths),
        (AdvantageParams(combine="sum", baseline="leave_one_out", scale="batch"), None),
    ):
        choices = library.positions("normalize_advantages", params.choices())
        numbers = numbers_by_name(ADVANTAGE_NUMBERS, params.numbers())
        torch.library.opcheck(op, (rewards, offsets, weights, counted, numbers), choices)


@pytest.mark.parametrize(
    ("changes", "clip", "message"),
    [
        *(({name: 5}, 1.0, f"{name} is 5") for name in ADVANTAGE_CHOICES),
        ({}, -1.0, "clip is -1"),
        ({"baseline": 2}, 1.0, "lengths must be given"),
    ],
)
def test_the_op_refuses_a_choice_that_does_not_exist(changes, clip, message):
    rewards, offsets, weights, _ = op_arguments()
    numbers = torch.tensor([1, 1e-4, 0.01, clip], dtype=torch.float64)
    with pytest.raises(RuntimeError, match=message):
        torch.ops.lvrpo.normalize_advantages(
            *(rewards, offsets, weights, None, numbers),
            **dict.fromkeys(ADVANTAGE_CHOICES, 0) | changes,
        )


def test_compiles_without_a_graph_break(backend):
    def function(r: Tensor) -> tuple[Tensor, Tensor]:
        ours = normalize_advantages(r, 4, weights=[1.0, 2.0], backend=backend)
        return ours.values, ours.stats.share

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    r = torch.rand(8, 2)
    torch.testing.assert_close(compiled(r), function(r))


SHARP = AdvantageParams(eps=0.01, std_floor=0.05, clip=1.5)
CASES = {
    "plain": (MUTANTS, SHARP),
    "tokens": (LENGTH_MUTANTS, dataclasses.replace(SHARP, baseline="length", whiten="token")),
    "best": (BEST_MUTANTS, AdvantageParams.preset("pass_at_k")),
}
MUTANT_CASES = {
    f"{case}: {name}": (mutant, params)
    for case, (mutants, params) in CASES.items()
    for name, mutant in mutants.items()
}


@pytest.mark.parametrize(("mutant", "params"), MUTANT_CASES.values(), ids=MUTANT_CASES.keys())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rule_rejects_mutant(mutant, params, dtype):
    inputs = make_inputs([4, 5, 6, 3], 2, dtype)
    # A group in which the first reward hardly varies, so that eps and the floor are seen.
    inputs["rewards"][4:9, 0] = (0.5 + 0.01 * torch.arange(5)).to(dtype)
    inputs["params"] = params

    def broken(**arguments: Any) -> Any:
        return numbers(mutant(**arguments))

    check_op(run_op, run_reference, inputs, scales=scales(inputs))
    with pytest.raises(AssertionError):
        check_op(broken, run_reference, inputs, scales=scales(inputs))


OPO = AdvantageParams.preset("opo")
BAD = {
    "+inf": ({"rewards": torch.tensor([[0.0, 1.0], [1.0, math.inf]])}, r"rewards\[1, 1\] is inf"),
    "-inf": ({"rewards": torch.tensor([0.0, -math.inf])}, r"rewards\[1\] is -inf"),
    "three dimensions": ({"rewards": torch.zeros(2, 1, 1)}, r"rewards has shape \(2, 1, 1\)"),
    "complex rewards": ({"rewards": torch.zeros(2, dtype=torch.complex64)}, "rewards is torch.com"),
    "group size does not divide": ({"groups": 3}, "groups is 3"),
    "group size zero": ({"groups": 0}, "groups is 0"),
    "offsets end early": ({"groups": torch.tensor([0, 1])}, "groups ends at 1, expected 2"),
    "offsets decrease": ({"groups": torch.tensor([0, 2, 1, 2])}, "groups decreases from 2 to 1"),
    "offsets that are floats": ({"groups": torch.tensor([0.0, 2.0])}, "groups is torch.float32"),
    "too many weights": ({"weights": [1.0, 2.0, 3.0]}, r"weights has shape \(3,\)"),
    "weight NaN": ({"weights": [1.0, NAN]}, "weights is"),
    "no lengths": ({"params": AdvantageParams(whiten="token")}, "lengths is None.*whiten 'token'"),
    "no lengths for OPO": ({"params": OPO}, "lengths is None.*baseline 'length'"),
    "one length too many": (
        {"params": OPO, "lengths": torch.arange(3)},
        r"lengths has shape \(3,\), expected \[2\]",
    ),
    "lengths that are floats": (
        {"params": OPO, "lengths": torch.ones(2)},
        "lengths is torch.float",
    ),
    "negative length": (
        {"params": OPO, "lengths": torch.tensor([3, -1])},
        r"lengths\[1\] is -1, expected >= 0",
    ),
    "unknown backend": ({"backend": "cudnn"}, "backend is 'cudnn'"),
}


@pytest.mark.parametrize(("change", "message"), BAD.values(), ids=BAD.keys())
def test_bad_input(backend, change, message):
    arguments = {"rewards": torch.zeros(2, 2), "groups": 2, "backend": backend}
    with pytest.raises(ValueError, match=message):
        normalize_advantages(**arguments | change)


BAD_PARAMS = {
    "combine": ({"combine": "product"}, "combine is 'product', expected one of decoupled, sum"),
    "scale": ({"scale": "token"}, "scale is 'token'"),
    "baseline": ({"baseline": "median"}, "baseline is 'median'"),
    "whiten": ({"whiten": "batch"}, "whiten is 'batch', expected one of none, sequence, token"),
    "runner-up of what": ({"baseline": "second_best"}, "combine is 'decoupled' with baseline"),
    "no baseline, spread": ({"baseline": "none"}, "scale is 'group' with baseline 'none'"),
    "ddof": ({"ddof": 2}, "ddof is 2"),
    "eps": ({"eps": -1.0}, "eps is -1.0"),
    "std_floor": ({"std_floor": NAN}, "std_floor is nan"),
    "clip": ({"clip": 0.0}, "clip is 0.0"),
}


@pytest.mark.parametrize(("change", "message"), BAD_PARAMS.values(), ids=BAD_PARAMS.keys())
def test_bad_params(change, message):
    with pytest.raises(ValueError, match=message):
        AdvantageParams(**change)


def test_whiten_as_a_switch():
    assert AdvantageParams(whiten=True) == AdvantageParams()
    assert AdvantageParams(whiten=False) == AdvantageParams(whiten="none")


def test_unknown_preset():
    with pytest.raises(ValueError, match="preset is 'gae', expected one of paper, decoupled"):
        AdvantageParams.preset("gae")
