"""Bytes, as formulas: what stays, what autograd saves, what a layer works with.

n rows, b bytes of a number that is computed with (fp32 4, bf16 2). Norms, log-sum-exps and the
sums of the loss are in fp32 whatever b is.
"""

from __future__ import annotations

from dataclasses import dataclass

from lvrpo.models.transformer import Parameters, Stack, Transformer
from lvrpo.ops.head.linear import CPU_BYTES, CPU_ROWS, GPU_BYTES
from lvrpo.planning.rows import Rows

#: Bytes of a number.
FP32, FP64, INT32, INT64 = 4, 8, 4, 8


@dataclass(frozen=True)
class Numerics:
    """How a model is computed.

    Attributes:
        compute: bytes of a number in weights and activations; parameters, gradients and what the
            optimizer keeps are fp32 in any case.
        fused_norms: whether a norm is one kernel, which saves its input and a number per row, as on
            a GPU. On a CPU it is several, which save the input and the normed numbers in fp32.
        checkpointing: whether a layer's activations are computed again in the backward pass.
    """

    compute: int = 4
    fused_norms: bool = False
    checkpointing: bool = False


def state(parameters: Parameters, numerics: Numerics, ranks: int, *, kept: bool) -> dict[str, int]:
    """Bytes of each rank that stay for the whole policy phase, sharded as by FSDP2's `fully_shard`.

    Args:
        parameters: of the policy.
        numerics: of the model.
        ranks: that share all parameters.
        kept: whether a step updates several times, for which the last finished one is copied.
    """
    trained, every = (-(-count // ranks) for count in (parameters.trained, parameters.total))
    found = {
        "weights": FP32 * every,
        "gradients": FP32 * trained,
        "optimizer": 2 * FP32 * trained,
        "reference": numerics.compute * trained,  # what is frozen is the policy's own
        "kept step": 3 * FP32 * trained if kept else 0,
    }
    if ranks > 1 or numerics.compute < FP32:
        # The unit in use and the next one, whose gradients are summed in fp32.
        found["gathered"] = (3 * numerics.compute + FP32) * parameters.unit
    return found


def saved_norm(rows: int, width: int, groups: int, numerics: Numerics) -> int:
    """What `nn.RMSNorm` saves of [n, width] numbers, each row in so many groups of their own."""
    of_rows = FP32 * rows * groups
    if numerics.fused_norms:
        return numerics.compute * rows * width + of_rows
    return 2 * FP32 * rows * width + of_rows


def saved_pre_norm(stack: Stack, rows: int, numerics: Numerics) -> int:
    """What the norm before a part of a layer saves; a LayerNorm its input and two numbers a row."""
    if stack.layer_norms:
        return numerics.compute * rows * stack.hidden + 2 * FP32 * rows
    return saved_norm(rows, stack.hidden, 1, numerics)


def saved_layer(stack: Stack, rows: int, numerics: Numerics, *, packed: bool = True) -> int:
    """What autograd saves of one layer for one expert's rows.

    Args:
        stack: the layer's.
        rows: n.
        numerics: of the model.
        packed: whether rows are put in the order of the buffer and back around the attention, as
            experts with rows of their own are.
    """
    b, n, h, m = numerics.compute, rows, stack.hidden, stack.mlp
    heads = stack.heads + stack.kv_heads
    rotated = heads * stack.head_dim
    projected = saved_norm(n, rotated, heads, numerics) if stack.qk_norms else 0
    if stack.joint and (numerics.fused_norms or b == FP32):
        projected += b * n * (stack.qkv - rotated)  # queries and keys are saved with the values
    attention = b * n * (stack.qkv + stack.attended) + FP32 * n * stack.heads
    attention += b * n * stack.attended if packed else 0
    norms = 2 * (saved_pre_norm(stack, n, numerics) + b * n * h)  # and what is projected
    # Gate and up, the gate's activation, its product with up; or the width and its activation.
    feed_forward = b * n * m * (4 if stack.gated else 2)
    return norms + projected + attention + feed_forward


def saved_ends(model: Transformer, rows: Rows, numerics: Numerics) -> int:
    """What autograd saves before the first layer, after the last one, and for all of them."""
    b, h = numerics.compute, model.language.hidden
    connector = sum(model.connector[:1]) + 2 * sum(model.connector[1:-1])
    patches = b * rows.patches * (model.patch + connector) + INT64 * rows.patches
    latents = b * rows.latents * (model.latent + model.timestep + 2 * h) + INT64 * rows.latents
    # Per row: there and back between the experts' order and the buffer's, the mask, the rotation.
    tables = rows.total * (2 * INT64 + 3 * INT32 + FP32 * model.language.head_dim)
    norms = sum(saved_norm(count, h, 1, numerics) for count in (rows.text, rows.latents))
    if numerics.fused_norms or b == FP32:  # text is saved with the patches that it was read with
        norms += b * rows.patches * h
    if model.tower.layer_norms:
        norms += saved_pre_norm(model.tower, rows.patches, numerics)
    return INT64 * rows.text + patches + latents + tables + norms + b * rows.latents * h


def saved(model: Transformer, rows: Rows, numerics: Numerics) -> int:
    """What autograd saves of a forward pass over one packed buffer, the loss apart."""
    layers = [
        (model.language, rows.read, model.experts),
        (model.language, rows.latents, model.experts),
        (model.tower, rows.patches, False),
    ]
    found = saved_ends(model, rows, numerics)
    for stack, count, packed in layers:
        one = saved_layer(stack, count, numerics, packed=packed)
        if numerics.checkpointing:
            found += numerics.compute * count * stack.hidden * stack.layers
        else:
            found += one * stack.layers
    return found


def working(model: Transformer, rows: Rows, numerics: Numerics) -> int:
    """What a layer holds at its largest moment, its feed-forward, while nothing is saved.

    Queries, keys and values as they were projected and as they were packed, what they attended to
    in either order, the rows before and after it, and four times the width of the feed-forward.
    """

    def of(stack: Stack, every: int, most: int) -> int:
        attention = 2 * every * (stack.qkv + stack.attended)
        of_mlp = (4 if stack.gated else 2) * stack.mlp
        return numerics.compute * (attention + most * (2 * stack.hidden + of_mlp))

    language = of(model.language, rows.total, max(rows.read, rows.latents))
    return max(language, of(model.tower, rows.patches, rows.patches))


def unsaved(model: Transformer, rows: Rows, numerics: Numerics) -> int:
    """What the last layer of a pass that saves holds besides: its queries, keys and values."""
    h = model.language.hidden
    return numerics.compute * (rows.total * model.language.qkv + max(rows.read, rows.latents) * h)


def saved_again(model: Transformer, rows: Rows, numerics: Numerics) -> int:
    """What the layer of a checkpointed model saves that is computed again in the backward pass."""
    language = sum(
        saved_layer(model.language, count, numerics, packed=model.experts)
        for count in (rows.read, rows.latents)
    )
    return max(language, saved_layer(model.tower, rows.patches, numerics, packed=False))


def head(model: Transformer, rows: Rows, numerics: Numerics, *, on_gpu: bool) -> dict[str, int]:
    """What the text loss adds: gradients that wait in fp32, and one chunk of logits.

    The gradient of the weight is given away, so that it is counted with the gradients of the
    parameters from the second buffer on.
    """
    if not rows.predictors:
        return {"head": 0, "logits": 0}
    row = model.answers * (FP32 + (numerics.compute if on_gpu and numerics.compute < FP32 else 0))
    budget = max(GPU_BYTES, row) if on_gpu else max(CPU_BYTES, CPU_ROWS * row)
    states = (numerics.compute + FP32) * rows.predictors * model.language.hidden
    return {
        "head": states + FP32 * model.vocab * model.language.hidden,
        "logits": row * min(rows.predictors, budget // row),
    }


def plain_logits(model: Transformer, rows: Rows, numerics: Numerics) -> int:
    """What plain torch holds in place of one chunk: logits, their log-softmax, its gradient."""
    return rows.predictors * model.vocab * (2 * numerics.compute + 2 * FP32)


def cache(model: Transformer, rows: Rows, numerics: Numerics) -> int:
    """Keys and values of every row of a layout, in all layers."""
    stack = model.language
    return 2 * stack.layers * rows.total * stack.kv_heads * stack.head_dim * numerics.compute


def sampling(model: Transformer, samples: int, numerics: Numerics) -> int:
    """Logits of one position of so many answers, and their distribution in fp64."""
    return samples * (numerics.compute * model.vocab + 3 * FP64 * model.answers)


def trajectory(model: Transformer, pictures: int, tokens: int, latent: int, trained: int) -> int:
    """Latents, velocities and, where it is kept, noise of the steps that are trained, in fp32."""
    return FP32 * pictures * tokens * latent * (2 + model.keeps_noise) * trained


def noise(model: Transformer, pictures: int, tokens: int, latent: int, steps: int) -> int:
    """What drawings start from and, where it is kept, the noise of all steps, in fp32."""
    return FP32 * pictures * tokens * latent * (1 + model.keeps_noise * steps)
