"""FLOPs, against torch's own counter on the plain backend."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from planning.planned_models import CONFIGS, buffer_of, model_of, shape_of
from torch.utils.flop_counter import FlopCounterMode

from lvrpo.models.unified.model import UnifiedModel
from lvrpo.planning import flops

BMM = torch.ops.aten.bmm


def counted(model: UnifiedModel, batch, predictors: int, *, backward: bool) -> tuple[int, int]:
    """Operations of matrices, and of attention."""
    with FlopCounterMode(display=False) as counter:
        text, latent = model(batch, backend="torch")
        loss = model.logits(text[:predictors]).sum() + model.velocity(latent).sum()
        if backward:
            loss.backward()
    counts = counter.get_flop_counts()["Global"]
    return sum(count for op, count in counts.items() if op != BMM), counts[BMM]


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_matrices_are_counted_to_the_operation(config):
    batch, rows = buffer_of(config, 2)
    rows = dataclasses.replace(rows, predictors=11)
    model, shape = model_of(config), shape_of(config)
    forward, _ = counted(model, batch, 11, backward=False)
    both, _ = counted(model, batch, 11, backward=True)
    attention = flops.attentions(shape, rows)
    assert forward == flops.forward(shape, rows) - attention
    of_backward = flops.backward(shape, rows) - int(flops.ATTENTION_BACKWARD * attention)
    assert both - forward == of_backward


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_attention_is_that_of_the_pairs(config):
    """The plain backend multiplies every query of a document with every key of it."""
    batch, rows = buffer_of(config)
    documents = torch.tensor(batch.mask.documents).diff()
    dense = dataclasses.replace(rows, pairs=int(documents.square().sum()))
    _, attention = counted(model_of(config), batch, 1, backward=False)
    assert attention == flops.attentions(shape_of(config), dense)
    assert rows.pairs == int(batch.mask.to_dense().sum())
    assert rows.pairs < dense.pairs


def test_an_update_adds_the_passes_that_it_makes():
    config = CONFIGS["tower"]
    shape, (_, rows) = shape_of(config), buffer_of(config)
    plain = flops.update(shape, rows, reference=False, checkpointing=False)
    assert plain == flops.forward(shape, rows) + flops.backward(shape, rows)
    referred = flops.update(shape, rows, reference=True, checkpointing=False)
    assert referred - plain == flops.forward(shape, rows)
    again = flops.update(shape, rows, reference=False, checkpointing=True)
    layers = flops.layers(shape.language, rows.total) + flops.layers(shape.tower, rows.patches)
    assert again - plain == layers + flops.attentions(shape, rows)
