"""Deliberately broken versions of packed_attention; the tolerance rule must reject every one."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lvrpo.masks import SpanMask
from lvrpo.reference.packed_attention import packed_attention

reference = functools.partial(packed_attention, return_lse=True)
Result = tuple[Tensor, Tensor]


def with_mask(change: Callable[[SpanMask], dict[str, Any]]) -> Callable[..., Result]:
    """The reference under a mask with some fields replaced."""

    def mutant(q: Tensor, k: Tensor, v: Tensor, mask: SpanMask, **options: Any) -> Result:
        return reference(q, k, v, dataclasses.replace(mask, **change(mask)), **options)

    return mutant


def with_window(longer: int | None) -> Callable[..., Result]:
    """The reference under a window that is so much longer, or under none."""

    def mutant(q: Tensor, k: Tensor, v: Tensor, mask: SpanMask, **options: Any) -> Result:
        window = None if longer is None or mask.window is None else mask.window + longer
        return reference(q, k, v, mask.with_window(window), **options)

    return mutant


def window_of_rows(mask: SpanMask) -> dict[str, Any]:
    """Completions after the first lose their prompt."""
    return {"positions": mask.rows}


def window_both_ways(q: Tensor, k: Tensor, v: Tensor, mask: SpanMask, **options: Any) -> Result:
    """A full span's keys further on are hidden, too."""

    class BothWays(SpanMask):
        def visible(self, queries: slice = slice(None), keys: slice = slice(None)) -> Tensor:
            assert self.positions is not None
            assert self.window is not None
            behind = self.positions[self.rows[queries], None] - self.positions[keys]
            return super().visible(queries, keys) & (-behind < self.window)

    return reference(q, k, v, BothWays(**vars(mask)), **options)


def with_options(**replaced: Any) -> Callable[..., Result]:
    return lambda q, k, v, mask, **options: reference(q, k, v, mask, **(options | replaced))


def with_gradient(name: str, change: Callable[[Tensor], Tensor]) -> Callable[..., Result]:
    def mutant(mask: SpanMask, **inputs: Any) -> Result:
        if inputs[name].requires_grad:
            inputs[name] = inputs[name] * 1.0
            inputs[name].register_hook(change)
        return reference(mask=mask, **inputs)

    return mutant


def document_ends(mask: SpanMask) -> Tensor:
    edges = torch.tensor(mask.documents)
    return edges[torch.bucketize(mask.rows, edges, right=True)].int()


def siblings_see_each_other(mask: SpanMask) -> dict[str, Any]:
    return {"q_hi": document_ends(mask)}


def image_leaks(mask: SpanMask) -> dict[str, Any]:
    """Full leaves stay visible until their document ends."""
    full = mask.q_lo != mask.rows
    return {"q_hi": torch.where(full, document_ends(mask), mask.q_hi)}


def full_as_causal(mask: SpanMask) -> dict[str, Any]:
    return {"q_lo": mask.rows}


def causal_as_full(mask: SpanMask) -> dict[str, Any]:
    edges = torch.tensor(mask.span_offsets)
    return {"q_lo": edges[torch.bucketize(mask.rows, edges, right=True) - 1].int()}


def own_key_hidden(mask: SpanMask) -> dict[str, Any]:
    causal = (mask.q_lo == mask.rows) & (mask.q_hi > mask.rows + 1)
    return {"q_lo": torch.where(causal, mask.q_lo + 1, mask.q_lo)}


def hide_key(key: int) -> Callable[[SpanMask], dict[str, Any]]:
    def change(mask: SpanMask) -> dict[str, Any]:
        q_hi = mask.q_hi.clone()
        q_hi[key] = 0
        return {"q_hi": q_hi}

    return change


def documents_see_each_other(mask: SpanMask) -> dict[str, Any]:
    whole = (0, mask.length)
    everyone = torch.full_like(mask.q_hi, mask.length)
    return {"q_hi": everyone, "documents": whole, "document_rows": whole}


def heads_mixed(q: Tensor, k: Tensor, v: Tensor, mask: SpanMask, **options: Any) -> Result:
    """Query head h reads key head h % Hkv."""
    repeats = q.shape[1] // k.shape[1]
    return reference(q, k.repeat(1, repeats, 1), v.repeat(1, repeats, 1), mask, **options)


def last_child_not_in(name: str) -> Callable[..., Result]:
    """The gradient of k or v misses what the rows of the last span contribute."""

    def mutant(mask: SpanMask, **inputs: Any) -> Result:
        out, lse = reference(mask=mask, **inputs)
        frozen = inputs | {name: inputs[name].detach()}
        out_frozen, lse_frozen = reference(mask=mask, **frozen)
        start = mask.span_offsets[-2]
        return (
            torch.cat([out[:start], out_frozen[start:]]),
            torch.cat([lse[:start], lse_frozen[start:]]),
        )

    return mutant


def lse_without_gradient(**inputs: Any) -> Result:
    out, lse = reference(**inputs)
    return out, lse.detach()


def lse_in_bits(**inputs: Any) -> Result:
    out, lse = reference(**inputs)
    return out, lse / 0.6931471805599453


MUTANTS: dict[str, Callable[..., Result]] = {
    "image span leaks into text": with_mask(image_leaks),
    "child sees its sibling": with_mask(siblings_see_each_other),
    "documents see each other": with_mask(documents_see_each_other),
    "full treated as causal": with_mask(full_as_causal),
    "causal treated as full": with_mask(causal_as_full),
    "own key hidden": with_mask(own_key_hidden),
    "first key dropped": with_mask(hide_key(0)),
    "key of the last position dropped": with_mask(hide_key(-1)),
    "scale ignored": with_options(scale=1.0),
    "softcap ignored": with_options(softcap=0.0),
    "GQA heads mixed": heads_mixed,
    "dk misses one child": last_child_not_in("k"),
    "dv misses one child": last_child_not_in("v"),
    "dq all zeros": with_gradient("q", torch.zeros_like),
    "dk sign flipped": with_gradient("k", torch.neg),
    "dv scaled by 2 %": with_gradient("v", lambda g: g * 1.02),
    "lse has no gradient": lse_without_gradient,
    "lse in bits": lse_in_bits,
}

#: Of a mask with a window.
WINDOW_MUTANTS: dict[str, Callable[..., Result]] = {
    "window ignored": with_window(None),
    "window longer by one": with_window(1),
    "window shorter by one": with_window(-1),
    "window of rows": with_mask(window_of_rows),
    "window that looks both ways": window_both_ways,
}
