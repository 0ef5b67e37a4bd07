"""The targets of a softmax over a vocabulary, as several ops take them: tokens, rows and ranges."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lvrpo import checks

Ids = Tensor | Sequence[int]
VocabRange = Tensor | Sequence[Sequence[int]] | tuple[int, int] | None


@dataclasses.dataclass(frozen=True)
class Targets:
    """What tokens are asked of which rows, flattened, in int64, and in memory that is saved.

    Attributes:
        token_ids: [T].
        row_index: [T], or None where token t belongs to row t.
        ranges: [R, 2] columns of each row, or None for all of them.
        ignore_index: id of a token without a target.
        rows: the shape of a tensor with one number per row, as the caller has them.
        tokens: the same of the tokens.
    """

    token_ids: Tensor
    row_index: Tensor | None
    ranges: Tensor | None
    ignore_index: int
    rows: tuple[int, ...]
    tokens: tuple[int, ...]

    def indices(self) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """token_ids, row_index and ranges."""
        return self.token_ids, self.row_index, self.ranges

    def without_strangers(self, vocab: int) -> tuple[Targets, Tensor | None]:
        """The targets, those without a row or a column among them ignored; and which [T] they are.

        None where values were read, so that there are none.
        """
        if checks.check_values(self.token_ids):
            return self, None
        ids, index = self.token_ids, self.row_index
        here = (ids >= 0) & (ids < vocab)
        if index is not None:
            inside = (index >= 0) & (index < math.prod(self.rows))
            here, index = here & inside, torch.where(inside, index, 0)
        if self.ranges is not None:
            low, high = (self.ranges if index is None else self.ranges[index]).unbind(1)
            here = here & (ids >= low) & (ids < high)
        strange = ~here & (ids != self.ignore_index)
        ids = torch.where(strange, self.ignore_index, ids)
        return dataclasses.replace(self, token_ids=ids, row_index=index), strange


def any_of(flags: Tensor, group: Tensor | None, groups: int) -> Tensor:
    """[groups] whether any member is flagged; integers, whose sums have no order to depend on."""
    if group is None:
        return flags
    return flags.new_zeros(groups, dtype=torch.int64).index_add_(0, group, flags.long()) > 0


def as_rows(op: str, name: str, tensor: Tensor, width: str) -> Tensor:
    """[..., width] as [R, width]; a view where its strides allow."""
    if tensor.dim() < 2:
        checks.check_shape(op, name, tensor, ("...", "R", width))
    return tensor.flatten(0, -2)


def as_targets(
    op: str,
    name: str,
    like: Tensor,
    vocab: int,
    token_ids: Ids,
    row_index: Ids | None,
    vocab_range: VocabRange,
    ignore_index: int,
) -> Targets:
    """Bring the targets of the rows [..., X] of `like`, called `name`, to one form and check them.

    Raises:
        ValueError: token_ids has neither the shape of the rows nor, with row_index, that of
            row_index; another shape or a dtype; where values may be read, also a row that is not
            there, an empty or too wide range, or a token outside its row's range that is not
            `ignore_index`.
    """
    rows = tuple(like.shape[:-1])
    ids = checks.as_tensor(op, "token_ids", token_ids, like.device)
    index = ranges = None
    if row_index is not None:
        index = checks.as_tensor(op, "row_index", row_index, like.device)
        checks.check_shape(op, "row_index", index, tuple(ids.shape))
        index = checks.as_index(op, "row_index", index).reshape(-1)
    elif ids.shape != rows:
        raise ValueError(
            f"{op}: token_ids has shape {tuple(ids.shape)}, but the rows of {name} have shape "
            f"{rows}; give row_index when they are not one to one"
        )
    if is_pair(vocab_range):
        ranges = _ranges_of(vocab_range, like)
    elif vocab_range is not None:
        ranges = checks.as_tensor(op, "vocab_range", vocab_range, like.device)
    if ranges is not None:
        checks.check_shape(op, "vocab_range", ranges, (*rows, 2))
        ranges = checks.as_index(op, "vocab_range", ranges).reshape(math.prod(rows), 2)
    shape, ids = tuple(ids.shape), checks.as_index(op, "token_ids", ids).reshape(-1)
    checks.check_same_device(op, **{name: like}, token_ids=ids, row_index=index, vocab_range=ranges)
    save = checks.as_saved
    targets = Targets(save(ids), save(index), save(ranges), ignore_index, rows, shape)
    if checks.check_values(ids):
        _check_values(op, targets, vocab)
    return targets


def is_pair(vocab_range: VocabRange) -> bool:
    """Whether these are the ends of one range for all rows."""
    if vocab_range is None or isinstance(vocab_range, Tensor):
        return False
    return len(vocab_range) == 2 and not isinstance(vocab_range[0], (Sequence, Tensor))


def _ranges_of(pair: Any, like: Tensor) -> Tensor:
    """[..., 2] ranges of the rows of `like` [..., X] from one pair."""
    # Filled on the device: a copy from the host would wait for it.
    low, high = (torch.full((), end, dtype=torch.int64, device=like.device) for end in pair)
    return torch.stack([low, high]).expand(*like.shape[:-1], 2)


def _check_values(op: str, targets: Targets, vocab: int) -> None:
    token_ids, row_index, ranges = targets.indices()
    if row_index is not None:
        rows = math.prod(targets.rows)
        bad = (row_index < 0) | (row_index >= rows)
        checks.refuse_first(op, "row_index", row_index, bad, f"[0, {rows})")
    if ranges is None:
        outside = (token_ids < 0) | (token_ids >= vocab)
        expected = f"[0, {vocab})"
    else:
        low, high = ranges.unbind(1)
        bad = (low < 0) | (high > vocab) | (low >= high)
        checks.refuse_first(op, "vocab_range", ranges, bad, f"0 <= low < high <= {vocab}")
        if row_index is not None:
            low, high = low[row_index], high[row_index]
        outside = (token_ids < low) | (token_ids >= high)
        expected = "the range of its row in vocab_range"
    outside = outside & (token_ids != targets.ignore_index)
    checks.refuse_first(op, "token_ids", token_ids, outside, expected)
