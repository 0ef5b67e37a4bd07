"""Models whose parameters ranks share, against one process. To be run in every rank."""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.distributed
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

import lvrpo
from lvrpo import LossParams, distributed

VOCAB, WIDTH = 23, 6
#: Tokens of the sequences of each rank.
LENGTHS = ([3, 5], [4], [1, 1, 2], [6])
PARAMS = LossParams(aggregation="token_mean", beta=0.1, entropy_coef=0.01)


class Model(torch.nn.Module):
    """The least that has a body and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(VOCAB, WIDTH)
        self.body = torch.nn.Linear(WIDTH, WIDTH)
        self.head = distributed.LossHead(torch.nn.Linear(WIDTH, VOCAB))

    def forward(self, tokens: Tensor) -> Tensor:
        return torch.tanh(self.body(self.embedding(tokens)))


def batch(lengths: list[int], seed: int) -> dict[str, Any]:
    """Arguments of the loss, but for the head's."""
    made = torch.Generator(device="cpu").manual_seed(seed)
    count = sum(lengths)
    tokens = torch.randint(0, VOCAB, (count,), generator=made, device="cpu")
    normal = [torch.randn(count, generator=made, device="cpu") / 3 - 3.1 for _ in range(2)]
    device = torch.empty(0).device
    found = {
        "token_ids": tokens,
        "old_logprobs": normal[0],
        "ref_logprobs": normal[1],
        "advantages": torch.randn(len(lengths), generator=made, device="cpu"),
        "cu_seqlens": torch.tensor([0, *lengths], device="cpu").cumsum(0),
    }
    return {name: x.to(device) for name, x in found.items()}


def gradients(model: torch.nn.Module) -> dict[str, Tensor]:
    """Whole ones."""
    found = {}
    for name, parameter in model.named_parameters():
        gradient = parameter.grad
        assert gradient is not None, name
        found[name] = gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient
    return found


def expect(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(
            found[name], value, msg=lambda text, name=name: f"{name}: {text}"
        )


def check_fsdp() -> None:
    """Every rank has sequences of its own; the gradients are those of one batch of all."""
    size, rank = torch.distributed.get_world_size(), torch.distributed.get_rank()
    batches = [batch(LENGTHS[i], i) for i in range(size)]
    whole = Model()
    count = sum(len(x["token_ids"]) for x in batches)
    total = 0.0
    for x in batches:
        loss = functools.partial(lvrpo.linear_grpo_loss, **x, params=PARAMS, denominator=count)
        total = total + whole.head(whole(x["token_ids"]), loss).loss
    total.backward()

    torch.manual_seed(0)
    model = Model()
    fully_shard(model.head)
    fully_shard(model)
    x = batches[rank]
    mask = torch.ones_like(x["token_ids"])
    denominator = distributed.global_denominator(mask, x["cu_seqlens"], params=PARAMS)
    loss = functools.partial(lvrpo.linear_grpo_loss, **x, params=PARAMS, denominator=denominator)
    result = model.head(model(x["token_ids"]), loss)
    (result.loss * size).backward()
    expect(gradients(model), gradients(whole))
    assert model.head.weight.to_local().shape[0] < VOCAB  # it has been given back


def check_mixed_precision() -> None:
    """What the loss is given is not rounded to the dtype of the parameters."""
    x = batch(LENGTHS[0], 0)
    hidden = torch.randn(len(x["token_ids"]), WIDTH)
    head = distributed.LossHead(torch.nn.Linear(WIDTH, VOCAB))
    narrow = [y.detach().bfloat16() for y in (hidden, head.weight, head.bias)]
    expected = lvrpo.linear_grpo_loss(*narrow[:2], bias=narrow[2], **x, params=PARAMS)
    fully_shard(head, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
    found = head(hidden, functools.partial(lvrpo.linear_grpo_loss, **x, params=PARAMS))
    assert torch.equal(found.loss, expected.loss)
    assert torch.equal(found.metrics.sums, expected.metrics.sums)


def check_dtensor(vocab: int) -> None:
    """A head over a mesh, and replicated hidden states."""
    x = batch(LENGTHS[0], 0)
    x["token_ids"] = x["token_ids"] % vocab
    leaves = {
        "hidden": torch.randn(len(x["token_ids"]), WIDTH),
        "weight": torch.randn(vocab, WIDTH),
        "bias": torch.randn(vocab),
    }
    whole = {name: y.clone().requires_grad_() for name, y in leaves.items()}
    size = torch.distributed.get_world_size()
    mesh = DeviceMesh(leaves["hidden"].device.type, list(range(size)))
    placed = {"hidden": [Replicate()], "weight": [Shard(0)], "bias": [Shard(0)]}
    split = {
        name: distribute_tensor(y, mesh, placed[name]).requires_grad_()
        for name, y in leaves.items()
    }
    ids = x["token_ids"]
    for one, many in (
        (lvrpo.linear_grpo_loss, distributed.linear_grpo_loss),
        (lvrpo.linear_logprobs, distributed.linear_logprobs),
    ):
        given = {**x, "params": PARAMS} if one is lvrpo.linear_grpo_loss else {"token_ids": ids}
        first, second = one(**whole, **given), many(**split, **given)
        for result in (first, second):
            (result.loss if hasattr(result, "loss") else result.sum()).backward()
    logits = distribute_tensor(whole["hidden"].detach(), mesh, [Replicate()])
    logits = (logits @ split["weight"].detach().T).detach().requires_grad_()
    plain = logits.full_tensor().detach().requires_grad_()
    distributed.gather_logprobs(logits, ids).sum().backward()
    lvrpo.gather_logprobs(plain, ids).sum().backward()
    expect(
        {name: y.grad.full_tensor() for name, y in (split | {"logits": logits}).items()},
        {name: y.grad for name, y in (whole | {"logits": plain}).items()},
    )


def check_fsdp_of_a_shared_vocabulary() -> None:
    """Two by two ranks: pairs share a vocabulary, and the pairs have batches of their own."""
    mesh = DeviceMesh(
        torch.empty(0).device.type, [[0, 1], [2, 3]], mesh_dim_names=("data", "vocab")
    )
    pair = mesh.get_local_rank("data")
    batches = [batch(LENGTHS[i], i) for i in range(2)]
    count = sum(len(x["token_ids"]) for x in batches)
    head = torch.nn.Linear(WIDTH, VOCAB)
    hidden = [torch.randn(len(x["token_ids"]), WIDTH) for x in batches]
    states = hidden[pair].clone().requires_grad_()
    whole = distributed.LossHead(head)
    leaves = [y.requires_grad_() for y in hidden]
    sum(
        whole(
            y, functools.partial(lvrpo.linear_grpo_loss, **x, params=PARAMS, denominator=count)
        ).loss
        for y, x in zip(leaves, batches, strict=True)
    ).backward()
    expected = gradients(whole) | {"states": leaves[pair].grad}

    split = distributed.LossHead(head)
    for name in ("weight", "bias"):
        value = getattr(split, name).detach()
        placed = distribute_tensor(value, mesh["vocab"], [Shard(0)])
        setattr(split, name, torch.nn.Parameter(placed))
    fully_shard(split, mesh=mesh["data"])
    x = batches[pair]
    mask = torch.ones_like(x["token_ids"])
    group = mesh.get_group("data")
    denominator = distributed.global_denominator(mask, x["cu_seqlens"], params=PARAMS, group=group)
    loss = functools.partial(
        distributed.linear_grpo_loss, **x, params=PARAMS, denominator=denominator
    )
    (split(states, loss).loss * mesh.size(0)).backward()
    found = gradients(split) | {"states": states.grad / mesh.size(0)}
    expect(found, expected)


def refused(placement: str) -> str:
    """What a weight with another placement is told."""
    ranks = list(range(torch.distributed.get_world_size()))
    order = ranks[::-1] if placement == "descending" else ranks
    mesh = DeviceMesh(torch.empty(0).device.type, order)
    placed = {"columns": Shard(1), "whole": Replicate()}.get(placement, Shard(0))
    weight = distribute_tensor(torch.randn(VOCAB, WIDTH), mesh, [placed])
    hidden = torch.randn(4, WIDTH)
    states = distribute_tensor(hidden, mesh, [Shard(0)]) if placement == "rows" else hidden
    try:
        distributed.linear_logprobs(states, weight, [1, 2, 3, 4])
    except ValueError as error:
        return str(error)
    return ""
