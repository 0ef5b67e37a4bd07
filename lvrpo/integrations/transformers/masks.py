"""The masks of transformers as spans: made once a forward, without a tensor of queries by keys.

The tokens of a batch of B sequences are one packed buffer of documents, without those of padding.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from lvrpo.integrations.transformers.evaluated import evaluated_mask
from lvrpo.integrations.transformers.release import NAME
from lvrpo.integrations.transformers.rules import Rule, read
from lvrpo.masks import SpanMask
from lvrpo.masks.host import move, on_the_host


@dataclasses.dataclass(frozen=True, eq=False)
class BatchMask:
    """What a layer gets as its `attention_mask`.

    Attributes:
        mask: of the buffer.
        keys: [L] where its rows are among those of the keys, B * kv_length; None: they are those.
        queries: [Lq] where its queries are among B * q_length; None: they are those.
        window: that the layer has, even where no sequence is longer; None: none.
        of_text: whether a `span_mask` takes its place: False where all keys are seen, as in towers.
        is_read: whether more is known of it than who sees whom in this batch.
        padding: more masks of the same keys and their queries, those of padding, where they have an
            output: a tower's, whose model goes on with all of them.
    """

    mask: SpanMask
    keys: Tensor | None = None
    queries: Tensor | None = None
    window: int | None = None
    of_text: bool = True
    is_read: bool = True
    padding: tuple[tuple[SpanMask, Tensor], ...] = ()


@dataclasses.dataclass(frozen=True, eq=False)
class Refusal:
    """In the place of a `BatchMask` that cannot be: models make masks that no layer of theirs has.

    Attributes:
        error: what a layer raises that does have it.
        window: as of a `BatchMask`.
        of_text: as of a `BatchMask`.
        is_read: as of a `BatchMask`.
    """

    error: ValueError
    window: int | None = None
    of_text: bool = True
    is_read: bool = True


def mask_of_layers(
    *lengths: Any, mask_function: Callable[..., Any], **options: Any
) -> BatchMask | Refusal:
    """What transformers calls for the masks of a forward: `batch_mask`, or why there is none.

    Args:
        lengths: see `batch_mask`, like everything.
        mask_function: of which a refusal tells what it says.
        options: by their names.
    """
    try:
        return batch_mask(*lengths, mask_function=mask_function, **options)
    except ValueError as error:
        rule = read(mask_function)
        if rule is None:
            return Refusal(error, is_read=False)
        return Refusal(error, rule.window, rule.causal)


@on_the_host
def batch_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    *,
    mask_function: Callable[..., Any],
    attention_mask: Tensor | None = None,
    use_vmap: bool = False,
    device: torch.device | str = "cpu",
    **others: Any,
) -> BatchMask:
    """A mask of transformers; what its `AttentionMaskInterface` calls, with these names.

    Args:
        batch_size: B.
        q_length: queries of a sequence.
        kv_length: keys of a sequence.
        q_offset: index of its first query.
        kv_offset: index of its first key.
        mask_function: of (batch, head, query, key) indices: whether the query sees the key.
        attention_mask: [B, indices] bool, False in padding, and beyond its end; None: no padding.
        use_vmap: whether the function takes one index at a time.
        device: of the mask, and of what the function reads.
        others: what other implementations want to know.

    Raises:
        ValueError: spans cannot say it; names what they cannot.
    """
    first = int(q_offset) - kv_offset
    rule = read(mask_function)
    is_cross = first < 0 or first + q_length > kv_length
    if is_cross or (rule is not None and not rule.causal and q_length != kv_length):
        raise ValueError(
            f"{NAME}: {q_length} queries of {kv_length} keys are cross-attention, expected queries "
            "that are keys too; give these layers 'sdpa'"
        )
    valid = _valid(attention_mask, batch_size, kv_length, kv_offset)
    if rule is None:
        keys = range(kv_offset, kv_offset + kv_length)
        queries = keys[first : first + q_length]
        mask = evaluated_mask(mask_function, valid, queries, keys, use_vmap, device)
    else:
        mask = _from_rule(rule, valid, kv_offset)
    if q_length != kv_length:
        is_query = torch.zeros_like(valid)
        is_query[:, first : first + q_length] = True
        mask = mask.select_queries(is_query[valid].nonzero()[:, 0])
    padding = [] if rule is None or rule.causal else _of_padding(mask, valid)
    return BatchMask(
        mask.to(device),
        keys=_where(valid, device),
        queries=_where(valid[:, first : first + q_length], device),
        window=None if rule is None else rule.window,
        of_text=rule is None or rule.causal,
        is_read=rule is not None,
        padding=tuple((mask.to(device), move(queries, device)) for mask, queries in padding),
    )


def _where(chosen: Tensor, device: torch.device | str) -> Tensor | None:
    """Indices of what is chosen, if it is not all."""
    return None if bool(chosen.all()) else move(chosen.flatten().nonzero()[:, 0], device)


def _of_padding(mask: SpanMask, valid: Tensor) -> list[tuple[SpanMask, Tensor]]:
    """Masks by which padding sees what all the valid keys of its sequence see, and its queries.

    Padding is in no buffer. Its queries stand in rows of the sequence, as many at a time as it has.
    """
    count = valid.sum(dim=1, keepdim=True)
    nth = (~valid).long().cumsum(dim=1) - 1
    row = count.cumsum(dim=0) - count + nth % count.clamp(min=1)
    turn = torch.where(~valid & (count > 0), nth // count.clamp(min=1), -1)
    found = []
    for index in range(int(turn.max()) + 1):
        chosen = turn == index
        found.append((mask.select_queries(row[chosen]), chosen.flatten().nonzero()[:, 0]))
    return found


def _valid(attention_mask: Tensor | None, batch: int, length: int, offset: int) -> Tensor:
    """Bool [B, kv_length], on the host: what is no padding."""
    if attention_mask is None:
        return torch.ones(batch, length, dtype=torch.bool)
    given = attention_mask[:, offset : offset + length].cpu().bool()
    return pad(given, (0, length - given.shape[1]))


def _from_rule(rule: Rule, valid: Tensor, offset: int) -> SpanMask:
    """The mask of the valid keys: a document of each sequence, or of what it is packed of."""
    batch, length = valid.shape
    sequence = torch.arange(batch)[:, None].expand(batch, length)
    document = _per_key(rule.documents, valid, offset, 0)
    block = _per_key(rule.blocks, valid, offset, -1)
    if not rule.causal:
        block = torch.zeros_like(block)
    spans = torch.stack([sequence[valid], document, block], dim=1)
    changes = (spans[1:] != spans[:-1]).any(dim=1).nonzero()[:, 0] + 1
    starts = torch.cat([changes.new_zeros(min(1, len(spans))), changes])
    lengths = starts.diff(append=torch.tensor([len(spans)])).tolist()
    parents: list[int] = []
    modes: list[str] = []
    before: list[int] = []
    seen: set[tuple[str | int, ...]] = set()
    for index, (*document, number) in enumerate(spans[starts].tolist()):
        parents.append(index - 1 if document == before else -1)
        modes.append("full" if number >= 0 else "causal")
        begun: list[tuple[str | int, ...]] = [("document", *document)] if document != before else []
        begun += [("block", *document, number)] if number >= 0 else []
        for what in begun:
            if what in seen:
                raise ValueError(
                    f"{NAME}: {what[0]} {what[-1]} of sequence {what[1]} is interrupted by others, "
                    "expected its tokens next to each other; use 'sdpa'"
                )
        seen.update(begun)
        before = document
    mask = SpanMask.from_spans(lengths, parents, modes)
    if rule.window is None:
        return mask
    windowed = mask.with_window(rule.window)
    if windowed.window is not None:
        _check_window(rule, rule.window, valid, modes, lengths)
    return windowed


def _check_window(
    rule: Rule, window: int, valid: Tensor, modes: list[str], lengths: list[int]
) -> None:
    """transformers counts indices in a window, and spans count tokens.

    Raises:
        ValueError: that is not the same; or a block goes beyond the window, and a span does not.
    """
    ends = [valid[:, :1], valid[:, 1:] != valid[:, :-1]]
    if bool((torch.cat(ends, dim=1).sum(dim=1) > 2).any()):
        raise ValueError(
            f"{NAME}: a sequence longer than the window of {window} has padding between its "
            "tokens, expected it on the left or the right"
        )
    longest = max((n for n, mode in zip(lengths, modes, strict=True) if mode == "full"), default=0)
    if rule.blocks_are_whole and longest > window:
        raise ValueError(
            f"{NAME}: a block of {longest} tokens sees itself beyond the window of {window}, "
            "expected blocks as long as the window or shorter; use 'sdpa'"
        )


def _per_key(values: Tensor | None, valid: Tensor, offset: int, default: int) -> Tensor:
    """Of each valid key its value on the host; `default` beyond the end."""
    batch, length = valid.shape
    if values is None:
        return torch.full((int(valid.sum()),), default)
    given = values[:, offset : offset + length].cpu().long()
    whole = pad(given, (0, length - given.shape[1]), value=default)
    return whole.expand(batch, length)[valid]
