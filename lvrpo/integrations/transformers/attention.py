"""`attn_implementation="lvrpo"`: the attention of a model of transformers on `packed_attention`."""

from __future__ import annotations

import functools
import weakref
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from lvrpo.integrations.transformers.masks import BatchMask, Refusal, batch_mask, mask_of_layers
from lvrpo.integrations.transformers.release import NAME, require_transformers
from lvrpo.masks import SpanMask
from lvrpo.ops.packed_attention import packed_attention

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

IMPLEMENTATION = "lvrpo"
#: The same, called as flash attention is: transformers goes by "flash" in the name, and then gives
#: towers all of their windows in one call.
VARLEN = "lvrpo_flash"
#: What some layers have besides q, k and v, and attention would be wrong without.
UNKNOWN = ("position_bias", "sinks", "indices", "block_indices")

#: Layers in which tokens meet in attention alone, by transformers' names.
SPAN_LAYERS = {"full_attention", "sliding_attention"}

#: The masks of windowed layers by the mask they are of, and those of offsets: for all layers of a
#: forward, and gone with what they were made of.
_windowed: weakref.WeakKeyDictionary[SpanMask, dict[int, SpanMask | None]]
_windowed = weakref.WeakKeyDictionary()
_of_offsets: Any = WeakIdKeyDictionary()


def register() -> None:
    """Make `attn_implementation="lvrpo"` known to transformers, for this process.

    Raises:
        ImportError: transformers is missing, or not a release that this is tested with.
    """
    require_transformers()
    from transformers import AttentionInterface, AttentionMaskInterface

    for name in (IMPLEMENTATION, VARLEN):
        AttentionInterface.register(name, attention)
        AttentionMaskInterface.register(name, mask_of_layers)


def set_attention(model: PreTrainedModel) -> None:
    """`register`, and give a model lvrpo's attention; its towers get all windows in one call.

    `attn_implementation="lvrpo"` is as right, with a call for every window of a tower.

    Args:
        model: of transformers.

    Raises:
        ImportError: transformers is missing, or not a release that this is tested with.
        ValueError: the model's attention is its own, and cannot be replaced.
    """
    register()
    text = model.config.get_text_config()
    model.set_attn_implementation(_implementations(model.config, text))
    if text._attn_implementation != IMPLEMENTATION:
        raise ValueError(
            f"set_attention: {type(model).__name__} keeps its own attention "
            f"({text._attn_implementation!r}), expected a model of transformers' AttentionInterface"
        )


def _implementations(config: PreTrainedConfig, text: PreTrainedConfig) -> str | dict[str, Any]:
    """Of a configuration: VARLEN for parts that hold no text."""
    parts = {name: getattr(config, name, None) for name in config.sub_configs}
    if not parts:
        return IMPLEMENTATION if config is text else VARLEN
    of_parts = {n: _implementations(part, text) for n, part in parts.items() if part is not None}
    return {"": IMPLEMENTATION, **of_parts}


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: BatchMask | Refusal | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    is_causal: bool | None = None,
    span_mask: SpanMask | None = None,
    cu_seq_lens_q: Tensor | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """What transformers' `AttentionInterface` calls, with these names.

    Args:
        module: the layer.
        query: [B, Hq, Lq, D].
        key: [B, Hkv, L, D].
        value: [B, Hkv, L, Dv].
        attention_mask: from `mask_of_layers`; None: all of a sequence, or what precedes.
        scaling: multiplies the scores; None means D^-0.5.
        dropout: 0.
        softcap: of the scores; None or 0 means none.
        s_aux: [Hq] scores of a sink, a key of every query whose value is 0; None: there is none.
        is_causal: None: as the layer says.
        span_mask: a keyword of the model: takes the place of the mask in layers of text, whose
            windows stay. Its rows are those of the batch, one sequence after the other.
        cu_seq_lens_q: offsets of what a sequence is packed of, where the mask is None.
        others: what layers hand on besides.

    Returns:
        [B, Lq, Hq, Dv], 0 in padding; and None, for there are no weights.

    Raises:
        ValueError: a mask of pairs, dropout, or scores with something added.
    """
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    for name in UNKNOWN:
        if others.get(name) is not None:
            raise ValueError(f"{NAME}: {type(module).__name__} has {name}; use 'eager' for it")
    if dropout:
        raise ValueError(f"{NAME}: dropout is {dropout}, expected 0: set config.attention_dropout")
    if not isinstance(attention_mask, BatchMask | Refusal | None):
        raise ValueError(
            f"{NAME}: attention_mask is {type(attention_mask).__name__} of pairs, expected [B, L] "
            "for padding, or a SpanMask as span_mask="
        )
    chosen = attention_mask
    if span_mask is not None and (causal if chosen is None else chosen.of_text):
        _check_layers(module, chosen)
        window = None if chosen is None else chosen.window
        chosen = BatchMask(_with_window(span_mask, window))
    elif isinstance(chosen, Refusal):
        raise chosen.error
    elif chosen is None and cu_seq_lens_q is not None:
        chosen = BatchMask(_from_offsets(cu_seq_lens_q, causal))
    elif chosen is None:
        lengths = query.shape[0], query.shape[2], key.shape[2]
        chosen = _plain(*lengths, causal, query.device)
    q, k, v = (_rows(x) for x in (query, key, value))
    if chosen.keys is not None:
        k, v = (x.index_select(0, chosen.keys) for x in (k, v))
    how: dict[str, Any] = {"scale": scaling, "softcap": softcap or 0.0}
    out = _with_sink(q, k, v, chosen.mask, chosen.queries, s_aux, how)
    for mask, queries in chosen.padding:
        out = out + _with_sink(q, k, v, mask, queries, s_aux, how)
    return out.view(query.shape[0], query.shape[2], *out.shape[1:]), None


def _check_layers(module: nn.Module, given: BatchMask | Refusal | None) -> None:
    """A `span_mask` says who sees whom, as far as that is all that the model's layers go by.

    Raises:
        ValueError: some layers go by more than that.
    """
    types = getattr(getattr(module, "config", None), "layer_types", None) or ()
    others = sorted({*types} - SPAN_LAYERS)
    if others or (given is not None and not given.is_read):
        what = ", ".join(others) or "masks that no span_mask can take the place of"
        raise ValueError(
            f"{NAME}: the model of {type(module).__name__} has {what}, expected "
            f"{' or '.join(sorted(SPAN_LAYERS))} for span_mask; give it separate sequences"
        )


def _with_sink(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: SpanMask,
    queries: Tensor | None,
    sink: Tensor | None,
    how: dict[str, Any],
) -> Tensor:
    """Attention [rows of q, Hq, Dv] of the mask's queries; 0 in others. Weight goes to a sink."""
    rows = q if queries is None else q.index_select(0, queries)
    out: Tensor
    if sink is None:
        out = packed_attention(rows, k, v, mask, **how)
    else:
        out, lse = packed_attention(rows, k, v, mask, return_lse=True, **how)
        # exp(lse) / (exp(lse) + exp(sink)) of the weights are left for the keys.
        out = (out * torch.sigmoid(lse - sink)[..., None]).to(out.dtype)
    if queries is None:
        return out
    everywhere = out.new_zeros(len(q), *out.shape[1:])
    return everywhere.index_copy(0, queries, out)


def _rows(x: Tensor) -> Tensor:
    """[B, H, L, D] as [B * L, H, D]."""
    return x.transpose(1, 2).reshape(-1, x.shape[1], x.shape[3])


def _with_window(mask: SpanMask, window: int | None) -> SpanMask:
    if window is None:
        return mask
    made = _windowed.setdefault(mask, {})
    if window not in made:
        windowed = mask.with_window(window)
        # A mask that were kept by itself would be kept for good.
        made[window] = None if windowed.window is None else windowed
    return made[window] or mask


def _from_offsets(offsets: Tensor, causal: bool) -> SpanMask:
    """Documents from the offsets that all layers of a tower are given."""
    made: dict[bool, SpanMask] = _of_offsets.setdefault(offsets, {})
    if causal not in made:
        made[causal] = SpanMask.from_cu_seqlens(offsets.cpu(), causal).to(offsets.device)
    return made[causal]


@functools.lru_cache(maxsize=8)
def _plain(batch: int, queries: int, keys: int, causal: bool, device: torch.device) -> BatchMask:
    """Sequences of one length, the last of whose keys are queries."""
    from transformers.masking_utils import bidirectional_mask_function, causal_mask_function

    function = causal_mask_function if causal else bidirectional_mask_function
    return batch_mask(batch, queries, keys, keys - queries, mask_function=function, device=device)
