"""Traffic and shards, against what `fully_shard` does in one rank of a world that is not there."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lvrpo.models.transformer import Parameters
from lvrpo.planning import memory, wire
from lvrpo.planning.memory import Numerics

RANKS, LAYERS = 4, 5


class Traffic(TorchDispatchMode):
    """Bytes of the whole tensors that ranks gather and scatter."""

    def __init__(self) -> None:
        super().__init__()
        self.gathered, self.scattered = 0, 0

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        whole = max(
            (x.nbytes for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)), default=0
        )
        if op.name() == "c10d::_allgather_base_":
            self.gathered += whole
        elif op.name() == "c10d::_reduce_scatter_base_":
            self.scattered += whole
        return op(*args, **(kwargs or {}))


@pytest.fixture
def world() -> Iterator[None]:
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=RANKS)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_an_update_moves_what_fully_shard_moves(world, dtype):
    model = nn.Sequential(*(nn.Linear(16, 16) for _ in range(LAYERS)))
    counted = Parameters.of(model)
    mesh = init_device_mesh("cpu", (RANKS,))
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    for part in (*model, model):
        fully_shard(part, mesh=mesh, mp_policy=policy)
    with Traffic() as traffic:
        model(torch.randn(3, 16)).sum().backward()

    numerics = Numerics(compute=dtype.itemsize)
    share = RANKS - 1
    assert wire.scatter(counted, RANKS) == traffic.scattered * share // RANKS
    assert 2 * wire.gather(counted, numerics, RANKS) == traffic.gathered * share // RANKS
    both = wire.update(counted, numerics, RANKS, buffers=3, reference=False)
    assert both == 3 * (traffic.scattered + traffic.gathered) * share // RANKS

    state = memory.state(counted, numerics, RANKS, kept=False)
    assert sum(p.to_local().nbytes for p in model.parameters()) == state["weights"]
    assert sum(p.grad.to_local().nbytes for p in model.parameters()) == state["gradients"]
