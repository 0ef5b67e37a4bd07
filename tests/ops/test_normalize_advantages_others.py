"""The spread of a sample's others against the others themselves, in rational numbers."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mutants.normalize_advantages import OTHERS_MUTANTS
from torch import Tensor

from lvrpo.ops.normalize_advantages import normalize_advantages
from lvrpo.params.advantages import AdvantageParams
from lvrpo.reference.normalize_advantages import normalize_advantages as reference
from lvrpo.testing import check_op

pytestmark = pytest.mark.usefixtures("poison_empty")

NAN = math.nan
#: Rewards that differ by less than this share of their size agree.
ROUNDING = 2.0**-40
SUM = AdvantageParams.preset("grpo_leave_one_out")
DECOUPLED = AdvantageParams(
    scale="leave_one_out", baseline="leave_one_out", whiten="none", std_floor=0.0, eps=1e-6
)


def column_of(rewards: list[list[float]], weights: list[float]) -> list[Fraction | None]:
    """Weighted sums of the deviations from the group's means; None where no reward applies."""
    deviations: list[list[Fraction]] = []
    for k in range(len(weights)):
        present = [Fraction(row[k]) for row in rewards if not math.isnan(row[k])]
        mean = sum(present, Fraction()) / max(len(present), 1)
        deviations.append(
            [Fraction() if math.isnan(r[k]) else Fraction(r[k]) - mean for r in rewards]
        )
    return [
        None
        if all(math.isnan(x) for x in row)
        else sum((Fraction(w) * d[i] for w, d in zip(weights, deviations, strict=True)), Fraction())
        for i, row in enumerate(rewards)
    ]


def spread_of_others(column: list[Fraction | None], i: int, size: float, ddof: int = 1) -> float:
    others = [x for j, x in enumerate(column) if j != i and x is not None]
    mean = sum(others, Fraction()) / max(len(others), 1)
    if all(abs(x - mean) <= ROUNDING * Fraction(size) for x in others):
        return 0.0
    return math.sqrt(sum((x - mean) ** 2 for x in others) / max(len(others) - ddof, 1))


def expected(rewards: Tensor, weights: list[float], params: AdvantageParams) -> tuple[list, list]:
    """Advantages of one group, and what an error in the last place of a mean makes of them."""
    table = rewards.double().tolist()
    values, slack = [0.0] * len(table), [0.0] * len(table)
    ks = range(len(weights))
    parts = [list(ks)] if params.combine == "sum" else [[k] for k in ks]
    for part in parts:
        rows = [[row[k] for k in part] for row in table]
        w = [weights[k] for k in part]
        unit = w if params.combine == "sum" else [1.0]
        column = column_of(rows, unit)
        sizes = [
            sum(abs(u) * (0 if math.isnan(x) else abs(x)) for u, x in zip(unit, row, strict=True))
            for row in rows
        ]
        for i, row in enumerate(rows):
            size = max([s for j, s in enumerate(sizes) if j != i], default=0.0)
            spread = spread_of_others(column, i, size)
            divisor = spread + params.eps if spread > 0 else 1.0
            rounding = 8 * len(rows) * 2.0**-53 * max(sizes)
            for k, x in enumerate(row):
                present = [Fraction(r[k]) for r in rows if not math.isnan(r[k])]
                if math.isnan(x) or len(present) < 2:
                    continue
                above = Fraction(x) - (sum(present) - Fraction(x)) / (len(present) - 1)
                value = float(Fraction(w[k]) * above) / divisor
                values[i] += value
                slack[i] += abs(w[k]) * rounding / divisor
                slack[i] += abs(value) * (rounding / spread if spread > 0 else 0.0)
    return values, slack


def check(rewards: Tensor, weights: list[float], params: AdvantageParams, backend: str) -> None:
    ours = normalize_advantages(
        rewards.to(torch.get_default_device()),
        len(rewards),
        weights=weights,
        params=params,
        backend=backend,
    ).values
    gold, slack = expected(rewards, weights, params)
    last = 8 * torch.finfo(ours.dtype).eps
    for i, (a, b, more) in enumerate(zip(ours.tolist(), gold, slack, strict=True)):
        assert abs(a - b) <= last * max(abs(b), last) + more, (i, a, b, more, rewards.tolist())


def group_of(dtype: torch.dtype, base: float, step: float, size: int, pattern: str) -> Tensor:
    if pattern == "one differs":
        values = [base] * (size - 1) + [base + step]
    elif pattern == "two differ":
        values = [base] * (size - 2) + [base + step, base - 2 * step]
    elif pattern == "an outlier":
        values = [base + step * (i % 3) for i in range(size - 1)] + [-3.0 * base]
    else:
        values = [base + step * (i * i % 7) for i in range(size)]
    return torch.tensor(values, dtype=dtype, device="cpu").roll(size // 2)


BASES = (0.1, 1.1, 1000.1, -1868.92, 1e6 + 0.1)
PATTERNS = ("one differs", "two differ", "an outlier", "all differ")


@settings(
    max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    base=st.sampled_from(BASES),
    digits=st.integers(0, 10),
    sign=st.sampled_from((1, -1)),
    size=st.integers(3, 16),
    rewards=st.integers(1, 2),
    missing=st.booleans(),
    pattern=st.sampled_from(PATTERNS),
    dtype=st.sampled_from((torch.float32, torch.float64)),
    params=st.sampled_from((SUM, DECOUPLED)),
)
def test_others_directly(
    backend, base, digits, sign, size, rewards, missing, pattern, dtype, params
):
    table = group_of(dtype, base, sign * base / 10**digits, size, pattern)[:, None]
    if rewards == 2:
        second = group_of(dtype, 0.3, 0.1, size, "all differ").flip(0)[:, None]
        table = torch.cat([table, second], dim=1)
    if missing:
        table[1, 0] = NAN
    check(table, [1.0, 0.5][:rewards], params, backend)


@pytest.mark.parametrize("size", [3, 6, 16])
@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_others_that_agree_have_no_spread(backend, dtype, base, size):
    """The divisor is 1, and the one that differs keeps its difference."""
    for digits in range(1, 7):
        r = group_of(dtype, base, base / 10**digits, size, "one differs")
        far = size // 2 - 1
        ours = normalize_advantages(
            r.to(torch.get_default_device()), size, params=SUM, backend=backend
        )
        difference = r[far].double() - r[far - 1].double()
        error = abs(float(ours.values[far]) - float(difference))
        eps = torch.finfo(dtype).eps
        assert error <= 4 * eps * abs(float(difference)) + size * 2.0**-50 * abs(base)


def test_of_a_sum_up_to_rounding(backend):
    """Others whose sums agree, though no reward does; one sample is a million away."""
    r = torch.tensor([[0.3, 0.7], [0.7, 0.3], [0.1, 0.9], [1e6, 0.0]], dtype=torch.float64)
    ours = normalize_advantages(r, 4, params=SUM, backend=backend)
    torch.testing.assert_close(ours.values[3], torch.tensor(1e6 - 1, dtype=torch.float64))


@pytest.mark.parametrize("params", [SUM, DECOUPLED], ids=["sum", "decoupled"])
def test_a_pair_has_no_spread_of_others(backend, params):
    r = torch.tensor([0.1, 0.7, 5.0, 5.3, NAN], dtype=torch.float64)
    ours = normalize_advantages(r, [0, 2, 5], params=params, backend=backend)
    expected = torch.tensor([-0.6, 0.6, -0.3, 0.3, 0.0], dtype=torch.float64)
    torch.testing.assert_close(ours.values, expected)


@pytest.mark.parametrize("mutant", OTHERS_MUTANTS.values(), ids=OTHERS_MUTANTS.keys())
def test_rule_rejects_mutant(mutant):
    inputs = {
        "rewards": torch.tensor([1.1] * 5 + [1.1001] + [0.3, 0.5, 0.4, 0.9])[:, None],
        "groups": torch.tensor([0, 6, 10]),
        "weights": torch.ones(1, dtype=torch.float64),
        "lengths": None,
        "params": SUM,
    }

    def op(**arguments: Any) -> Tensor:
        return normalize_advantages(**arguments).values

    def reference_op(rewards, groups, weights, lengths, params) -> Tensor:
        return reference(rewards, groups, weights, lengths, params=params)[0]

    def broken(**arguments: Any) -> Tensor:
        return mutant(**arguments)[0]

    check_op(op, reference_op, inputs, scales={"out0": 1.0})
    with pytest.raises(AssertionError):
        check_op(broken, reference_op, inputs, scales={"out0": 1.0})
