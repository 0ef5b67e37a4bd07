"""Random streams keyed by what they are for, so that a sample's noise is its own.

The noise of sample i depends on the ids it is keyed by (run seed, step, prompt, sample, ...) and on
nothing else: not on which samples share its batch, their order, the chunking or the rank. numpy's
Philox is the counter-based generator; its 128-bit key is a hash of the ids.

Needs numpy, which the ops do not. Bits are stable for one version of numpy.
"""

from __future__ import annotations

import hashlib
import operator
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def stream(seed: int, *ids: int | str) -> np.random.Generator:
    """A fresh generator at the start of the stream that (seed, *ids) names.

    The same ids give the same numbers in every process. 1 and "1" are different ids, and so are
    ("a", "b") and ("ab",).

    Args:
        seed: of the run.
        ids: ints and strings, for instance step, "noise", prompt uid, sample index.
    """
    key = np.frombuffer(_hash(seed, ids, size=16), dtype="<u8")
    return np.random.Generator(np.random.Philox(key=key))


def seed_of(seed: int, *ids: int | str) -> int:
    """A seed in [-2^63, 2^63) of the streams that `lvrpo.flow_step` draws noise from.

    Args:
        seed: of the run.
        ids: as those of `stream`.
    """
    return int.from_bytes(_hash(seed, ids, size=8), "little", signed=True)


def _hash(seed: int, ids: tuple[int | str, ...], size: int) -> bytes:
    key = tuple(i if isinstance(i, str) else operator.index(i) for i in (seed, *ids))
    # ascii() quotes and escapes, so different tuples never collide before the hash.
    return hashlib.blake2b(ascii(key).encode(), digest_size=size).digest()


def normal(streams: Sequence[np.random.Generator], shape: Sequence[int]) -> Tensor:
    """The next standard normals of each stream, fp32 [n, *shape]. Advances the streams."""
    out = np.empty((len(streams), *shape), dtype=np.float32)
    for generator, row in zip(streams, out, strict=True):
        generator.standard_normal(out=row, dtype=np.float32)
    return torch.from_numpy(out)


def uniform(streams: Sequence[np.random.Generator], shape: Sequence[int] = ()) -> Tensor:
    """The next uniforms in [0, 1) of each stream, fp32 [n, *shape]. Advances the streams."""
    out = np.empty((len(streams), *shape), dtype=np.float32)
    for i, generator in enumerate(streams):
        out[i] = generator.random(shape, dtype=np.float32)
    return torch.from_numpy(out)
