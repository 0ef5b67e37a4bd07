"""Standard normals of a counter-based stream, each of which can be drawn without the others.

Philox 4x32-10 (Salmon et al. 2011, https://doi.org/10.1145/2063384.2063405) makes four words of 32
bits of a counter and a key, and Box-Muller two normals of two words. Counter and key are cuRAND's:
the key is a seed, the counter (element // 4, subsequence).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

ROUNDS = 10
MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
WEYL = 0x9E3779B9, 0xBB67AE85
WORD = 0xFFFFFFFF

Words = tuple[Tensor, Tensor, Tensor, Tensor]


def philox(counter: Words, key: tuple[Tensor, Tensor]) -> Words:
    """The four words of each counter; words are int64 in [0, 2^32), of shapes that broadcast."""
    a, b, c, d = counter
    low, high = key
    for _ in range(ROUNDS):
        # An int64 product keeps its lower 64 bits, which are all of this one.
        ac, cc = a * MULTIPLIERS[0], c * MULTIPLIERS[1]
        a, b, c, d = _high(cc) ^ b ^ low, cc & WORD, _high(ac) ^ d ^ high, ac & WORD
        low, high = low + WEYL[0] & WORD, high + WEYL[1] & WORD
    return a, b, c, d


def standard_normal(streams: Tensor, elements: int) -> Tensor:
    """The first numbers of each stream, fp32 [N, elements].

    Args:
        streams: int64 [N, 2]; seeds and subsequences.
        elements: D.
    """
    seed, subsequence = streams[:, :1], streams[:, 1:]
    index = torch.arange((elements + 3) // 4, device=streams.device)
    counter = index & WORD, _high(index), subsequence & WORD, _high(subsequence)
    words = philox(counter, (seed & WORD, _high(seed)))
    drawn = torch.stack([*_box_muller(*words[:2]), *_box_muller(*words[2:])], dim=2)
    return drawn.flatten(1)[:, :elements].float()


def as_noise(noise: Tensor, like: Tensor) -> Tensor:
    """Noise [N, ...] in the dtype of `like` [N, ...], drawn if it is streams [N, 2]."""
    if noise.is_floating_point():
        return noise.detach().to(like.dtype)
    return standard_normal(noise, math.prod(like.shape[1:])).view(like.shape).to(like.dtype)


def _high(x: Tensor) -> Tensor:
    return x >> 32 & WORD


def _box_muller(one: Tensor, two: Tensor) -> tuple[Tensor, Tensor]:
    """In fp64, so that what rounding leaves in fp32 does not depend on who computes it."""
    u, turn = ((word.double() + 0.5) / 2**32 for word in (one, two))
    radius, angle = (-2 * u.log()).sqrt(), 2 * math.pi * turn
    return radius * angle.cos(), radius * angle.sin()
