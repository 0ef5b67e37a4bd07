"""The targets of a softmax over a vocabulary, as several ops take them: tokens, rows and ranges."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lvrpo.ops import _checks


def as_row_ranges(vocab_range: Tensor | tuple[int, int] | None, like: Tensor) -> Tensor | None:
    """[R, 2] ranges from one pair for all rows of `like` [R, ...]; a tensor stays as it is."""
    if vocab_range is None or isinstance(vocab_range, Tensor):
        return vocab_range
    pair = torch.tensor(vocab_range, dtype=torch.int64, device=like.device)
    return pair.expand(like.shape[0], 2)


def check_logits(op: str, logits: Tensor, inplace_backward: bool) -> None:
    """Logits [R, V] that a softmax can be taken of and, if asked for, a gradient written over."""
    _checks.check_shape(op, "logits", logits, ("R", "V"))
    _checks.check_floating(op, "logits", logits)
    rows, vocab = logits.shape
    if rows and not vocab:
        raise ValueError(f"{op}: logits has shape ({rows}, 0), expected at least one column")
    row_stride, column_stride = logits.stride()
    own = (rows <= 1 or row_stride >= vocab) and (vocab <= 1 or column_stride == 1)
    if inplace_backward and not own:
        raise ValueError(
            f"{op}: logits has strides {logits.stride()}; inplace_backward=True needs rows that do "
            "not overlap and adjacent columns"
        )


def check_scale(op: str, temperature: float, softcap: float | None) -> None:
    """Temperature and softcap are finite and positive; the softcap may be None."""
    if not 0 < temperature < math.inf:
        raise ValueError(f"{op}: temperature is {temperature}, expected finite and > 0")
    if softcap is not None and not 0 < softcap < math.inf:
        raise ValueError(f"{op}: softcap is {softcap}, expected > 0, or None for no cap")


def check_targets(
    op: str,
    rows: int,
    vocab: int,
    token_ids: Tensor,
    row_index: Tensor | None,
    vocab_range: Tensor | None,
    ignore_index: int,
) -> None:
    """Tokens [T], the rows [T] that predict them and the rows' ranges [R, 2] fit one another.

    Raises:
        ValueError: a shape or a dtype; where values may be read, also a row outside [0, rows), an
            empty or too wide range, or a token outside its row's range that is not `ignore_index`.
    """
    _checks.check_shape(op, "token_ids", token_ids, ("T",))
    _checks.check_integer(op, "token_ids", token_ids)
    if row_index is None:
        if len(token_ids) != rows:
            raise ValueError(
                f"{op}: {len(token_ids)} token_ids for {rows} rows of logits; give row_index when "
                "they are not one to one"
            )
    else:
        _checks.check_shape(op, "row_index", row_index, (len(token_ids),))
        _checks.check_integer(op, "row_index", row_index)
    if vocab_range is not None:
        _checks.check_shape(op, "vocab_range", vocab_range, (rows, 2))
        _checks.check_integer(op, "vocab_range", vocab_range)
    if _checks.check_values(token_ids):
        _check_values(op, rows, vocab, token_ids, row_index, vocab_range, ignore_index)


def _check_values(
    op: str,
    rows: int,
    vocab: int,
    token_ids: Tensor,
    row_index: Tensor | None,
    vocab_range: Tensor | None,
    ignore_index: int,
) -> None:
    def refuse(values: Tensor, bad: Tensor, name: str, expected: str) -> None:
        if bool(bad.any()):
            at = int(bad.nonzero()[0])
            raise ValueError(f"{op}: {name}[{at}] is {values[at].tolist()}, expected {expected}")

    if row_index is not None:
        refuse(row_index, (row_index < 0) | (row_index >= rows), "row_index", f"[0, {rows})")
    if vocab_range is None:
        outside = (token_ids < 0) | (token_ids >= vocab)
        expected = f"[0, {vocab})"
    else:
        low, high = vocab_range.unbind(1)
        bad = (low < 0) | (high > vocab) | (low >= high)
        refuse(vocab_range, bad, "vocab_range", f"0 <= low < high <= {vocab}")
        if row_index is not None:
            low, high = low[row_index], high[row_index]
        outside = (token_ids < low) | (token_ids >= high)
        expected = "the range of its row in vocab_range"
    refuse(token_ids, outside & (token_ids != ignore_index), "token_ids", expected)
