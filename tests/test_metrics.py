from __future__ import annotations

import itertools
import math
from pathlib import Path

import pytest
import torch
import torch.multiprocessing
from sample_metrics import EXPECTED, NOTHING, VALUES, Sample, check, in_rank, of
from torch import Tensor


def test_numbers_are_derived_from_what_is_kept():
    check(of(VALUES), EXPECTED)
    check(of([]), NOTHING)
    assert Sample.SUMS == ("mean", "count", "_square")
    assert Sample.EXTREMES == ("smallest", "largest")
    assert repr(of([2.0])).startswith("Sample(mean=2, smallest=2, largest=2, count=1")


@pytest.mark.parametrize("cuts", [(2,), (0, 5), (1, 1, 4)], ids=str)
def test_parts_merge_to_the_whole(cuts):
    bounds = (0, *cuts, len(VALUES))
    parts = [VALUES[a:b] for a, b in itertools.pairwise(bounds)]
    check(Sample.merge(of(part) for part in parts), EXPECTED)
    check(Sample.merge([of([]), of([])]), NOTHING)


def test_nothing_to_merge():
    with pytest.raises(ValueError, match="Sample: merge got no parts"):
        Sample.merge([])


def test_what_fp32_cannot_hold_is_its_largest_number():
    largest = torch.finfo(torch.float32).max
    metrics = of([1e300, -1e300, 1e300])
    assert float(metrics.mean) == float(metrics.largest) == largest
    assert float(metrics.smallest) == -largest
    assert math.isnan(float(of([math.nan]).mean))


def test_read_inside_a_graph():
    def function(x: Tensor) -> tuple[Tensor, Sample]:
        metrics = Sample(x[:3], x[3:])
        both = Sample.merge([metrics, metrics])
        return both.mean + metrics.smallest + both.deviation, both

    x = torch.tensor([5.0, 2.0, 50.0, 3.0, 7.0], dtype=torch.float64)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    assert float(compiled(x)[0]) == pytest.approx(2.5 - 3.0 + math.sqrt(18.75))
    assert float(compiled(x)[1].count) == 4.0


def test_ranks_reduce_to_the_whole(tmp_path: Path, monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    torch.multiprocessing.spawn(in_rank, args=(str(tmp_path),), nprocs=2)
