"""Every preset against its published formula, written once more as a loop over groups.

A reward that does not apply takes part in no mean and no deviation of its own, and leaves the sum
of the others alone; with one reward that always applies, these are the formulas of the papers.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lvrpo.ops.normalize_advantages import normalize_advantages
from lvrpo.params.advantages import ADVANTAGE_CHOICES, ADVANTAGE_PRESETS, AdvantageParams

pytestmark = pytest.mark.usefixtures("poison_empty")

NAN = math.nan
Group = tuple[Tensor, Tensor]  # rewards [n, K], lengths [n]
Formula = Callable[[Sequence[Group], Tensor], list[Tensor]]


def centred(r: Tensor, centre: Callable[[Tensor, Tensor, int], Tensor], lengths: Tensor) -> Tensor:
    """[n, K], r minus centre(present rewards, their lengths, position among them); 0 if missing."""
    out = torch.zeros_like(r)
    for k in range(r.shape[1]):
        present = (~r[:, k].isnan()).nonzero()[:, 0]
        for i, sample in enumerate(present):
            out[sample, k] = r[sample, k] - centre(r[present, k], lengths[present], i)
    return out


def mean(r: Tensor, lengths: Tensor, i: int) -> Tensor:
    return r.mean()


def mean_of_others(r: Tensor, lengths: Tensor, i: int) -> Tensor:
    others = torch.cat([r[:i], r[i + 1 :]])
    return others.mean() if len(others) else r[i]


def mean_by_length(r: Tensor, lengths: Tensor, i: int) -> Tensor:
    return (r * lengths).sum() / lengths.sum()


def std(x: Tensor, ddof: int = 1) -> Tensor:
    return x.std(correction=ddof) if len(x) > 1 else torch.zeros((), dtype=x.dtype)


def above_mean(r: Tensor, w: Tensor) -> Tensor:
    return centred(r, mean, torch.ones(len(r))) @ w


def filled(groups: Sequence[Group]) -> list[Tensor]:
    """Missing rewards replaced by the group's mean, or the batch's where the group has none."""
    everywhere = torch.cat([r for r, _ in groups]).nanmean(0)
    result = []
    for r, _ in groups:
        fallback = torch.where(r.isnan().all(0), everywhere, r.nanmean(0))
        result.append(torch.where(r.isnan(), fallback, r))
    return result


def whiten(groups: Sequence[Group], values: list[Tensor], eps: float, tokens: bool) -> list[Tensor]:
    flat = torch.cat(values)
    lengths = torch.cat([lengths for _, lengths in groups])
    every = flat.repeat_interleave(lengths) if tokens else flat
    return [(v - every.mean()) / (every.std() + eps) for v in values]


def grpo(groups: Sequence[Group], w: Tensor) -> list[Tensor]:
    sums = [above_mean(r, w) for r, _ in groups]
    return [s / (std(s) + 1e-4) for s in sums]


def dr_grpo(groups: Sequence[Group], w: Tensor) -> list[Tensor]:
    return [above_mean(r, w) for r, _ in groups]


def grpo_batch(groups: Sequence[Group], w: Tensor) -> list[Tensor]:
    spread = (torch.cat(filled(groups)) @ w).std()
    return [above_mean(r, w) / (spread + 1e-4) for r, _ in groups]


def rloo(groups: Sequence[Group], w: Tensor) -> list[Tensor]:
    return [centred(r, mean_of_others, lengths) @ w for r, lengths in groups]


def grpo_leave_one_out(groups: Sequence[Group], w: Tensor) -> list[Tensor]:
    result = []
    for (r, _), value in zip(groups, rloo(groups, w), strict=True):
        sums = above_mean(r, w)
        for i in range(len(sums)):
            others = std(torch.cat([sums[:i], sums[i + 1 :]]))
            if others > 1e-9:  # equal up to rounding: nothing to divide by
                value[i] /= others + 1e-6
        result.append(value)
    return result


def gdpo(groups: Sequence[Group], w: Tensor, tokens: bool = False) -> list[Tensor]:
    values = []
    for r, lengths in groups:
        value = torch.zeros(len(r), dtype=r.dtype)
        deviation = centred(r, mean, lengths)
        for k in range(r.shape[1]):
            present = deviation[~r[:, k].isnan(), k]
            if len(present) > 1:
                value += w[k] * deviation[:, k] / (std(present) + 1e-4)
        values.append(value)
    return whiten(groups, values, 1e-4, tokens)


def gdpo_token(groups: Sequence[Group], w: Tensor) -> list[Tensor]:
    return gdpo(groups, w, tokens=True)


def reinforce_pp(groups: Sequence[Group], w: Tensor) -> list[Tensor]:
    return whiten(groups, [r.nan_to_num() @ w for r, _ in groups], 1e-4, tokens=True)


def reinforce_pp_baseline(groups: Sequence[Group], w: Tensor) -> list[Tensor]:
    return whiten(groups, dr_grpo(groups, w), 1e-4, tokens=True)


def opo(groups: Sequence[Group], w: Tensor) -> list[Tensor]:
    return [centred(r, mean_by_length, lengths) @ w for r, lengths in groups]


def gpg(groups: Sequence[Group], w: Tensor) -> list[Tensor]:
    sums = torch.cat([r.nan_to_num() @ w for r, _ in groups])
    alpha = len(sums) / int((sums != 0).sum())
    return [alpha * value for value in dr_grpo(groups, w)]


def pass_at_k(groups: Sequence[Group], w: Tensor) -> list[Tensor]:
    result = []
    for r, _ in groups:
        sums = above_mean(r, w)
        value = torch.zeros_like(sums)
        if len(sums) > 1:
            best, second = sums.topk(2).values
            value[sums.argmax()] = (best - second) / (std(sums) + 1e-4)
        result.append(value)
    return result


FORMULAS: dict[str, Formula] = {
    "paper": grpo,
    "grpo": grpo,
    "dr_grpo": dr_grpo,
    "rloo": rloo,
    "grpo_batch": grpo_batch,
    "grpo_leave_one_out": grpo_leave_one_out,
    "gdpo": gdpo,
    "gdpo_token": gdpo_token,
    "reinforce_pp": reinforce_pp,
    "reinforce_pp_baseline": reinforce_pp_baseline,
    "opo": opo,
    "gpg": gpg,
    "pass_at_k": pass_at_k,
}


def batch(
    rewards: int, gaps: bool, unscored: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Ragged groups: one empty, one of a single sample, one constant, one that a reward misses."""
    sizes = [5, 1, 0, 8, 4, 3, 2]
    r = torch.rand(sum(sizes), rewards, dtype=torch.float64)
    if rewards > 1:
        r[:, 1] = (r[:, 1] > 0.5).double()
    r[6:9] = 0.0  # rewards that are zero, for GPG
    r[14:18] = r[14]
    if gaps:
        r[1::4, 0] = NAN
        r[18:21, 1] = NAN
        r[18:21, 0] = torch.rand(3, dtype=torch.float64)
    if unscored:
        r[[2, 7, 12, 13]] = NAN  # the eighth is one of those that are zero
        r[21:23] = NAN  # a whole group
    weights = torch.tensor([1.0, 0.5, 2.0][:rewards], dtype=torch.float64)
    return r, torch.tensor([0, *sizes]).cumsum(0), weights, torch.randint(1, 40, (len(r),))


@pytest.mark.parametrize("name", FORMULAS)
@pytest.mark.parametrize(
    ("rewards", "gaps", "unscored"),
    [(1, False, False), (3, False, False), (3, True, False), (1, False, True), (3, True, True)],
    ids=["one", "several", "with gaps", "one, or none at all", "with gaps, or none at all"],
)
def test_is_the_published_formula(backend, name, rewards, gaps, unscored):
    """Of the samples that any reward scored; the others' advantage is 0."""
    r, groups, weights, lengths = batch(rewards, gaps, unscored)
    ours = normalize_advantages(
        r,
        groups,
        weights=weights,
        lengths=lengths,
        params=AdvantageParams.preset(name),
        backend=backend,
    )
    bounds = groups.tolist()
    scored = ~r.isnan().all(1)
    pieces = [
        (r[a:b][scored[a:b]].cpu(), lengths[a:b][scored[a:b]].cpu())
        for a, b in itertools.pairwise(bounds)
    ]
    expected = torch.zeros(len(r), dtype=torch.float64, device="cpu")
    expected[scored.cpu()] = torch.cat(FORMULAS[name](pieces, weights.cpu()))
    torch.testing.assert_close(ours.values.cpu(), expected)
    assert (ours.values[~scored] == 0).all()
    assert (ours.per_reward[~scored] == 0).all()
    torch.testing.assert_close(ours.per_reward.sum(1), ours.values)


def test_every_preset_has_its_formula():
    # "decoupled" is "gdpo" with a floor: the difference has its own test below.
    assert set(FORMULAS) == set(ADVANTAGE_PRESETS) - {"decoupled"}


def test_the_docs_say_what_every_name_is():
    page = Path(__file__).parents[2] / "docs/ops/normalize_advantages.md"
    text = page.read_text(encoding="utf-8")
    names = {*ADVANTAGE_PRESETS, *(name for names in ADVANTAGE_CHOICES.values() for name in names)}
    missing = [name for name in sorted(names) if not re.search(rf'[`"]{name}[`"]', text)]
    assert not missing, f"{page.name} does not say what these are: {missing}"


def test_decoupled_is_gdpo_where_the_floor_is_low(backend):
    r, groups, weights, _ = batch(2, gaps=True)
    arguments = {"weights": weights, "backend": backend}
    with_floor = normalize_advantages(r, groups, **arguments)
    plain = normalize_advantages(r, groups, **arguments, params=AdvantageParams.preset("gdpo"))
    assert torch.equal(with_floor.values, plain.values)


def test_population_standard_deviation(backend):
    r = torch.tensor([0.0, 0.0, 0.0, 1.0], dtype=torch.float64)
    params = AdvantageParams.preset("grpo", ddof=0, eps=0.0)
    ours = normalize_advantages(r, 4, params=params, backend=backend)
    expected = (r - 0.25) / math.sqrt(0.1875)
    torch.testing.assert_close(ours.values, expected)


def test_others_that_agree_leave_the_deviation_as_it_is(backend):
    params = AdvantageParams.preset("grpo_leave_one_out")
    r = torch.tensor([0.0, 0.0, 0.0, 1.0])
    ours = normalize_advantages(r, 4, params=params, backend=backend)
    assert ours.values[3] == 1.0
    pair = normalize_advantages(r[2:], 2, params=params, backend=backend)
    assert pair.values.tolist() == [-1.0, 1.0]


def test_pass_at_k_of_a_tie_is_zero(backend):
    params = AdvantageParams.preset("pass_at_k")
    r = torch.tensor([1.0, 1.0, 0.0, 0.2, 0.1, 0.2])
    ours = normalize_advantages(r, 3, params=params, backend=backend)
    assert ours.values.tolist() == [0.0] * 6
    assert bool(ours.stats.all_zero)


def test_pass_at_k_shares_what_lifted_the_best(backend):
    """The second reward is what the best sample is worse at."""
    r = torch.tensor([[1.0, 0.0], [0.0, 0.5], [0.0, 0.25]])
    params = AdvantageParams.preset("pass_at_k")
    ours = normalize_advantages(r, 3, params=params, backend=backend)
    assert ours.per_reward[0, 0] > ours.values[0] > 0 > ours.per_reward[0, 1]
    assert (ours.per_reward[1:] == 0).all()


def test_batch_spread_of_a_sum_does_not_see_a_missing_reward(backend):
    """Were a missing reward a zero, rewards far from zero would own the spread of the batch."""
    r = 100 + torch.rand(64, 2)
    r[::2, 1] = NAN
    r[:8, 1] = NAN
    params = AdvantageParams.preset("grpo_batch")
    ours = normalize_advantages(r, 8, params=params, backend=backend)
    assert ours.values.std() > 0.3


def test_no_tokens_at_all(backend):
    r = torch.rand(6)
    for name in ("opo", "gdpo_token", "reinforce_pp"):
        ours = normalize_advantages(
            r,
            3,
            lengths=torch.zeros(6, dtype=torch.int64),
            params=AdvantageParams.preset(name),
            backend=backend,
        )
        assert ours.values.isfinite().all()


@pytest.mark.parametrize("name", ["reinforce_pp", "opo"])
def test_the_same_reward_everywhere_is_whitened_to_zero(backend, name):
    params = AdvantageParams.preset(name, whiten="token", eps=0.0, std_floor=0.0)
    r = torch.full((6,), 0.1, dtype=torch.float64)
    lengths = torch.arange(1, 7)
    ours = normalize_advantages(r, 3, lengths=lengths, params=params, backend=backend)
    assert (ours.values == 0).all()
