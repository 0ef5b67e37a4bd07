"""Where a policy is, on machines that have a GPU and on those that have none."""

from __future__ import annotations

import pytest
import torch

from lvrpo.trainer.config import ConfigError
from lvrpo.trainer.placement import run_device


@pytest.fixture
def gpus(monkeypatch):
    """A machine of two GPUs, and which process of torchrun this is, if any."""

    def there(rank: int | None) -> None:
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
        for name in ("LOCAL_RANK", "TORCHELASTIC_RUN_ID"):
            monkeypatch.delenv(name, raising=False)
        if rank is not None:
            monkeypatch.setenv("LOCAL_RANK", str(rank))
            monkeypatch.setenv("TORCHELASTIC_RUN_ID", "a run")

    return there


@pytest.mark.parametrize(
    ("name", "rank", "expected"),
    [
        ("", None, "cpu"),
        ("", 1, "cpu"),
        ("cpu", 1, "cpu"),
        ("cuda", None, "cuda:0"),
        ("cuda:1", None, "cuda:1"),
        ("cuda", 1, "cuda:1"),
    ],
)
def test_every_process_has_its_device(gpus, name, rank, expected):
    gpus(rank)
    assert run_device(name) == torch.device(expected)


@pytest.mark.parametrize(
    ("name", "rank", "message"),
    [
        ("cuda:2", None, "there: GPU 2, torch sees 2 of them; '' is the CPU"),
        ("cuda", 2, "there: process 2 of this node needs GPU 2, torch sees 2"),
        ("cuda:1", 0, "run.device is 'cuda:1', expected 'cuda' under torchrun"),
    ],
)
def test_a_device_that_is_not_there_is_refused(gpus, name, rank, message):
    gpus(rank)
    with pytest.raises(ConfigError) as refused:
        run_device(name)
    assert message in str(refused.value)
