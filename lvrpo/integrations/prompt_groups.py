"""Completions of equal prompts as one buffer, in which each prompt stands once.

B prompts with completions, padded to S tokens, the last C of them of the completion; L rows of the
buffer.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Hashable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lvrpo.integrations.transformers.attention import SPAN_LAYERS
from lvrpo.masks import SpanMask
from lvrpo.masks.positions import position_ids
from lvrpo.params.from_trl import refuse

#: Inputs of a model that have a number per token: [B, S].
PER_TOKEN = ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids")
#: Inputs by which a model numbers the tokens of images and videos.
OF_POSITIONS = (
    *("input_ids", "attention_mask", "mm_token_type_ids"),
    *("image_grid_thw", "video_grid_thw", "second_per_grid_ts"),
)
#: Models of transformers, by `model_type`, that let tokens of a prompt see later ones (of an image,
#: of a prefix), which a causal prompt of a tree does not.
SEE_AHEAD = {
    *("deepseek_ocr2", "diffusion_gemma", "gemma3", "gemma4", "gemma4_unified", "git", "hrm_text"),
    *("molmo2", "paligemma", "pi0", "unlimited_ocr"),
}
#: What configurations of transformers call the dropout of attention's weights.
ATTENTION_DROPOUT = ("attention_dropout", "attn_pdrop", "attention_probs_dropout_prob")


def check_model(model: Any) -> None:
    """Refuse a model that would not give every completion what it has with a prompt of its own.

    Args:
        model: of transformers, or an adapter of PEFT around one.

    Raises:
        ValueError: names what the model has, and says what to do.
    """
    for why in unshared(model):
        refuse("share_prompts", True, f"but {why}", "False")
    text = model.config.get_text_config()
    for config in (text, *(getattr(model.config, part, None) for part in model.config.sub_configs)):
        for name in ATTENTION_DROPOUT:
            if getattr(config, name, None):
                why = f"which share_prompts has no attention for ({type(config).__name__})"
                refuse(name, getattr(config, name), why, "0")


def unshared(model: Any, laid_out: Collection[str] = ()) -> Iterator[str]:
    """Why completions of a model cannot share a prompt; nothing if they can.

    Args:
        model: of transformers, or an adapter of PEFT around one.
        laid_out: models, by `model_type`, whose buffers have spans for what sees ahead.
    """
    kind = model.config.model_type
    types = getattr(model.config.get_text_config(), "layer_types", None) or ()
    layers = sorted({*types} - SPAN_LAYERS)
    adapter = getattr(model, "active_peft_config", None)
    if kind in SEE_AHEAD - {*laid_out}:
        yield f"the prompts of {kind} are not causal"
    if layers:
        yield f"{kind} has layers that a tree says nothing of ({', '.join(layers)})"
    if adapter is not None and adapter.is_prompt_learning:
        yield (
            "the adapter puts tokens of its own before prompts, as LoRA does not "
            f"({adapter.peft_type.value})"
        )


@dataclasses.dataclass(frozen=True, eq=False)
class PromptGroups:
    """Where the tokens of a batch stand in its buffer; make one with `group_prompts`.

    Attributes:
        mask: [L], a tree for each prompt.
        tokens: [L] int64, the token of the batch, of B * S, that each row holds.
        row_index: [B, C] int64, the row that predicts each token of a completion; 0 for padding.
        owners: the sequence of each tree whose prompt stands in it.
    """

    mask: SpanMask
    tokens: Tensor
    row_index: Tensor
    owners: list[int]


def group_prompts(
    input_ids: Tensor, attention_mask: Tensor, completion_length: int, keys: Sequence[Hashable] = ()
) -> PromptGroups:
    """Lay out sequences so that equal prompts are one.

    Args:
        input_ids: [B, S] prompts, padded on any side, and completions.
        attention_mask: [B, S], above 0 for what is no padding.
        completion_length: C.
        keys: of each sequence, what its prompt has besides tokens; prompts with different ones are
            different.

    Raises:
        ValueError: a prompt is empty.
    """
    ids, present = input_ids.tolist(), (attention_mask > 0).tolist()
    batch, length = input_ids.shape
    prompt_length = length - completion_length
    groups: dict[Hashable, list[int]] = {}
    columns = [[at for at in range(length) if row[at]] for row in present]
    prompts = [[at for at in row if at < prompt_length] for row in columns]
    for sequence, row in enumerate(prompts):
        if not row:
            raise ValueError(f"group_prompts: sequence {sequence} has no prompt, expected a token")
        key = (tuple(ids[sequence][at] for at in row), keys[sequence] if keys else None)
        groups.setdefault(key, []).append(sequence)

    layout, tokens = [], []
    row_index = torch.zeros(batch, completion_length, dtype=torch.int64)
    for members in groups.values():
        prompt = prompts[members[0]]
        tokens += [members[0] * length + at for at in prompt]
        last, completions = len(tokens) - 1, []
        for member in members:
            own = columns[member][len(prompts[member]) :]
            first = len(tokens)
            tokens += [member * length + at for at in own]
            before = torch.tensor([last, *range(first, len(tokens) - 1)])[: len(own)]
            row_index[member, [at - prompt_length for at in own]] = before
            completions.append([(len(own), "causal")])
        layout.append(([(len(prompt), "causal")], completions))
    device = input_ids.device
    return PromptGroups(
        SpanMask.from_groups(layout).to(device),
        torch.tensor(tokens, device=device),
        row_index.to(device),
        [members[0] for members in groups.values()],
    )


def grouped_inputs(
    model: Any, rows: Sequence[dict[str, Any]], completion_length: int
) -> tuple[dict[str, Any], Tensor]:
    """Inputs of a model for one buffer, from those for each sequence by itself.

    Args:
        model: of transformers, with the attention "lvrpo".
        rows: of each of B sequences the inputs of a call with a batch of one; what is no tensor per
            token belongs to the images of its prompt, and its first dimension counts them.
        completion_length: C.

    Returns:
        inputs: with a batch of one, with `span_mask` and `position_ids`; images of a prompt are
            those of one of its sequences.
        row_index: [B, C], see `PromptGroups`.
    """
    per_token = {
        name: torch.cat([row[name] for row in rows]) for name in PER_TOKEN if name in rows[0]
    }
    of_images = [name for name in rows[0] if name not in PER_TOKEN]
    images = [{name: row[name] for name in of_images if name in row} for row in rows]
    groups = group_prompts(
        per_token["input_ids"], per_token.pop("attention_mask"), completion_length, _names(images)
    )
    inputs: dict[str, Any] = {
        name: value.flatten()[groups.tokens][None] for name, value in per_token.items()
    }
    inputs["span_mask"] = groups.mask
    inputs["position_ids"] = _positions(model, rows, groups)
    for name in of_images:
        inputs[name] = torch.cat([images[owner][name] for owner in groups.owners])
    return inputs, groups.row_index


def _positions(model: Any, rows: Sequence[dict[str, Any]], groups: PromptGroups) -> Tensor:
    """[1, L], or [3, 1, L] for a model that numbers images in three directions."""
    every = [image_positions(model, row) for row in rows]
    numbered = [positions for positions in every if positions is not None]
    if not numbered:
        return position_ids(groups.mask)[None]
    found: Tensor = torch.cat(numbered, dim=1).flatten(1)[:, None, groups.tokens]
    return found


def image_positions(model: Any, inputs: Mapping[str, Any]) -> Tensor | None:
    """[3, B, S] positions, where a model numbers images and videos in three directions, or None.

    Args:
        model: of transformers; the installed release says how.
        inputs: of the model, with the types of its tokens and the grids of its images and videos.
    """
    find = [module for module in model.modules() if hasattr(type(module), "get_rope_index")]
    if not find or "mm_token_type_ids" not in inputs:
        return None
    found: Tensor = find[0].get_rope_index(**{n: inputs[n] for n in OF_POSITIONS if n in inputs})[0]
    return found


def _names(images: Sequence[dict[str, Any]]) -> list[int]:
    """For each sequence the first one that has the same images."""
    names: list[int] = []
    for number, own in enumerate(images):
        same = (
            other
            for other in dict.fromkeys(names)
            if own.keys() == images[other].keys()
            and all(torch.equal(own[name], images[other][name]) for name in own)
        )
        names.append(next(same, number))
    return names
