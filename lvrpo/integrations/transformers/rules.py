"""What a mask function of transformers says, read from the functions that it is put together of.

transformers describes a mask as a function of (batch, head, query, key) indices, made by functions
of `transformers.masking_utils`. Each of those is known by its name and keeps its parts in its
closure, so that nothing is evaluated. What is not one of them has to be evaluated for all pairs.

B sequences of L keys.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any

from torch import Tensor


@dataclasses.dataclass(frozen=True, eq=False)
class Rule:
    """Key k is visible to query q of its sequence, if that is what all of these allow.

    Attributes:
        causal: k is at or before q, or in q's block.
        blocks: [B, L] integers: equal ones >= 0 are one block, -1 is none; None: no blocks.
        window: q - k < window; None: however far.
        blocks_are_whole: a block is visible to itself beyond the window.
        documents: [B, L]: k has the same number as q; None: there is one document.
    """

    causal: bool = False
    blocks: Tensor | None = None
    window: int | None = None
    blocks_are_whole: bool = False
    documents: Tensor | None = None


def read(function: Callable[..., Any]) -> Rule | None:
    """The rule of a mask function, or None where it has parts that are not known."""
    if getattr(function, "__module__", None) != "transformers.masking_utils":
        return None
    name = function.__qualname__.partition(".")[0]
    reader = _READERS.get(name)
    return None if reader is None else reader(dict(inspect.getclosurevars(function).nonlocals))


def _intersection(parts: dict[str, Any]) -> Rule | None:
    """`and_masks`: what one of them says, where no two say something about the same."""
    found: dict[str, Any] = {}
    for function in parts["mask_functions"]:
        rule = read(function)
        # Blocks without an order would be one more condition, not what an order is relaxed by.
        if rule is None or (rule.blocks is not None and not rule.causal):
            return None
        said = {name: x for name, x in vars(rule).items() if x is not None and x is not False}
        if found.keys() & said.keys():
            return None
        found |= said
    return Rule(**found)


def _union(parts: dict[str, Any]) -> Rule | None:
    """`or_masks`, of an order and of blocks."""
    functions = parts["mask_functions"]
    if len(functions) != 2:
        return None
    order, blocks = map(read, functions)
    if order is None or blocks is None:
        return None
    is_order = order.causal and order.blocks is None and order.documents is None
    if not is_order or blocks.blocks is None or blocks.causal:
        return None
    whole = order.window is not None
    return dataclasses.replace(order, blocks=blocks.blocks, blocks_are_whole=whole)


#: By the function of `transformers.masking_utils` that makes them: the rule, from its parts.
_READERS: dict[str, Callable[[dict[str, Any]], Rule | None]] = {
    "causal_mask_function": lambda parts: Rule(causal=True),
    "bidirectional_mask_function": lambda parts: Rule(),
    "sliding_window_overlay": lambda parts: Rule(window=parts["sliding_window"]),
    "blockwise_overlay": lambda parts: Rule(blocks=parts["block_sequence_ids"]),
    "packed_sequence_mask_function": lambda parts: Rule(documents=parts["packed_sequence_mask"]),
    # Positions count up by one inside of a document, where alone they are compared.
    "remap_positions_for_packed_sequence": lambda parts: read(parts["mask_function"]),
    "and_masks": _intersection,
    "or_masks": _union,
}
