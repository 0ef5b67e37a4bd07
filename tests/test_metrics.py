from __future__ import annotations

import dataclasses
import itertools
import math
from pathlib import Path

import pytest
import torch
import torch.distributed
import torch.multiprocessing
from torch import Tensor

from lvrpo.ops._metrics import Maximum, Mean, Metrics, Minimum, Total


class Sample(Metrics):
    """Of some numbers."""

    mean = Mean("count")
    smallest = Minimum(otherwise=1.0)
    largest = Maximum(otherwise=-1.0)
    count = Total()
    _square = Total()

    @property
    def deviation(self) -> Tensor:
        return (self.mean_of("_square", "count") - self.mean.square()).sqrt()


@dataclasses.dataclass(frozen=True)
class Expected:
    mean: float
    smallest: float
    largest: float
    count: float
    deviation: float


VALUES = [1.5, -2.0, 4.0, 0.25, 3.0]
EXPECTED = Expected(1.35, -2.0, 4.0, 5.0, math.sqrt(31.3125 / 5 - 1.35**2))
NOTHING = Expected(0.0, 1.0, -1.0, 0.0, 0.0)


def of(values: list[float]) -> Sample:
    x = torch.tensor(values, dtype=torch.float64)
    infinity = torch.tensor([math.inf])
    return Sample.of(
        {
            "mean": x.sum(),
            "smallest": torch.cat([x, infinity]).min(),
            "largest": torch.cat([x, -infinity]).max(),
            "count": torch.tensor(len(x)),
            "_square": x.square().sum(),
        }
    )


def check(metrics: Metrics, expected: Expected) -> None:
    found = {name: float(value) for name, value in metrics.as_dict().items()}
    assert found == pytest.approx(dataclasses.asdict(expected), rel=1e-6)
    assert {value.dtype for value in metrics.as_dict().values()} == {torch.float32}


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


def in_rank(rank: int, folder: str) -> None:
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2
    )
    metrics = of(VALUES[:2] if rank == 0 else VALUES[2:])
    check(metrics.all_reduce(), EXPECTED)
    assert float(metrics.count) == 2.0 + rank  # its own are left as they are
    check(metrics.all_reduce(torch.distributed.new_group([0, 1])), EXPECTED)
    check(of([]).all_reduce(), NOTHING)
    torch.distributed.destroy_process_group()


def test_ranks_reduce_to_the_whole(tmp_path: Path, monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    torch.multiprocessing.spawn(in_rank, args=(str(tmp_path),), nprocs=2)
