"""Ops on a vocabulary that ranks share, called like those of one process: with whole factors.

To be run in every rank of a group.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any
from unittest import mock

import torch
import torch.distributed
from linear_inputs import (
    gradient_scales,
    logit_scale,
    loss_scales,
    make_head,
    make_loss_inputs,
    ranges,
    run_reference,
    with_statistics,
)
from mutants._distributed import MUTANTS
from torch import Tensor

from lvrpo import LossParams, distributed, linear_grpo_loss
from lvrpo.reference.gather_logprobs import gather_logprobs
from lvrpo.reference.linear_logprobs import linear_logprobs
from lvrpo.testing import check_op

#: What a rank's columns are: by rank, first and one past the last.
Cuts = Sequence[tuple[int, int]]


class Part(torch.autograd.Function):
    """The rank's rows of a whole weight, whose gradient is put together from all ranks."""

    @staticmethod
    def forward(ctx: Any, whole: Tensor, low: int, high: int) -> Tensor:  # type: ignore[override]
        ctx.shape, ctx.rows = whole.shape, slice(low, high)
        return whole[low:high].clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        whole = gradient.new_zeros(ctx.shape)
        whole[ctx.rows] = gradient
        torch.distributed.all_reduce(whole)
        return whole, None, None


def shards_of(cuts: Cuts) -> distributed.VocabShards:
    return distributed.VocabShards(tuple(cuts))


def own(cuts: Cuts) -> tuple[int, int]:
    return cuts[torch.distributed.get_rank()]


def linear(op: Callable[..., Any], cuts: Cuts, **inputs: Any) -> Any:
    """An op on hidden states and a weight."""
    for name in ("weight", "bias"):
        if inputs.get(name) is not None:
            inputs[name] = Part.apply(inputs[name], *own(cuts))
    return op(**inputs, shards=shards_of(cuts))


def from_logits(cuts: Cuts, **inputs: Any) -> Any:
    logits = Part.apply(inputs.pop("logits").T, *own(cuts)).T
    return distributed.gather_logprobs(logits, **inputs, shards=shards_of(cuts))


def loss(cuts: Cuts, **inputs: Any) -> Any:
    return with_statistics(*linear(distributed.linear_grpo_loss, cuts, **inputs))


def head_inputs(dtype: torch.dtype, vocab: int, **options: Any) -> dict[str, Any]:
    """Of `linear_logprobs`: rows that several tokens share or none uses, an ignored token."""
    rows, tokens = 7, 16
    inputs: dict[str, Any] = make_head(rows, 6, vocab, dtype)
    index = torch.randint(0, rows - 1, (tokens,))
    low, high = torch.zeros(rows, dtype=torch.int64), torch.full((rows,), vocab)
    if options.get("vocab_range") == "of rows":
        low = torch.randint(0, vocab, (rows,))
        high = low + 1 + (torch.rand(rows) * (vocab - low)).long()
        options = options | {"vocab_range": torch.stack([low, high], dim=1)}
    elif "vocab_range" in options:
        low, high = (torch.full((rows,), end) for end in options["vocab_range"])
    ids = low[index] + (torch.rand(tokens) * (high - low)[index]).long()
    ids[2] = -100
    inputs |= {"token_ids": ids, "row_index": index}
    return inputs | {"return_entropy": True, "return_sum_squares": True} | options


def head_scales(inputs: dict[str, Any]) -> dict[str, Any]:
    _, largest = logit_scale(inputs)
    tokens, rows = len(inputs["token_ids"]), len(inputs["hidden"])
    by_logprob = torch.full((tokens,), 1.0 / tokens)
    by_entropy = torch.full((rows,), 1.0 / rows)
    return {
        **dict.fromkeys(("out0", "out1", "out2"), largest),
        **gradient_scales(inputs, by_logprob, by_entropy),
    }


def check_linear(cuts: Cuts, backend: str, dtype: torch.dtype, options: dict[str, Any]) -> None:
    inputs = head_inputs(dtype, cuts_end(cuts), **options)
    rows = len(inputs["hidden"])

    def reference(**given: Any) -> Any:
        given.pop("memory_budget", None)
        return linear_logprobs(**ranges(given, rows))

    op = functools.partial(linear, distributed.linear_logprobs, cuts, backend=backend)
    names = "hidden", "weight", "bias"
    check_op(op, reference, inputs, differentiable=names, scales=head_scales(inputs))


def check_logits(cuts: Cuts, backend: str, dtype: torch.dtype, options: dict[str, Any]) -> None:
    inputs = head_inputs(dtype, cuts_end(cuts), **options)
    factors = {name: inputs.pop(name) for name in ("hidden", "weight", "bias")}
    logits = factors["hidden"] @ factors["weight"].T + factors["bias"]
    identity = torch.eye(logits.shape[1]).to(logits)
    # As a head, whose gradient by hidden states is that by logits.
    scales = head_scales({"hidden": logits, "weight": identity, **inputs})
    scales["dlogits"] = scales.pop("dhidden")
    check_op(
        functools.partial(from_logits, cuts, backend=backend),
        lambda **given: gather_logprobs(**ranges(given, len(logits))),
        {"logits": logits, **inputs},
        differentiable=["logits"],
        scales=scales,
    )


def check_loss(
    cuts: Cuts,
    backend: str,
    dtype: torch.dtype,
    params: Any,
    rows: int,
    options: dict[str, Any],
) -> None:
    """With a budget of so many rows of the widest shard, prompts shared."""
    lengths = [5, 0, 9, 1, 6]
    inputs = make_loss_inputs(lengths, dtype, vocab=cuts_end(cuts), shared_prompts=True, **options)
    widest = max(high - low for low, high in cuts)
    inputs |= {"params": params, "memory_budget": rows * widest * 8}
    inputs["advantages"][2] = 0.0
    check_op(
        functools.partial(loss, cuts, backend=backend),
        run_reference,
        inputs,
        differentiable=["hidden", "weight", "bias"],
        scales=loss_scales(inputs),
    )


def cuts_end(cuts: Cuts) -> int:
    return max(high for _, high in cuts)


def is_rejected(mutant: str, check: Callable[..., None], *arguments: Any) -> bool:
    """Whether the tolerance rule finds what is wrong, on this rank."""
    with MUTANTS[mutant]():
        try:
            check(*arguments)
        except AssertionError:
            return True
    return False


def parts(inputs: dict[str, Any], cuts: Cuts) -> dict[str, Any]:
    """The same with this rank's factors, which are differentiated."""
    low, high = own(cuts)
    mine = {name: inputs[name][low:high] for name in ("weight", "bias")}
    leaves = {"hidden": inputs["hidden"], **mine}
    leaves = {name: x.detach().clone().requires_grad_() for name, x in leaves.items()}
    return {**inputs, **leaves, "shards": shards_of(cuts)}


def loss_inputs_of(cuts: Cuts) -> dict[str, Any]:
    inputs = make_loss_inputs([3, 4], torch.float64, vocab=cuts_end(cuts))
    return {**inputs, "params": LossParams(beta=0.1, entropy_coef=0.01)}


def messages(cuts: Cuts) -> dict[str, list[int]]:
    """By op, how many numbers a rank sends, forward and backward, and in how many messages.

    The check before them, which sends bytes, is not counted.
    """
    sent: list[int] = []

    def gather(found: Any, own_part: Tensor, group: Any) -> None:
        if own_part.is_floating_point():
            sent.append(own_part.numel())
        all_gather(found, own_part, group=group)

    def add_up(tensor: Tensor, group: Any = None) -> None:
        sent.append(tensor.numel())
        all_reduce(tensor, group=group)

    given = parts(loss_inputs_of(cuts), cuts)
    logits = torch.randn(len(given["hidden"]), len(given["weight"])).requires_grad_()
    head = {name: given[name] for name in ("hidden", "weight", "token_ids", "shards")}
    all_gather, all_reduce = torch.distributed.all_gather, torch.distributed.all_reduce
    found = {}
    with (
        mock.patch.object(torch.distributed, "all_gather", gather),
        mock.patch.object(torch.distributed, "all_reduce", add_up),
    ):
        for name, run in {
            "gather_logprobs": lambda: distributed.gather_logprobs(
                logits, given["token_ids"], shards=given["shards"]
            ).sum(),
            "linear_logprobs": lambda: distributed.linear_logprobs(**head, memory_budget=999).sum(),
            "linear_grpo_loss": lambda: distributed.linear_grpo_loss(**given).loss,
        }.items():
            sent.clear()
            result = run()
            forward = len(sent)
            result.backward()
            found[name] = [sum(sent[:forward]), sum(sent[forward:]), forward, len(sent) - forward]
    return found


def check_second_backward(cuts: Cuts) -> None:
    """The gradient is computed anew."""
    given = parts(loss_inputs_of(cuts), cuts)
    result = distributed.linear_grpo_loss(**given)
    leaves = [given[name] for name in ("hidden", "weight", "bias")]
    first = torch.autograd.grad(result.loss, leaves, retain_graph=True)
    second = torch.autograd.grad(3 * result.loss, leaves)
    for one, other in zip(first, second, strict=True):
        torch.testing.assert_close(3 * one, other)


def check_selection(cuts: Cuts, backend: str) -> None:
    """Every rank drops the tokens that one process drops, by the entropies of all columns."""
    inputs = make_loss_inputs([5, 0, 9, 1, 6], torch.float64, vocab=cuts_end(cuts))
    params = LossParams(entropy_coef=0.05, entropy_aggregation="token_mean")
    inputs |= {"params": params, "memory_budget": 4 * 8 * cuts_end(cuts), "backend": backend}
    inputs |= {"top_entropy": 0.4, "off_policy_threshold": 0.02}
    inputs["sampler_logprobs"] = inputs["old_logprobs"] + 0.1
    leaves = {name: inputs[name].clone().requires_grad_() for name in ("hidden", "weight", "bias")}
    given = inputs | leaves
    found = loss(cuts, **given)[0]
    expected = linear_grpo_loss(**given).loss
    assert not torch.equal(expected, linear_grpo_loss(**given | {"top_entropy": 1.0}).loss)
    torch.testing.assert_close(found, expected)
    gradients = (torch.autograd.grad(x, list(leaves.values())) for x in (found, expected))
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)


def check_frozen(cuts: Cuts, frozen: str) -> None:
    """What is not differentiated has no gradient, and the rest has its own."""
    given, other = (parts(loss_inputs_of(cuts), cuts) for _ in range(2))
    given[frozen].requires_grad_(False)
    for inputs in (given, other):
        distributed.linear_grpo_loss(**inputs).loss.backward()
    assert given[frozen].grad is None
    for name in {"hidden", "weight", "bias"} - {frozen}:
        torch.testing.assert_close(given[name].grad, other[name].grad)


def check_without_gradients(cuts: Cuts) -> None:
    given = parts(loss_inputs_of(cuts), cuts)
    expected = distributed.linear_grpo_loss(**given)
    with torch.no_grad():
        found = distributed.linear_grpo_loss(**given)
    assert torch.equal(found.loss, expected.loss)
    assert not found.loss.requires_grad


def check_autocast(cuts: Cuts) -> None:
    """Factors go to its dtype, gradients come back in the dtypes that were given."""
    inputs = loss_inputs_of(cuts)
    narrow = {name: inputs[name].bfloat16() for name in ("hidden", "weight", "bias")}
    expected = distributed.linear_grpo_loss(**parts(inputs | narrow, cuts))
    wide = {name: inputs[name].float() for name in ("hidden", "weight", "bias")}
    given = parts(inputs | wide, cuts)
    with torch.autocast(given["hidden"].device.type, torch.bfloat16):
        found = distributed.linear_grpo_loss(**given)
    found.loss.backward()
    assert torch.equal(found.loss, expected.loss)
    assert {given[name].grad.dtype for name in wide} == {torch.float32}


def check_compiled(cuts: Cuts) -> None:
    """A call breaks the graph, and is the same."""
    given = parts(loss_inputs_of(cuts), cuts)
    expected = distributed.linear_grpo_loss(**given).loss

    def step(hidden: Tensor) -> Tensor:
        return distributed.linear_grpo_loss(**{**given, "hidden": 1.0 * hidden}).loss

    compiled = torch.compile(step, backend="aot_eager")
    torch.testing.assert_close(compiled(given["hidden"]), expected)


def check_unused_rows(cuts: Cuts, backend: str) -> None:
    """Rows that no token uses may hold anything, on every rank or on one."""
    given = head_inputs(torch.float64, cuts_end(cuts))
    clean = parts(given, cuts)
    given["hidden"] = given["hidden"].clone()
    given["hidden"][6] = torch.nan
    dirty = parts(given, cuts)
    results = []
    for inputs in (clean, dirty):
        logprobs, entropy, squares = distributed.linear_logprobs(**inputs, backend=backend)
        (logprobs.sum() + entropy[:6].sum()).backward()
        results.append((logprobs, entropy[:6], squares[:6], inputs["weight"].grad))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other)
    assert float(dirty["hidden"].grad.nan_to_num(99.0).abs().max()) < 99
    assert float(entropy[6]) == 0.0


def check_part_of_nothing(cuts: Cuts, backend: str) -> None:
    """A rank whose columns all have probability 0, a target among them."""
    low, high = own(cuts)
    whole = torch.randn(3, cuts_end(cuts), dtype=torch.float64)
    first, end = cuts[-1]
    whole[:, first:end] = -torch.inf
    ids = torch.tensor([0, first, 1])
    logits = whole[:, low:high].clone().requires_grad_()
    whole.requires_grad_()
    found = distributed.gather_logprobs(
        logits, ids, shards=shards_of(cuts), return_entropy=True, backend=backend
    )
    expected = gather_logprobs(whole, ids, return_entropy=True)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)
    mask = torch.tensor([1.0, 0.0, 1.0])
    for logprobs, entropy in (found, expected):
        (torch.where(mask > 0, logprobs, 0.0) + mask * entropy).sum().backward()
    torch.testing.assert_close(logits.grad, whole.grad[:, low:high])


def check_nothing(cuts: Cuts) -> None:
    """No rows, or no token that counts."""
    given = parts(loss_inputs_of(cuts), cuts)
    masked = {**given, "mask": torch.zeros_like(given["mask"])}
    none = dict.fromkeys(("hidden", "token_ids", "old_logprobs", "ref_logprobs", "mask"))
    none |= dict.fromkeys(("advantages", "policy_weights"))
    empty = {**given, **{name: given[name][:0] for name in none}, "cu_seqlens": [0]}
    for inputs in (masked, empty):
        result = distributed.linear_grpo_loss(**inputs)
        (gradient,) = torch.autograd.grad(result.loss, given["weight"])
        assert float(result.loss) == float(gradient.abs().sum()) == 0.0
