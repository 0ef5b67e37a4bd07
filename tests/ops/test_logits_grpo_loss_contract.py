"""What logits_grpo_loss promises besides its numbers: work, memory, autograd, errors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from fused_inputs import composite_arguments
from logits_inputs import make_inputs, run_op
from loss_inputs import PARAMS, stops_a_gradient
from runnable import WITH_KERNELS
from torch import Tensor

import lvrpo
from lvrpo.backends import library
from lvrpo.ops.grpo_loss import LossParams
from lvrpo.ops.head import rows as head_rows

pytestmark = pytest.mark.usefixtures("poison_empty")

LENGTHS = [5, 0, 9, 1, 14]
ALL_TERMS = PARAMS["grpo, all terms"]
GSPO = PARAMS["gspo, all terms"]
both_ratios = pytest.mark.parametrize("params", [ALL_TERMS, GSPO], ids=["token", "gspo"])
both_rows = pytest.mark.parametrize("shared_prompts", [False, True], ids=["own rows", "shared"])
needs_kernels = pytest.mark.skipif(bool(library.MISSING), reason=library.MISSING)
kernels = pytest.mark.parametrize("backend", WITH_KERNELS, indirect=True)


def gradient_of(inputs: dict[str, Any], scale: float = 1.0, **change: Any) -> Tensor:
    logits = inputs["logits"].detach().clone().requires_grad_()
    (run_op(**inputs | {"logits": logits} | change)[0] * scale).backward()
    return logits.grad


@both_ratios
@both_rows
def test_gradcheck(backend, params, shared_prompts):
    assert not stops_a_gradient(params)
    sizes = {"width": 3, "vocab": 7, "shared_prompts": shared_prompts}
    inputs = make_inputs([3, 0, 4, 2], torch.float64, **sizes)
    inputs |= {"params": params, "backend": backend}

    def function(logits: Tensor) -> Tensor:
        return run_op(**inputs | {"logits": logits})[0]

    # One direction in place of every element: the interpreter is slow.
    fast = backend == "triton"
    torch.autograd.gradcheck(function, (inputs["logits"].requires_grad_(),), fast_mode=fast)


@kernels
@both_ratios
@both_rows
def test_opcheck(backend, params, shared_prompts):
    inputs = make_inputs([2, 3], width=3, vocab=7, shared_prompts=shared_prompts)
    loss = composite_arguments(inputs, params)
    op = torch.ops.lvrpo.logits_grpo_loss_fwd.default
    torch.library.opcheck(op, (torch.empty(5, 7), inputs["logits"], *loss, backend))


@both_ratios
@pytest.mark.parametrize("inplace_backward", [False, True])
def test_compiles_without_a_graph_break(backend, params, inplace_backward):
    inputs = make_inputs([3, 4], width=4, vocab=7)
    inputs |= {"params": params, "backend": backend, "inplace_backward": inplace_backward}
    source = inputs.pop("logits")

    def function(logits: Tensor) -> tuple[Tensor, ...]:
        result = lvrpo.logits_grpo_loss(logits * 1.0, **inputs)
        return 3 * result.loss, result.metrics.kl, result.logprobs, result.entropy

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    results = []
    for run in (compiled, function):
        logits = source.clone().requires_grad_()
        outputs = run(logits)
        outputs[0].backward()
        results.append((*outputs, logits.grad))
    torch.testing.assert_close(*results)


def test_upstream_gradient_scales_the_gradient(backend):
    inputs = make_inputs(LENGTHS) | {"params": ALL_TERMS, "backend": backend}
    assert torch.equal(2 * gradient_of(inputs), gradient_of(inputs, scale=2.0))


@kernels
def test_a_bf16_gradient_is_scaled_as_it_is(backend):
    inputs = make_inputs(LENGTHS, torch.bfloat16) | {"params": ALL_TERMS, "backend": backend}
    expected = (gradient_of(inputs).float() * 0.3).bfloat16()
    assert torch.equal(gradient_of(inputs, scale=0.3), expected)


def test_an_fp16_gradient_survives_until_a_loss_scale_multiplies_it(backend):
    inputs = make_inputs(LENGTHS, torch.float16) | {"backend": backend, "denominator": 1e6}
    wide = gradient_of(inputs | {"logits": inputs["logits"].float()}, scale=65536.0)
    ours = gradient_of(inputs, scale=65536.0)
    assert ours.dtype == torch.float16
    assert (ours.float() - wide).norm() < 2**-10 * wide.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_second_backward_gives_the_same(backend, dtype):
    inputs = make_inputs(LENGTHS, dtype) | {"params": ALL_TERMS, "backend": backend}
    logits = inputs["logits"].requires_grad_()
    loss = run_op(**inputs)[0]
    results = []
    for scale in (1.0, 4.0, 1.0):
        (gradient,) = torch.autograd.grad(loss * scale, logits, retain_graph=True)
        results.append(gradient / scale)
    assert all(torch.equal(results[0], later) for later in results[1:])
    torch.autograd.grad(loss, logits)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        torch.autograd.grad(loss, logits)


@kernels
@both_ratios
def test_in_place_the_gradient_is_where_the_logits_were(backend, params):
    inputs = make_inputs(LENGTHS) | {"params": params, "backend": backend}
    expected = gradient_of(inputs)
    source = inputs["logits"].requires_grad_()
    logits = source * 1.0
    loss = run_op(**inputs | {"logits": logits, "inplace_backward": True})[0]
    assert torch.equal(logits, expected)
    (gradient,) = torch.autograd.grad(loss, logits, retain_graph=True)
    assert torch.equal(gradient, expected)
    assert gradient.data_ptr() == logits.data_ptr()


@kernels
@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_in_place_a_second_backward_is_an_error(backend, scale):
    inputs = make_inputs(LENGTHS) | {"params": ALL_TERMS, "backend": backend}
    logits = inputs["logits"].requires_grad_() * 1.0
    loss = run_op(**inputs | {"logits": logits, "inplace_backward": True})[0] * scale
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="a second backward needs the logits"):
        loss.backward()


@kernels
def test_in_place_is_an_error_where_the_logits_are_needed_later(backend):
    inputs = make_inputs(LENGTHS) | {"params": ALL_TERMS, "backend": backend}
    logits = inputs["logits"].requires_grad_() * 1.0
    other = logits.square().sum()
    loss = run_op(**inputs | {"logits": logits, "inplace_backward": True})[0]
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (other + loss).backward()


@kernels
def test_in_place_is_an_error_after_a_change_of_the_gradient(backend):
    inputs = make_inputs(LENGTHS) | {"params": ALL_TERMS, "backend": backend}
    logits = inputs["logits"].requires_grad_() * 1.0
    loss = run_op(**inputs | {"logits": logits, "inplace_backward": True})[0]
    with torch.no_grad():
        logits.mul_(2.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@kernels
def test_the_logits_may_be_changed_once_their_gradient_is_there(backend):
    inputs = make_inputs(LENGTHS) | {"params": ALL_TERMS, "backend": backend}
    expected = gradient_of(inputs)
    logits = inputs["logits"].requires_grad_()
    loss = run_op(**inputs)[0]
    with torch.no_grad():
        logits.zero_()
    loss.backward(retain_graph=True)
    assert torch.equal(logits.grad, expected)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("inplace_backward", [False, True])
@both_ratios
def test_no_gradient_leaves_the_logits_alone(backend, params, inplace_backward):
    inputs = make_inputs(LENGTHS) | {"params": params, "backend": backend}
    inputs["inplace_backward"] = inplace_backward
    before = inputs["logits"].clone()
    frozen = run_op(**inputs)
    with torch.no_grad():
        outputs = run_op(**inputs | {"logits": inputs["logits"].requires_grad_()})
    assert not any(x.requires_grad for x in outputs)
    assert all(torch.equal(a, b) for a, b in zip(outputs, frozen, strict=True))
    assert torch.equal(inputs["logits"], before)


@kernels
@both_ratios
def test_with_and_without_a_gradient_the_values_are_the_same(backend, params):
    inputs = make_inputs(LENGTHS) | {"params": params, "backend": backend}
    without = run_op(**inputs)
    inputs["logits"].requires_grad_()
    torch.testing.assert_close([x.detach() for x in run_op(**inputs)], list(without))


@needs_kernels
@both_rows
def test_rows_without_a_gradient_are_not_read_for_it(monkeypatch, shared_prompts):
    inputs = make_inputs(LENGTHS, shared_prompts=shared_prompts) | {"backend": "cpp"}
    inputs["advantages"][2] = 0.0
    rows = inputs.get("row_index", torch.arange(29))
    pulls = inputs["mask"] * inputs["policy_weights"]
    pulls[5:14] = 0.0
    live = torch.zeros(29).index_add(0, rows, pulls) > 0
    expected = gradient_of(inputs)
    backward = head_rows.HeadRows.backward

    def after_forgetting(self: Any, *args: Any) -> None:
        self.head.project(slice(None), 29)[~live] = torch.nan
        backward(self, *args)

    monkeypatch.setattr(head_rows.HeadRows, "backward", after_forgetting)
    assert not live.all()
    assert torch.equal(gradient_of(inputs), expected)


def test_autocast_changes_nothing(backend):
    inputs = make_inputs(LENGTHS) | {"params": ALL_TERMS, "backend": backend}
    plain = gradient_of(inputs)
    with torch.autocast(inputs["logits"].device.type, torch.bfloat16):
        logits = inputs["logits"].requires_grad_()
        loss = run_op(**inputs)[0]
    loss.backward()
    assert torch.equal(logits.grad, plain)


@kernels
@both_rows
def test_same_bits_run_to_run(backend, shared_prompts):
    inputs = make_inputs([12] * 3, shared_prompts=shared_prompts) | {"params": ALL_TERMS}
    inputs["backend"] = backend
    first, second = ((*run_op(**inputs), gradient_of(inputs)) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


BAD = {
    "token outside the vocabulary": ({"token_ids": torch.tensor([0, 9])}, r"token_ids\[1\] is 9"),
    "range beyond the vocabulary": ({"vocab_range": (0, 10)}, r"vocab_range\[0\] is \[0, 10\]"),
    "row index out of range": ({"row_index": torch.tensor([0, 2])}, r"row_index\[1\] is 2"),
    "rows and tokens differ": (
        {"logits": torch.zeros(3, 9)},
        r"token_ids has shape \(2,\), but the rows of logits have shape \(3,\)",
    ),
    "shape": ({"logits": torch.zeros(2)}, r"logits has shape \(2,\)"),
    "no column": ({"logits": torch.zeros(2, 0)}, r"logits has shape \(2, 0\)"),
    "integers": ({"logits": torch.zeros(2, 9).long()}, "logits is torch.int64"),
    "temperature": ({"temperature": -1.0}, "temperature is -1.0"),
    "softcap": ({"softcap": 0.0}, "softcap is 0.0"),
    "NaN": ({"logits": torch.full((2, 9), torch.nan)}, r"row 0 of logits|logprobs\[0\] is nan"),
    "memory of its own": (
        {"logits": torch.zeros(9).expand(2, 9), "inplace_backward": True},
        "logits has strides",
    ),
    "fp16 in place": (
        {"logits": torch.zeros(2, 9).half(), "inplace_backward": True},
        "logits is torch.float16; inplace_backward=True needs a dtype",
    ),
    "old log-probs": ({"old_logprobs": torch.zeros(3)}, r"old_logprobs has shape \(3,\)"),
    "an old log-prob": ({"old_logprobs": torch.tensor([0.0, torch.nan])}, r"old_logprobs\[1\]"),
    "advantages": ({"advantages": torch.zeros(4)}, r"advantages has shape \(4,\)"),
    "an advantage": (
        {"advantages": torch.tensor([torch.inf, 0.0, 0.0])},
        r"advantages\[0\] is inf",
    ),
    "offsets": ({"cu_seqlens": torch.tensor([0, 1, 1, 1])}, "cu_seqlens ends at 1, expected 2"),
    "mask": ({"mask": torch.tensor([1.0, -1.0])}, r"mask\[1\] is -1.0"),
    "weight": ({"policy_weights": torch.tensor([1.0, -1.0])}, r"policy_weights\[1\] is -1.0"),
    "no reference": ({"params": LossParams(beta=0.1)}, "ref_logprobs is None, but beta is 0.1"),
    "denominator": ({"denominator": 0.0}, "denominator is 0.0"),
    "unknown backend": ({"backend": "cudnn"}, "backend is 'cudnn'"),
}


@pytest.mark.parametrize(("change", "message"), BAD.values(), ids=BAD.keys())
def test_bad_input(backend, change, message):
    arguments = {
        "logits": torch.zeros(2, 9),
        "token_ids": torch.tensor([0, 1]),
        "old_logprobs": torch.zeros(2),
        "advantages": torch.ones(3),
        "cu_seqlens": torch.tensor([0, 2, 2, 2]),
        "backend": backend,
    }
    with pytest.raises(ValueError, match=f"^logits_grpo_loss: .*({message})"):
        lvrpo.logits_grpo_loss(**arguments | change)
