"""Parameters as they are counted, and matrices as the formulas have them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from planning.planned_models import BAGEL, UNIFIED, model_of, shape_of
from torch import nn

from lvrpo.models.transformer import Parameters
from lvrpo.models.unified.model import UnifiedConfig, UnifiedModel
from lvrpo.runs.scaling import tables


def numbers(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def linear(module: nn.Module) -> int:
    return sum(m.weight.numel() for m in module.modules() if isinstance(m, nn.Linear))


def test_matrices_are_those_of_a_bagel():
    model, shape = model_of(BAGEL), shape_of(BAGEL)
    layers = model.language_model["model"].layers
    assert 2 * shape.language.matrices == linear(layers[0])
    assert shape.tower.matrices * shape.tower.layers == linear(
        model.vit_model["vision_model"].encoder
    )
    assert shape.connector_matrices == linear(model.connector)
    assert Parameters.of(model).unit == numbers(layers[0])


@pytest.mark.parametrize("config", UNIFIED.values(), ids=UNIFIED)
def test_matrices_are_those_of_the_linear_modules(config):
    model, shape = model_of(config), shape_of(config)
    for expert in (model.layers[0].understand, model.layers[0].generate):
        assert shape.language.matrices == linear(expert)
    assert shape.tower.matrices * shape.tower.layers == linear(model.vision)
    assert shape.connector_matrices == linear(model.connector)
    assert shape.vocab * shape.language.hidden == linear(model.head)


def test_parameters_are_counted_on_the_meta_device():
    with torch.device("meta"):
        model = UnifiedModel(UnifiedConfig.preset("bagel-7b"))
    model.vision.requires_grad_(False)
    counted = Parameters.of(model)
    assert counted.total == numbers(model)
    assert counted.frozen == numbers(model.vision)
    assert counted.unit == numbers(model.embedding) == 152064 * 3584
    # Qwen2.5-7B has 7.62 billion, 1.09 of them in embedding and head.
    assert 2 * 6.5e9 < numbers(model.layers) < 2 * 6.6e9


def test_a_module_without_parts_is_one_unit():
    assert Parameters.of(nn.Linear(3, 5)) == Parameters(20, 0, 20)


def test_docs_have_the_tables_of_the_command():
    page = Path(__file__).parents[2] / "docs/scaling.md"
    said = page.read_text(encoding="utf-8")
    for table in tables().split("\n\n"):
        assert table in said, "docs/scaling.md: paste what `lvrpo plan --scaling` prints"
