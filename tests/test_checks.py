from __future__ import annotations

import pytest
import torch

from lvrpo import checks


@pytest.mark.parametrize("count", [4, 99, 100, 101, 300])
@pytest.mark.parametrize("at", [1, -2])
def test_the_first_decrease_of_offsets_is_named_however_many_there_are(count, at):
    offsets = torch.arange(count) * 3
    assert checks.as_offsets("op", "x", offsets, 3 * (count - 1), offsets.device) is offsets
    at %= count - 1
    offsets[at + 1] = offsets[at] - 2
    before, after = int(offsets[at]), int(offsets[at + 1])
    with pytest.raises(ValueError, match=f"op: x decreases from {before} to {after} at {at}"):
        checks.as_offsets("op", "x", offsets, int(offsets[-1]), offsets.device)


def test_data_is_itself_where_nothing_changes_and_never_in_a_graph():
    plain = torch.ones(3)
    assert checks.as_data(plain) is plain
    assert checks.as_data(plain, torch.float32) is plain
    assert checks.as_data(plain, torch.float64).dtype == torch.float64
    leaf = torch.ones(3, requires_grad=True)
    assert not checks.as_data(leaf).requires_grad
    assert not checks.as_data(leaf, torch.float64).requires_grad
