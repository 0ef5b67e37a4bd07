"""Bytes that autograd saves, against the tensors that it asks to keep."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from planning.planned_models import CONFIGS, buffer_of, model_of, shape_of
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import checkpoint

from lvrpo.models.bagel.config import BagelConfig
from lvrpo.models.bagel.model import Bagel
from lvrpo.models.transformer import Parameters
from lvrpo.models.unified.model import Expert, UnifiedModel
from lvrpo.planning import memory
from lvrpo.planning.memory import Numerics
from lvrpo.planning.rows import Rows


class Saved:
    """Storages that autograd keeps, without those of parameters."""

    def __init__(self, model: nn.Module) -> None:
        self.of_model = {p.untyped_storage().data_ptr() for p in model.parameters()}
        self.kept: dict[int, Tensor] = {}
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor)

    def _pack(self, tensor: Tensor) -> Tensor:
        where = tensor.untyped_storage().data_ptr()
        if where not in self.of_model:
            self.kept[where] = tensor
        return tensor

    @property
    def bytes(self) -> int:
        return sum(tensor.untyped_storage().nbytes() for tensor in self.kept.values())


class FusedNorm(torch.autograd.Function):
    """Saves what the fused kernel of a GPU does: input, weight, and a number per row."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        rstd = x.float().square().mean(dim=-1, keepdim=True).rsqrt()
        ctx.save_for_backward(x, weight, rstd)
        return (x.float() * rstd).to(x.dtype) * weight


class FusedRMSNorm(nn.Module):
    def __init__(self, norm: nn.RMSNorm) -> None:
        super().__init__()
        self.weight = norm.weight

    def forward(self, x: Tensor) -> Tensor:
        return FusedNorm.apply(x, self.weight)


def fuse_norms(model: nn.Module) -> None:
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.RMSNorm):
                setattr(module, name, FusedRMSNorm(child))


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("fused", [False, True], ids=["composite", "fused"])
def test_saved_activations_are_those_that_autograd_keeps(config, dtype, fused):
    model = model_of(config, dtype)
    if fused:
        fuse_norms(model)
    batch, rows = buffer_of(config, 2)
    saved = Saved(model)
    with saved.hooks:
        _, latent = model(batch)
        model.velocity(latent)
    numerics = Numerics(compute=dtype.itemsize, fused_norms=fused)
    expected = memory.saved(shape_of(config), rows, numerics)
    assert abs(expected - saved.bytes) < 0.01 * saved.bytes


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_a_layer_more_saves_what_the_formula_of_one_says(config):
    """Ends and tables cancel: what is left of the formula is exact."""
    found = []
    for layers in (config.layers, config.layers + 1):
        deeper = dataclasses.replace(config, layers=layers)
        batch, rows = buffer_of(deeper)
        saved = Saved(model := model_of(deeper))
        with saved.hooks:
            model(batch)
        found.append(saved.bytes)
    stack = shape_of(config).language
    expected = sum(memory.saved_layer(stack, n, Numerics()) for n in (rows.read, rows.latents))
    assert found[1] - found[0] == expected


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "checkpointed"])
def test_what_a_forward_pass_leaves_behind_is_what_the_formula_says(checkpointing):
    """By torch's allocations, for checkpoints hold their inputs where no hook sees them."""
    config = CONFIGS["bagel"]
    batch, rows = buffer_of(config, 2)
    model = model_of(config)
    assert isinstance(model, Bagel)
    model.gradient_checkpointing = checkpointing
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as measured:
        text, latent = model(batch)
        velocity = model.velocity(latent)
    events = measured.profiler.kineto_results.events()
    left = sum(event.nbytes() for event in events if event.name() == "[memory]")
    left -= text.nbytes + velocity.nbytes  # returned, not saved
    shape = dataclasses.replace(shape_of(config), vision=None)
    expected = memory.saved(shape, rows, Numerics(checkpointing=checkpointing))
    expected += saved_by_tower(config, rows)
    assert abs(expected - left) < 0.02 * left


def saved_by_tower(config: BagelConfig, rows: Rows) -> int:
    """A BAGEL checkpoints its language model alone."""
    tower = shape_of(config).tower
    one = memory.saved_layer(tower, rows.patches, Numerics(), packed=False)
    return one * tower.layers + memory.saved_pre_norm(tower, rows.patches, Numerics())


def test_a_checkpointed_layer_keeps_its_input_alone():
    config = CONFIGS["wide"]
    model: UnifiedModel = model_of(config)
    rows, expert = 32, model.layers[0].understand
    assert isinstance(expert, Expert)

    def layer(x: Tensor) -> Tensor:
        query = expert.project(x, None)[:, : config.heads]
        return expert.finish(x, query.flatten(1))

    saved = Saved(model)
    x = torch.randn(rows, config.hidden, requires_grad=True)
    with saved.hooks:
        for _ in range(config.layers):
            x = checkpoint(layer, x, use_reentrant=False)
    assert saved.bytes == 4 * rows * config.hidden * config.layers
    model_, (_, counted) = shape_of(config), buffer_of(config)
    every = memory.saved(model_, counted, Numerics())
    kept = memory.saved(model_, counted, Numerics(checkpointing=True))
    ends = memory.saved_ends(model_, counted, Numerics())
    assert kept - ends == 4 * counted.total * config.hidden * config.layers
    assert kept < every


def test_state_is_what_ranks_hold_of_every_parameter():
    parameters = Parameters(trained=1000, frozen=24, unit=100)
    one = memory.state(parameters, Numerics(), 1, kept=True)
    assert one == {
        "weights": 4096,
        "gradients": 4000,
        "optimizer": 8000,
        "reference": 4000,  # the frozen ones are the policy's own
        "kept step": 12000,
    }
    eight = memory.state(parameters, Numerics(compute=2), 8, kept=False)
    assert eight["weights"] == 512
    assert eight["optimizer"] == 1000
    assert eight["reference"] == 250
    assert eight["kept step"] == 0
    assert eight["gathered"] == 1000


def test_the_optimizer_holds_two_numbers_of_every_parameter():
    model = model_of(CONFIGS["tower"])
    batch, _ = buffer_of(CONFIGS["tower"])
    text, latent = model(batch)
    (model.logits(text).sum() + model.velocity(latent).sum()).backward()
    optimizer = torch.optim.AdamW(model.parameters())
    optimizer.step()
    held = sum(
        tensor.nbytes
        for state in optimizer.state.values()
        for name, tensor in state.items()
        if name != "step"
    )
    state = memory.state(Parameters.of(model), Numerics(), 1, kept=False)
    assert held == state["optimizer"]
    assert sum(p.grad.nbytes for p in model.parameters()) == state["gradients"]
    assert sum(p.nbytes for p in model.parameters()) == state["weights"]
