"""A few numbers as metrics, where the processes of a group find it by name."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
import torch.distributed
from torch import Tensor

from lvrpo.params.metrics import Maximum, Mean, Metrics, Minimum, Total


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
