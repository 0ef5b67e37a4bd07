"""Floating-point operations of matrices and attention: a product and its addition are two."""

from __future__ import annotations

from lvrpo.models.transformer import Stack, Transformer
from lvrpo.planning.rows import Rows

#: Products of attention's backward pass, which forms the scores again, per product of its forward.
ATTENTION_BACKWARD = 5 / 2


def layers(stack: Stack, rows: int) -> int:
    """What the matrices of a stack do in a forward pass over n rows: 2 n per number in them."""
    return 2 * rows * stack.matrices * stack.layers


def attention(stack: Stack, pairs: int) -> int:
    """Scores and weighted sum, 2 D each, for every head and every pair that the mask shows."""
    return 4 * pairs * stack.attended * stack.layers


def inputs(model: Transformer, rows: Rows) -> int:
    """The first matrices of patches, latents and times; their inputs have no gradient."""
    h = model.language.hidden
    of_patch = model.patch * sum(model.connector[:1])
    return 2 * (rows.patches * of_patch + rows.latents * (model.latent + model.timestep) * h)


def ends(model: Transformer, rows: Rows) -> int:
    """The connector, the second matrix of times, and the velocity."""
    h = model.language.hidden
    of_latent = h * h + h * model.latent
    return 2 * (rows.patches * model.connector_matrices + rows.latents * of_latent)


def products(model: Transformer, rows: Rows) -> int:
    """All matrices of a forward pass that have inputs with a gradient, the head apart."""
    return (
        layers(model.language, rows.read + rows.latents)
        + layers(model.tower, rows.patches)
        + ends(model, rows)
    )


def attentions(model: Transformer, rows: Rows) -> int:
    """Attention of the language model and of the vision tower, forward."""
    return attention(model.language, rows.pairs) + attention(model.tower, rows.patch_pairs)


def head(model: Transformer, rows: int) -> int:
    """The projection of n rows on the tokens that answers may hold."""
    return 2 * rows * model.language.hidden * model.answers


def forward(model: Transformer, rows: Rows) -> int:
    """A forward pass over buffers, the head included."""
    body = inputs(model, rows) + products(model, rows) + attentions(model, rows)
    return body + head(model, rows.predictors)


def backward(model: Transformer, rows: Rows) -> int:
    """Its backward pass: two products for one; those of the inputs need one."""
    of_attention = int(ATTENTION_BACKWARD * attentions(model, rows))
    products_twice = products(model, rows) + head(model, rows.predictors)
    return inputs(model, rows) + 2 * products_twice + of_attention


def update(model: Transformer, rows: Rows, *, reference: bool, checkpointing: bool) -> int:
    """Forward and backward over the buffers of an update.

    Args:
        model: the policy.
        rows: of all its buffers.
        reference: whether a KL asks for a pass of the frozen reference.
        checkpointing: whether layers are computed again in the backward pass.
    """
    body = products(model, rows) - ends(model, rows) + attentions(model, rows)
    again = forward(model, rows) if reference else 0
    again += body if checkpointing else 0
    return forward(model, rows) + backward(model, rows) + again
