"""Other people's attention, each called like ours: attend(q, k, v, mask) with a `SpanMask`.

A form of the mask that a peer needs is built from the SpanMask and kept until another one comes.
So with one layout it is given, its build not timed; with a new layout in every call it is timed.
The peers called "built" build it in every call.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from harness.providers import DEVICE, Peer
from peers import sdpa, unshared
from peers.loss_heads import NEEDS_GPU
from peers.unshared import Attention, Varlen
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from lvrpo.masks import SpanMask

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask


def flex(block_mask: Callable[[SpanMask], BlockMask]) -> Attention:
    """FlexAttention, compiled once for all lengths."""
    from torch.nn.attention.flex_attention import flex_attention

    compiled = _compiled(flex_attention)

    def attend(q: Tensor, k: Tensor, v: Tensor, mask: SpanMask) -> Tensor:
        shared = q.shape[1] != k.shape[1]
        q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
        out = compiled(q, k, v, block_mask=block_mask(mask), enable_gqa=shared)
        return out[0].transpose(0, 1)

    return attend


def created_block_mask() -> Callable[[SpanMask], BlockMask]:
    """torch's own way, compiled as its documentation has it: every pair is asked for."""
    from torch.nn.attention.flex_attention import create_block_mask

    compiled = _compiled(create_block_mask)

    def build(mask: SpanMask) -> BlockMask:
        q_lo, q_hi = mask.q_lo, mask.q_hi

        def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return (q_lo[key] <= query) & (query < q_hi[key])

        return compiled(sees, None, None, mask.length, mask.length, device=q_lo.device)

    return build


@functools.cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function, dynamic=True)


@functools.lru_cache(maxsize=1)
def _forget_all_but(*what: Any) -> None:
    """Forget what was compiled, unless the last call was for the same `what`.

    Beyond a limit of compilations of one function torch runs it without, densely, and says so in a
    warning only: no case may come near it because of those before.
    """
    torch._dynamo.reset()


def _torch_varlen() -> Varlen:
    from torch.nn.attention.varlen import varlen_attn

    def attend(q: Tensor, k: Tensor, v: Tensor, *lengths: Any) -> Tensor:
        *lengths, causal = lengths
        window = (-1, 0) if causal else (-1, -1)
        return varlen_attn(q, k, v, *lengths, window_size=window, enable_gqa=True)

    return attend


def _flash_varlen(module: str) -> Varlen:
    function = importlib.import_module(module).flash_attn_varlen_func
    names = ("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k", "causal")

    def attend(q: Tensor, k: Tensor, v: Tensor, *lengths: Any) -> Tensor:
        found = function(q, k, v, **dict(zip(names, lengths, strict=True)))
        return found[0] if isinstance(found, tuple) else found

    return attend


class _Grid(NamedTuple):
    grouper: Any
    rows: Tensor  # [groups * longest], 0 where there is none
    places: Tensor  # [L]: where each row of the buffer is in the grid


@functools.lru_cache(maxsize=1)
def _grid(mask: SpanMask) -> _Grid:
    from prefix_grouper import PrefixGrouper

    groups: list[list[int]] = []
    for (start, end), parent in zip(pairwise(mask.span_offsets), mask.parents, strict=True):
        groups += [[]] * (parent < 0)
        groups[-1] = [*groups[-1], end - start]
    device = mask.q_lo.device
    every = torch.arange(mask.length).split([sum(group) for group in groups])
    rows = pad_sequence(list(every), batch_first=True, padding_value=-1).flatten()
    places = (rows >= 0).nonzero()[:, 0]
    grouper = PrefixGrouper(groups, device, "right")
    return _Grid(grouper, rows.clamp(min=0).to(device), places.to(device))


def prefix_grouper(varlen: Varlen | None = None) -> Attention:
    """Its prompts attend once, then all completions attend to copies of the prompt's keys.

    Args:
        varlen: the attention that it calls, without its padding, as its users do with flash-attn;
            None: SDPA with a mask.
    """

    def padded(q: Tensor, k: Tensor, v: Tensor, keys: Tensor) -> Tensor:
        seen = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device)
        seen = seen.tril(k.shape[2] - q.shape[2])
        if not bool(keys.all()):
            seen = seen & keys[:, None, None]
            seen = seen | ~seen.any(dim=-1, keepdim=True)  # rows of padding
        return sdpa.masked(q, k, v, seen).transpose(1, 2)

    def unpadded(q: Tensor, k: Tensor, v: Tensor, keys: Tensor) -> Tensor:
        assert varlen is not None
        lengths, rows = [], []
        for real in (keys[:, -q.shape[2] :], keys):
            lengths.append(real.sum(1))
            rows.append(real.flatten().nonzero()[:, 0])
        q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (q, k, v))
        offsets = (torch.nn.functional.pad(x.cumsum(0), (1, 0)).int() for x in lengths)
        longest = (int(x.max()) for x in lengths)
        queries, k, v = q.index_select(0, rows[0]), *(x.index_select(0, rows[1]) for x in (k, v))
        out = varlen(queries, k, v, *offsets, *longest, True)
        return torch.zeros_like(q).index_copy(0, rows[0], out).unflatten(0, (len(keys), -1))

    def run(q: Tensor, k: Tensor, v: Tensor, mask: SpanMask) -> Tensor:
        grouper, rows, places = _grid(mask)
        groups = len(grouper.group_info)
        q, k, v = (
            x.index_select(0, rows).unflatten(0, (groups, -1)).transpose(1, 2) for x in (q, k, v)
        )
        out = grouper.forward(unpadded if varlen else padded, q, k, v)
        return out.flatten(0, 1).index_select(0, places)

    return run


def why_not_prefix_grouper(mask: SpanMask) -> str:
    if "full" in mask.modes:
        return "its attention is causal everywhere"
    prompts = [span for span, parent in enumerate(mask.parents) if parent < 0]
    if set(mask.parents) != {-1, *prompts}:
        return "its groups are a prompt and at least one completion, of one span each"
    return ""


def peers(
    mask: SpanMask, q: Tensor, k: Tensor, *, steady: bool, gradients: bool
) -> dict[str, Peer]:
    """All of them, for layouts like `mask` and heads like those of q and k.

    Args:
        steady: whether there is only one layout.
        gradients: whether the backward is timed, too.
    """
    found = {"sdpa built": Peer(lambda: sdpa.built)}
    # It would say so itself, after it has compiled for long.
    forward_only = "on a CPU it has no backward" if gradients and DEVICE == "cpu" else ""
    compiled_for = (q.shape[1:], k.shape[1:], q.dtype, steady)
    builders: dict[str, Callable[[], Callable[[SpanMask], BlockMask]]] = {
        "flex given": lambda: functools.lru_cache(maxsize=1)(created_block_mask()),
        "flex built": created_block_mask,
        "flex built by us": lambda: SpanMask.to_block_mask,
    }
    if not steady:
        del builders["flex given"]

    def load_flex(builder: Callable[[], Callable[[SpanMask], BlockMask]]) -> Attention:
        _forget_all_but(*compiled_for)
        return flex(builder())

    for name, builder in builders.items():
        load = functools.partial(load_flex, builder)
        found[name] = Peer(load, why_not=forward_only, compiles=True)
    if mask.modes == ("causal",):
        return {"sdpa causal": Peer(lambda: sdpa.plain_text), **found}
    found["unshared sdpa"] = Peer(lambda: unshared.padded)
    narrow = q.dtype in (torch.float16, torch.bfloat16)
    reason = NEEDS_GPU or ("" if narrow else f"takes fp16 and bf16, not {q.dtype}")
    found["unshared varlen"] = Peer(lambda: unshared.varlen(_torch_varlen()), why_not=reason)
    for name, (package, module) in FLASH.items():
        load = functools.partial(_flash_varlen, module)
        found[name] = Peer(lambda load=load: unshared.varlen(load()), package, reason)
    found["prefix-grouper"] = Peer(
        lambda: prefix_grouper(_torch_varlen() if DEVICE == "cuda" and narrow else None),
        "prefix-grouper",
        why_not_prefix_grouper(mask),
    )
    return found


#: By provider: the distribution of a flash-attn, and where its function is.
FLASH = {
    "unshared fa2": ("flash-attn", "flash_attn"),
    "unshared fa3": ("flash-attn-3", "flash_attn_interface"),
    "unshared fa4": ("flash-attn-4", "flash_attn.cute"),
}
