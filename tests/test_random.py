from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch

from lvrpo import random


def noise(ids, shape=(3, 5)):
    return random.normal([random.stream(7, *key) for key in ids], shape)


def test_a_sample_keeps_its_noise_in_any_batch():
    ids = [(step, uid, i) for step in range(2) for uid in ("a", "b") for i in range(4)]
    whole = noise(ids)
    order = torch.randperm(len(ids)).tolist()
    assert torch.equal(noise([ids[i] for i in order]), whole[order])
    chunks = [noise(ids[i : i + 3]) for i in range(0, len(ids), 3)]
    assert torch.equal(torch.cat(chunks), whole)
    assert torch.equal(noise(ids[5:6])[0], whole[5])


def test_different_ids_give_different_streams():
    keys = [(), (0,), (1,), ("1",), ("a", "b"), ("ab",), ("a", "b", ""), (1, 2), (12,), (2, 1)]
    values = torch.stack([random.normal([random.stream(0, *key)], (8,))[0] for key in keys])
    assert len(values.unique(dim=0)) == len(keys)
    assert not torch.equal(noise([(0,)]), random.normal([random.stream(8, 0)], (3, 5)))


def test_different_ids_give_different_seeds_of_64_bits():
    keys = [(), (0,), (1,), ("1",), ("a", "b"), ("ab",), ("a", "b", ""), (1, 2), (12,), (2, 1)]
    keys += [("p", i) for i in range(1000)]
    seeds = [random.seed_of(0, *key) for key in keys]
    assert len(set(seeds)) == len(keys)
    assert random.seed_of(1) != random.seed_of(0)
    # Every bit is set in about half of them; the sign is one.
    bits = np.array(seeds)[:, None] >> np.arange(64) & 1
    assert np.abs(bits.mean(axis=0) - 0.5).max() < 4.5 * 0.5 / len(keys) ** 0.5


def test_the_same_in_another_process():
    program = (
        "from lvrpo import random; "
        "print(random.stream(3, 'p', 1).integers(1 << 62), random.seed_of(3, 'p', 1))"
    )
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    stream, seed = map(int, result.stdout.split())
    assert stream == random.stream(3, "p", 1).integers(1 << 62)
    assert seed == random.seed_of(3, "p", 1)


def test_streams_advance():
    streams = [random.stream(0, i) for i in range(3)]
    first, second = random.normal(streams, (4,)), random.normal(streams, (4,))
    assert not torch.equal(first, second)
    again = [random.stream(0, i) for i in range(3)]
    assert torch.equal(torch.cat([first, second], dim=1), random.normal(again, (8,)))


def test_moments_over_streams():
    streams = [random.stream(0, "p", i) for i in range(4000)]
    z, u = random.normal(streams, (4,)), random.uniform(streams, (4,))
    assert z.dtype == u.dtype == torch.float32
    assert abs(float(z.mean())) < 4 / 16000**0.5
    assert abs(float(z.var()) - 1) < 4 * (2 / 16000) ** 0.5
    assert abs(float(u.mean()) - 0.5) < 4 * (1 / 12 / 16000) ** 0.5
    assert float(u.min()) >= 0
    assert float(u.max()) < 1
    # Neighbouring keys are independent.
    assert abs(float((z[1:] * z[:-1]).mean())) < 4 / 16000**0.5


def test_shapes_and_id_types():
    assert random.normal([], (2, 3)).shape == (0, 2, 3)
    assert random.uniform([random.stream(0)]).shape == (1,)
    a, b = random.stream(0, np.int64(5)), random.stream(0, 5)
    assert a.integers(1 << 62) == b.integers(1 << 62)
    with pytest.raises(TypeError):
        random.stream(0, 1.5)  # type: ignore[arg-type]


def test_the_ops_do_without_it():
    program = "import sys, lvrpo; assert 'lvrpo.random' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True)
