"""A mask function of which nothing is known, evaluated for all pairs of a query and a key.

Spans are found for it only if they say exactly the same.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lvrpo.integrations.transformers.release import NAME
from lvrpo.masks import SpanMask

#: Pairs at a time.
PAIRS = 1 << 24


def evaluated_mask(
    function: Callable[..., Any],
    valid: Tensor,
    queries: range,
    keys: range,
    use_vmap: bool,
    device: torch.device | str,
) -> SpanMask:
    """The mask of the valid keys of a batch, one sequence after the other.

    Args:
        function: of (batch, head, query, key) indices: whether the query sees the key.
        valid: [B, keys] bool, on the host: what is no padding.
        queries: their indices, which are among those of the keys.
        keys: their indices.
        use_vmap: whether the function takes one index at a time.
        device: of what the function reads.

    Raises:
        ValueError: spans cannot describe it; names a key and who sees it.
    """
    ranges = _seen(function, len(valid), queries, keys, use_vmap, device)
    return _from_ranges(ranges, valid, queries.start - keys.start, len(queries))


def _seen(
    function: Callable[..., Any],
    batch: int,
    queries: range,
    keys: range,
    use_vmap: bool,
    device: torch.device | str,
) -> Tensor:
    """The queries that see each key, from a function at all pairs, some queries at a time.

    Returns:
        [3, B, keys] int64 on the host, in rows of a sequence: how many queries see the key, the
        first of them, and one past the last.
    """
    from torch._dynamo._trace_wrapped_higher_order_op import TransformGetItemToIndex
    from transformers.masking_utils import _non_vmap_expansion_sdpa, _vmap_expansion_sdpa

    kv = torch.arange(keys.start, keys.stop, device=device)
    sequences, head = torch.arange(batch, device=device), torch.arange(1, device=device)
    count = torch.zeros(batch, len(kv), dtype=torch.int64, device=device)
    first, last = torch.full_like(count, queries.stop), torch.zeros_like(count)
    step = max(1, PAIRS // max(1, batch * len(kv)))
    for begin in range(queries.start, queries.stop, step):
        query = torch.arange(begin, min(begin + step, queries.stop), device=device)
        if use_vmap:
            with TransformGetItemToIndex():
                seen = _vmap_expansion_sdpa(function)(sequences, head, query, kv)
        else:
            seen = function(*_non_vmap_expansion_sdpa(sequences, head, query, kv))
        seen = seen.expand(batch, 1, len(query), len(kv))[:, 0]
        index = query[None, :, None]
        count += seen.sum(dim=1)
        first = first.minimum(torch.where(seen, index, queries.stop).amin(dim=1))
        last = last.maximum(torch.where(seen, index + 1, 0).amax(dim=1))
    return torch.stack([count, first - keys.start, last - keys.start]).cpu()


def _from_ranges(ranges: Tensor, valid: Tensor, first_query: int, queries: int) -> SpanMask:
    """The mask of the valid keys, each seen by a range of rows.

    Raises:
        ValueError: spans cannot describe it.
    """
    batch, length = valid.shape
    count, begin, end = ranges
    row, stop = torch.arange(length).expand(batch, length), first_query + queries
    # Whether rows that are no queries see a key is not asked: say what fits those that are.
    is_query = (row >= first_query) & (row < stop)
    seen = valid & (count > 0)
    wrongs = {
        "is not seen by its own row": valid & is_query & ((begin > row) | (end <= row)),
        "is seen by rows with others between them": seen & (count != end - begin),
        "is not seen by the first queries": seen & (row < first_query) & (begin > first_query),
        "is not seen by the last queries": seen & (row >= stop) & (end < stop),
    }
    for what, wrong in wrongs.items():
        if bool(wrong.any()):
            sequence, key = wrong.nonzero()[0].tolist()
            raise ValueError(
                f"{NAME}: key {key} of sequence {sequence} {what}, which spans cannot express; "
                "use 'sdpa'"
            )
    begin = torch.where(count > 0, begin.minimum(row), row)
    end = torch.where((end == stop) | (row >= stop), length, end.maximum(row + 1))
    # From rows of the batch to those of the buffer.
    place = torch.cat([torch.zeros(1, dtype=torch.int64), valid.flatten().cumsum(0)])
    base = (torch.arange(batch) * length)[:, None]
    bounds = torch.stack([place[end + base][valid], place[begin + base][valid]], dim=1)
    return SpanMask.from_flashmask(bounds[None, None])
