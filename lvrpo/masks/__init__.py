"""SpanMask: who sees whom in a packed buffer; its position ids and its targets."""

from lvrpo.masks.exports import Tile
from lvrpo.masks.layouts import Group, Tree
from lvrpo.masks.positions import (
    TargetIndex,
    bagel_position_ids,
    mrope_position_ids,
    position_ids,
    target_index,
)
from lvrpo.masks.span_mask import SpanMask

__all__ = [
    "Group",
    "SpanMask",
    "TargetIndex",
    "Tile",
    "Tree",
    "bagel_position_ids",
    "mrope_position_ids",
    "position_ids",
    "target_index",
]
