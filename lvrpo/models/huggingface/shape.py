"""A language model of transformers as the numbers that a plan takes, from its configuration."""

from __future__ import annotations

from typing import Any

from torch import nn

from lvrpo.models.transformer import Stack, Transformer


def transformer(model: Any) -> Transformer:
    """What the text model of a model of transformers is made of; a vision tower is left out.

    Args:
        model: of transformers, on whatever device, without adapters.

    Raises:
        ValueError: its layers have other matrices than attention and a feed-forward, as layers of
            experts have.
    """
    config, decoder = model.config.get_text_config(), model.get_decoder()
    names = {name.rpartition(".")[2] for name, _ in decoder.layers[0].named_modules()}
    heads = config.num_attention_heads
    stack = Stack(
        layers=len(decoder.layers),
        hidden=config.hidden_size,
        heads=heads,
        kv_heads=getattr(config, "num_key_value_heads", None) or heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
        mlp=config.intermediate_size,
        gated=bool(names & {"gate_proj", "gate_up_proj"}),
        qk_norms="q_norm" in names,
    )
    for number, layer in enumerate(decoder.layers):
        found = sum(p.numel() for p in layer.parameters() if p.dim() > 1)
        if found != stack.matrices:
            raise ValueError(
                f"layer {number} of {type(model).__name__} has matrices of {found:,} numbers, "
                f"expected {stack.matrices:,} for a plan: attention and one feed-forward"
            )
    head: nn.Linear = model.get_output_embeddings()
    vocab = head.weight.shape[0]
    return Transformer(language=stack, vocab=vocab, answers=vocab, experts=False)
