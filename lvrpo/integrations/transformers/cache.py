"""Keys and values of a packed buffer, some of whose rows a forward of transformers computes.

A `span_mask` with selected queries says what those rows see, so that a prompt stands once however
many answers continue it. transformers' own caches have a row of a batch for each of them.
"""

from __future__ import annotations

import functools
from typing import Any

from torch import Tensor

from lvrpo.integrations.transformers.release import require_transformers

require_transformers()
from transformers import Cache  # noqa: E402
from transformers.cache_utils import CacheLayerMixin  # noqa: E402


class RowCache(Cache):  # type: ignore[misc]
    """Keys and values of the rows of one buffer, for all layers of a model.

    A forward with `cache=` it, `span_mask=` and a batch of one sequence computes `rows`, whose keys
    and values it keeps. Masks that transformers makes itself would not know them: to it the cache
    is empty.

    Args:
        length: rows of the buffer.

    Attributes:
        rows: [n] int64, where the tokens of the next forward stand; set before it.
    """

    rows: Tensor

    def __init__(self, length: int) -> None:
        super().__init__(layer_class_to_replicate=functools.partial(_Rows, self))
        self.length = length

    def move(self, old: Tensor, new: Tensor, length: int) -> None:
        """Lay out anew: what stands in rows `old` goes to rows `new`, and all else is dropped.

        Args:
            old: [n] int64.
            new: [n] int64.
            length: rows of the new buffer.
        """
        self.length = length
        for layer in self.layers:
            layer.move(old, new, length)


class _Rows(CacheLayerMixin):  # type: ignore[misc]
    """Of one layer: [L, heads, D], in the order in which attention takes them."""

    is_sliding = False

    def __init__(self, cache: RowCache) -> None:
        super().__init__()
        self.cache = cache

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Room for all rows. What is not written yet is 0, since attention may multiply by 0."""
        self.keys, self.values = (
            states.new_zeros(self.cache.length, states.shape[1], states.shape[3])
            for states in (key_states, value_states)
        )
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        """Keep [1, heads, n, D]; returns [1, heads, L, D]."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        for kept, states in ((self.keys, key_states), (self.values, value_states)):
            kept.index_copy_(0, self.cache.rows, states[0].transpose(0, 1))
        return self.keys.transpose(0, 1)[None], self.values.transpose(0, 1)[None]

    def move(self, old: Tensor, new: Tensor, length: int) -> None:
        """See `RowCache.move`."""
        self.keys, self.values = (
            kept.new_zeros(length, *kept.shape[1:]).index_copy_(0, new, kept[old])
            for kept in (self.keys, self.values)
        )

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Those of a sequence that begins."""
        return query_length, 0

    def get_seq_length(self) -> int:
        """0, see `RowCache`."""
        return 0

    def get_max_length(self) -> int:
        """There is none."""
        return -1
