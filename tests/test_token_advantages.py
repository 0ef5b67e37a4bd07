"""Each estimator against its formula, a loop over tokens in Python's own numbers."""

from __future__ import annotations

import math
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import lvrpo
from lvrpo import token_advantages

Rows = list[list[float]]
NAN = math.nan


def steps_of(rows: Tensor, mask: Tensor) -> Rows:
    """The numbers of the steps, by sequence."""
    return [
        [x for x, kept in zip(*pair, strict=True) if kept]
        for pair in zip(rows.tolist(), mask.tolist(), strict=True)
    ]


def returns(rewards: Rows, gamma: float = 1.0) -> Rows:
    return [
        [math.fsum(gamma**k * r for k, r in enumerate(row[t:])) for t in range(len(row))]
        for row in rewards
    ]


def reinforce_pp(rewards: Rows, gamma: float) -> Rows:
    rows = returns(rewards, gamma)
    every = [x for row in rows for x in row]
    mean = math.fsum(every) / max(len(every), 1)
    variance = math.fsum((x - mean) ** 2 for x in every) / max(len(every) - 1, 1)
    return [[(x - mean) / math.sqrt(variance + 1e-8) for x in row] for row in rows]


def remax(rewards: Rows, greedy: list[float]) -> Rows:
    pairs = zip(returns(rewards), greedy, strict=True)
    return [[x - baseline for x in row] for row, baseline in pairs]


def optimal_baseline(
    rewards: Rows, logprobs: Rows, sum_squares: Rows, weights: Rows, ids: list[Any]
) -> Rows:
    """B_t = sum of G_t W_t over sum of W_t, among the sequences of a group that have a step t."""
    gains = returns(rewards)
    gathered = [
        [
            math.fsum(
                w * w * (1 - 2 * math.exp(p) + q)
                for p, q, w in list(zip(*row, strict=True))[: t + 1]
            )
            for t in range(len(row[0]))
        ]
        for row in zip(logprobs, sum_squares, weights, strict=True)
    ]
    result = []
    for i, row in enumerate(gains):
        values = []
        for t, gain in enumerate(row):
            there = [j for j in range(len(gains)) if ids[j] == ids[i] and len(gains[j]) > t]
            weight = math.fsum(gathered[j][t] for j in there) + 1e-8
            baseline = math.fsum(gains[j][t] * gathered[j][t] for j in there) / weight
            values.append(gain - baseline if len(there) > 1 else gain)
        result.append(values)
    return result


def kl_penalized(rewards: Rows, logprobs: Rows, ref: Rows, beta: float, kl: str) -> Rows:
    estimator: Callable[[float], float] = {
        "k1": lambda d: -d,
        "k2": lambda d: d * d / 2,
        "k3": lambda d: math.exp(d) - d - 1,
        "abs": abs,
    }[kl]
    rows = zip(rewards, logprobs, ref, strict=True)
    return [[r - beta * estimator(q - p) for r, p, q in zip(*row, strict=True)] for row in rows]


def batch(seed: int, sizes: list[int], columns: int, dtype: torch.dtype) -> dict[str, Any]:
    """Padded sequences with holes; what no step is holds anything."""
    torch.manual_seed(seed)
    shape = (sum(sizes), columns)
    mask = torch.rand(shape) < 0.7
    probs = torch.rand(*shape, 5, dtype=torch.float64).softmax(-1)
    given = {
        "rewards": torch.randn(shape, dtype=torch.float64),
        "logprobs": probs[..., 0].log(),
        "sum_squares": probs.square().sum(-1),
        "ref_logprobs": -torch.rand(shape, dtype=torch.float64),
        "weights": torch.rand(shape, dtype=torch.float64) * 2,
    }
    ids = [f"prompt {i}" for i, size in enumerate(sizes) for _ in range(size)]
    order = torch.randperm(len(ids)).tolist()
    return {
        **{name: x.masked_fill(~mask, NAN).to(dtype) for name, x in given.items()},
        "mask": mask,
        "ids": [ids[i] for i in order],
        "greedy": torch.randn(len(ids), dtype=torch.float64).to(dtype),
    }


def ours(x: dict[str, Any], kind: str, module: Any = lvrpo, **layout: Any) -> Tensor:
    """One of the estimators, on padded tokens or packed ones."""
    r, options = x["rewards"], {"mask": x["mask"], **layout}
    if kind.startswith("kl"):
        log = x["logprobs"], x["ref_logprobs"]
        return module.kl_penalized_rewards(r, *log, beta=0.3, kl=kind.split()[1], **options)
    return {
        "returns": lambda: module.token_returns(r, gamma=0.9, **options),
        "reinforce_pp": lambda: module.reinforce_pp_advantages(r, gamma=0.7, **options),
        "remax": lambda: module.remax_advantages(r, x["greedy"], **options),
        "optimal_baseline": lambda: module.optimal_baseline_advantages(
            *(r, x["logprobs"], x["sum_squares"]),
            weights=x["weights"],
            group_ids=x["ids"],
            **options,
        ),
    }[kind]()


def formula(x: dict[str, Any], kind: str) -> Rows:
    names = "rewards", "logprobs", "ref_logprobs", "sum_squares", "weights"
    rows = {name: steps_of(x[name], x["mask"]) for name in names}
    r, p, q, squares, weights = rows.values()
    if kind.startswith("kl"):
        return kl_penalized(r, p, q, 0.3, kind.split()[1])
    return {
        "returns": lambda: returns(r, 0.9),
        "reinforce_pp": lambda: reinforce_pp(r, 0.7),
        "remax": lambda: remax(r, x["greedy"].tolist()),
        "optimal_baseline": lambda: optimal_baseline(r, p, squares, weights, x["ids"]),
    }[kind]()


KINDS = [
    "returns",
    "reinforce_pp",
    "remax",
    "optimal_baseline",
    *(f"kl {k}" for k in ("k1", "k2", "k3", "abs")),
]


def packed(x: dict[str, Any]) -> dict[str, Any]:
    """The same without its last column where that is no step: sequences of different lengths."""
    kept = torch.ones_like(x["mask"])
    kept[:, -1:] = x["mask"][:, -1:]
    sizes = kept.sum(1).tolist()
    flat = {name: v[kept] for name, v in x.items() if name not in ("ids", "greedy")}
    return x | flat | {"cu_seqlens": torch.tensor([0, *sizes]).cumsum(0)}


@settings(max_examples=15)
@given(
    seed=st.integers(0, 2**31),
    sizes=st.lists(st.integers(1, 4), min_size=1, max_size=4),
    columns=st.integers(0, 9),
    kind=st.sampled_from(KINDS),
)
def test_every_estimator_is_its_formula(seed, sizes, columns, kind):
    x = batch(seed, sizes, columns, torch.float64)
    found = ours(x, kind)
    assert found.shape == x["mask"].shape
    assert torch.equal(found[~x["mask"]], torch.zeros_like(found[~x["mask"]]))
    expected = [value for row in formula(x, kind) for value in row]
    assert found[x["mask"]].tolist() == pytest.approx(expected, rel=1e-9, abs=1e-9)


@settings(max_examples=15)
@given(seed=st.integers(0, 2**31), kind=st.sampled_from(KINDS))
def test_packed_tokens_are_padded_ones(seed, kind):
    x = batch(seed, [3, 1, 2], 7, torch.float64)
    flat = packed(x)
    of_packed = ours(flat, kind, cu_seqlens=flat["cu_seqlens"])
    torch.testing.assert_close(of_packed[flat["mask"]], ours(x, kind)[x["mask"]])


@pytest.mark.parametrize("kind", KINDS)
def test_sums_are_fp64_in_fp32(kind):
    x = batch(3, [4, 4], 300, torch.float32)
    expected = [value for row in formula(x, kind) for value in row]
    found = ours(x, kind)
    assert found.dtype == torch.float32
    assert found[x["mask"]].tolist() == pytest.approx(expected, rel=1e-6, abs=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_a_graph_reads_no_value(kind):
    x = batch(5, [3, 2], 6, torch.float64)
    x["ids"] = torch.tensor([int(name[-1]) for name in x["ids"]])
    names = [name for name, v in x.items() if isinstance(v, Tensor)]
    torch._dynamo.reset()
    call = torch.compile(
        lambda *tensors: ours(dict(zip(names, tensors, strict=True)), kind),
        fullgraph=True,
        backend="aot_eager",
    )
    torch.testing.assert_close(call(*(x[name] for name in names)), ours(x, kind))


def test_the_groups_of_optimal_baselines_have_places_or_names():
    x = batch(11, [2, 2, 2], 5, torch.float64)
    given = x["rewards"], x["logprobs"], x["sum_squares"]
    by_size = lvrpo.optimal_baseline_advantages(*given, groups=2, mask=x["mask"])
    by_offsets = lvrpo.optimal_baseline_advantages(*given, groups=[0, 2, 4, 6], mask=x["mask"])
    ids = torch.tensor([7, 7, 1, 1, 4, 4])
    by_name = lvrpo.optimal_baseline_advantages(*given, group_ids=ids, mask=x["mask"])
    assert torch.equal(by_size, by_offsets)
    torch.testing.assert_close(by_size, by_name)


#: By what is broken: the estimator that shows it, and a change of its source.
MUTANTS = {
    "a sequence has no end": ("returns", "other < self._end if ahead", "other < len(x) if ahead"),
    "a sequence has no start": ("optimal_baseline", "else other >= self._first", "else other >= 0"),
    "no discount": ("returns", "gamma**distance * torch", "torch"),
    "one discount for all distances": ("returns", "gamma**distance", "gamma"),
    "one step too far": ("returns", "place + distance if", "place + distance + 1 if"),
    "padding is a step": ("returns", "(~active).long()", "0 * active.long()"),
    "population variance": ("reinforce_pp", "(count - 1).clamp", "count.clamp"),
    "no mean": ("reinforce_pp", "returns - returns.sum() / count.clamp(min=1)", "returns"),
    "the baseline of another": ("remax", "greedy.double()[steps", "greedy.flip(0).double()[steps"),
    "weights are not squared": ("optimal_baseline", '["weights"].double().square()', '["weights"]'),
    "one probability": ("optimal_baseline", "1 - 2 * tokens", "1 - tokens"),
    "only the step's own energy": (
        "optimal_baseline",
        "steps.so_far(torch.where(active, energy, 0.0))",
        "torch.where(active, energy, 0.0)",
    ),
    "one group": ("optimal_baseline", "group[steps.sequence] * layout.tokens + ", ""),
    "one step": ("optimal_baseline", " * layout.tokens + steps.step", ""),
    "a lone step is its own baseline": ("optimal_baseline", "> 1, baseline", "> 0, baseline"),
    "half of k3": ("kl k3", "d.expm1() - d", "d.expm1()"),
    "the other direction": ("kl k1", '{"k1": -d', '{"k1": d'),
}


@pytest.mark.parametrize(("kind", "right", "wrong"), MUTANTS.values(), ids=MUTANTS.keys())
def test_the_formulas_reject_mutants(kind, right, wrong):
    source = Path(token_advantages.__file__).read_text(encoding="utf-8")
    assert source.count(right) == 1
    mutant = types.ModuleType("mutant")
    exec(compile(source.replace(right, wrong), "mutant", "exec"), vars(mutant))
    x = batch(1, [3, 2, 1], 8, torch.float64)
    expected = [value for row in formula(x, kind) for value in row]
    assert ours(x, kind)[x["mask"]].tolist() == pytest.approx(expected, rel=1e-9, abs=1e-9)
    assert ours(x, kind, mutant)[x["mask"]].tolist() != pytest.approx(expected, rel=1e-3, abs=1e-3)


def test_a_limit_of_the_kl():
    zero, ref = torch.zeros(1, 3), torch.tensor([[-4.0, 0.5, 30.0]])
    call = lambda **x: lvrpo.kl_penalized_rewards(zero, zero, ref, beta=1.0, kl="k3", **x)[0]  # noqa: E731
    k3 = [math.exp(d) - d - 1 for d in (-4.0, 0.5, 20.0)]
    assert call().tolist() == pytest.approx([-x for x in k3])
    assert call(kl_limit=2.0).tolist() == pytest.approx([-2.0, -k3[1], -2.0])


REFUSED = {
    "gamma": (lambda r: lvrpo.token_returns(r, gamma=1.5), "gamma is 1.5"),
    "a reward": (lambda r: lvrpo.token_returns(r.log()), r"rewards\[0, 0\] is -inf"),
    "packed without offsets": (lambda r: lvrpo.token_returns(r[0]), "cu_seqlens is None"),
    "shapes": (
        lambda r: lvrpo.kl_penalized_rewards(r, r[:1], r, beta=1.0),
        r"logprobs has shape \(1, 3\), expected \[2, 3\]",
    ),
    "beta": (lambda r: lvrpo.kl_penalized_rewards(r, r, r, beta=-1.0), "beta is -1.0"),
    "kl": (lambda r: lvrpo.kl_penalized_rewards(r, r, r, beta=1.0, kl="k4"), "kl is 'k4'"),
    "kl_limit": (
        lambda r: lvrpo.kl_penalized_rewards(r, r, r, beta=1.0, kl_limit=0.0),
        "kl_limit is 0.0",
    ),
    "no groups": (
        lambda r: lvrpo.optimal_baseline_advantages(r, r, r),
        "groups and group_ids are both None",
    ),
    "greedy rewards": (
        lambda r: lvrpo.remax_advantages(r, [1.0, NAN]),
        r"greedy_rewards\[1\] is nan",
    ),
    "one greedy reward": (lambda r: lvrpo.remax_advantages(r, [1.0]), r"expected \[2\]"),
}


@pytest.mark.parametrize(("call", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_what_makes_no_sense_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call(torch.zeros(2, 3))
