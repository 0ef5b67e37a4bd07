"""Chunks of groups on more or fewer blocks of the CUDA kernel, with room for them or without."""

from __future__ import annotations

import pytest
import torch
from runnable import EMULATED
from torch import Tensor

from lvrpo.ops.normalize_advantages import normalize_advantages
from lvrpo.params.advantages import AdvantageParams, Advantages

pytestmark = [
    pytest.mark.usefixtures("poison_empty"),
    pytest.mark.skipif(not EMULATED, reason="needs LVRPO_EMULATE=1"),
]
PARAMS = {
    "two passes": AdvantageParams.preset("gdpo_token"),
    "one pass, by lead": AdvantageParams.preset("pass_at_k"),
    "three passes": AdvantageParams.preset("grpo_batch", whiten="token"),
    "others": AdvantageParams.preset("grpo_leave_one_out"),
}
#: Group sizes; in the last the first chunk is longer than its share of shared memory.
SIZES = {"several chunks": [2] * 300, "a chunk without room": [400] + [1] * 200}


def run(name: str, sizes: list[int], backend: str) -> Advantages:
    made = torch.Generator().manual_seed(len(sizes))
    rewards = torch.rand(sum(sizes), 2, generator=made)
    rewards[::7, 1] = torch.nan
    lengths = torch.randint(1, 9, (sum(sizes),), generator=made)
    offsets = torch.tensor([0, *sizes]).cumsum(0)
    return normalize_advantages(
        rewards, offsets, lengths=lengths, params=PARAMS[name], backend=backend
    )


def everything(x: Advantages) -> tuple[Tensor, ...]:
    return (x.values, x.per_reward, x.stats.share, x.stats.mean, x.stats.std)


@pytest.mark.parametrize("name", PARAMS)
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES.keys())
def test_same_bits_with_any_number_of_blocks(monkeypatch, name, sizes):
    found = []
    for resident in ("1", "2", "132"):
        monkeypatch.setenv("LVRPO_EMULATE_RESIDENT", resident)
        found.append(everything(run(name, sizes, "cuda (emulated)")))
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))
    expected = everything(run(name, sizes, "torch"))
    for ours, theirs in zip(found[0], expected, strict=True):
        torch.testing.assert_close(ours, theirs)
