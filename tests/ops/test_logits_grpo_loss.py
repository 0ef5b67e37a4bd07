from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from logits_inputs import loss_scales, make_inputs, run_op, run_reference
from loss_inputs import PARAMS, STATISTICS
from mutants.logits_grpo_loss import MUTANTS

from lvrpo.backends import library
from lvrpo.ops import logits_grpo_loss as module
from lvrpo.ops.grpo_loss import LOSS_PRESETS, LossParams
from lvrpo.ops.head.given import chunks_of
from lvrpo.testing import check_op

pytestmark = pytest.mark.usefixtures("poison_empty")

LENGTHS = [5, 0, 9, 1, 14]
ALL_TERMS = PARAMS["grpo, all terms"]
#: Bounds that leave sequence ratios something to do at this length.
WIDE = {"clip_low": 0.2, "clip_high": 0.3}
needs_kernels = pytest.mark.skipif(bool(library.MISSING), reason=library.MISSING)


def preset(name: str) -> LossParams:
    changes: dict[str, Any] = {"max_length": 20} if name == "dr_grpo" else {}
    return LossParams.preset(name, **changes | (WIDE if name in ("gspo", "luspo") else {}))


class PowerOfTwo(torch.autograd.Function):
    """The identity, whose gradient is a power of two."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        return gradient.abs().log2().round().exp2() * gradient.sign()


def check(op: Any, inputs: dict[str, Any]) -> None:
    """A bf16 gradient is scaled after it was rounded, see test_a_bf16_gradient_is_scaled_as_it_is.

    So its upstream gradient is one that does not round it again.
    """

    def of(function: Any) -> Any:
        def call(**arguments: Any) -> tuple[torch.Tensor, ...]:
            loss, *others = function(**arguments)
            return PowerOfTwo.apply(loss), *others

        return call if inputs["logits"].dtype == torch.bfloat16 else function

    scales = loss_scales(inputs)
    check_op(of(op), of(run_reference), inputs, differentiable=["logits"], scales=scales)


def in_place(**inputs: Any) -> tuple[torch.Tensor, ...]:
    """The op on logits that nobody else needs."""
    inputs["logits"] = inputs["logits"] * 1.0
    return run_op(**inputs, inplace_backward=True)


@pytest.fixture(autouse=True)
def _short_runs(monkeypatch):
    """Runs of two rows of fp32 count: test_runs_of_rows and the benchmarks have long ones."""
    monkeypatch.setattr(module, "SKIPPED_BYTES", 2 * 61 * 4)


@pytest.mark.parametrize("params", PARAMS.values(), ids=PARAMS.keys())
def test_matches_reference(backend, params):
    check(functools.partial(run_op, backend=backend), make_inputs(LENGTHS) | {"params": params})


@pytest.mark.parametrize("shared_prompts", [False, True], ids=["own rows", "shared prompts"])
@pytest.mark.parametrize("name", LOSS_PRESETS)
def test_every_preset(backend, name, shared_prompts):
    inputs = make_inputs(LENGTHS, torch.float64, shared_prompts=shared_prompts)
    inputs |= {"params": preset(name), "temperature": 0.8}
    inputs["advantages"][2] = 0.0
    check(functools.partial(run_op, backend=backend), inputs)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shared_prompts", [False, True], ids=["own rows", "shared prompts"])
@pytest.mark.parametrize("params", [ALL_TERMS, PARAMS["gspo, all terms"]], ids=["token", "gspo"])
def test_other_dtypes(backend, params, shared_prompts, dtype):
    inputs = make_inputs(LENGTHS, dtype, shared_prompts=shared_prompts) | {"params": params}
    check(functools.partial(run_op, backend=backend), inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("shared_prompts", [False, True], ids=["own rows", "shared prompts"])
@pytest.mark.parametrize("params", [ALL_TERMS, PARAMS["gspo, all terms"]], ids=["token", "gspo"])
def test_in_place(backend, params, shared_prompts, dtype):
    inputs = make_inputs(LENGTHS, dtype, shared_prompts=shared_prompts) | {"params": params}
    inputs["advantages"][2] = 0.0
    check(functools.partial(in_place, backend=backend), inputs)
    check(functools.partial(in_place, backend=backend), inputs | {"params": LossParams()})


@given(
    lengths=st.lists(st.integers(0, 7), min_size=1, max_size=6).filter(any),
    shortest=st.integers(1, 20),
    shared=st.booleans(),
    dead=st.integers(0, 63),
    name=st.sampled_from(["grpo", "gspo", "rloo"]),
)
@settings(max_examples=30, deadline=None)
@needs_kernels
def test_any_lengths_and_runs(lengths, shortest, shared, dead, name):
    inputs = make_inputs(lengths, torch.float64, width=4, vocab=9, shared_prompts=shared)
    inputs |= {"params": preset(name), "level": "sequence"}
    inputs["advantages"] *= torch.tensor([dead >> i & 1 for i in range(len(lengths))])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "SKIPPED_BYTES", shortest * 9 * 8)
        check(run_op, inputs)


def test_runs_of_rows():
    def runs(seen: str, shortest: int) -> list[tuple[int, int]]:
        return chunks_of([row == "x" for row in seen], shortest)

    assert runs("", 1) == runs("..", 1) == []
    assert runs("xx.x..x", 1) == [(0, 2), (3, 4), (6, 7)]
    assert runs("xx.x..x.", 2) == [(0, 4), (6, 7)]
    assert runs(".xx.x..x", 3) == [(1, 8)]


@pytest.mark.parametrize("options", [{"softcap": 5.0}, {"vocab_range": (7, 50)}], ids=str)
@pytest.mark.parametrize("params", [ALL_TERMS, PARAMS["gspo, all terms"]], ids=["token", "gspo"])
def test_softmax_options(backend, options, params):
    inputs = make_inputs(LENGTHS)
    inputs["token_ids"] = torch.randint(7, 50, (29,))
    inputs |= options | {"params": params}
    check(functools.partial(run_op, backend=backend), inputs)


def test_a_range_for_each_row(backend):
    inputs = make_inputs(LENGTHS) | {"params": ALL_TERMS}
    inputs["vocab_range"] = torch.tensor([[0, 20], [20, 61]])[torch.arange(29) % 2]
    inputs["token_ids"] = inputs["vocab_range"][:, 1] - 3
    inputs["advantages"][0] = 0.0
    check(functools.partial(run_op, backend=backend), inputs | {"params": LossParams()})
    check(functools.partial(run_op, backend=backend), inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocab", [8192, 16_384 + 8195, 40_961])
def test_rows_of_several_tiles(backend, vocab, dtype):
    inputs = make_inputs([2, 3], dtype, vocab=vocab) | {"params": ALL_TERMS}
    check(functools.partial(run_op, backend=backend), inputs)
    inputs["vocab_range"] = torch.tensor([[0, vocab], [5, 90], [8191, vocab], [1, 8192], [70, 71]])
    inputs["token_ids"] = inputs["vocab_range"][:, 1] - 1
    check(functools.partial(in_place, backend=backend), inputs)


def test_logits_may_be_a_view(backend):
    inputs = make_inputs(LENGTHS) | {"params": ALL_TERMS}
    wide = torch.randn(29, 100)
    wide[:, 20:81] = inputs["logits"]
    for logits in (wide[:, 20:81], inputs["logits"].t().contiguous().t()):
        check(functools.partial(run_op, backend=backend), inputs | {"logits": logits})


@pytest.mark.parametrize("as_tensor", [False, True], ids=["number", "tensor"])
def test_denominator(backend, as_tensor):
    inputs = make_inputs(LENGTHS, torch.float64) | {"params": ALL_TERMS, "backend": backend}
    results = []
    for denominator in (len(LENGTHS), 3.0):
        logits = inputs["logits"].clone().requires_grad_()
        given = torch.tensor(float(denominator)) if as_tensor else denominator
        loss, statistics, *_ = run_op(**inputs | {"logits": logits, "denominator": given})
        loss.backward()
        results.append(torch.cat([loss.detach()[None], statistics[:1], logits.grad.flatten()]))
    torch.testing.assert_close(results[1], results[0] * (len(LENGTHS) / 3.0))


def test_an_advantage_for_each_token(backend):
    inputs = make_inputs(LENGTHS) | {"params": ALL_TERMS, "backend": backend}
    per_token = inputs["advantages"].repeat_interleave(inputs["cu_seqlens"].diff())
    results = []
    for advantages in (inputs["advantages"], per_token):
        logits = inputs["logits"].clone().requires_grad_()
        outputs = run_op(**inputs | {"logits": logits, "advantages": advantages})
        outputs[0].backward()
        results.append((*outputs, logits.grad))
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("name", ["grpo", "gspo"])
def test_ignored_tokens_are_masked(backend, name):
    inputs = make_inputs(LENGTHS) | {"params": preset(name), "backend": backend}
    mask = torch.arange(29) % 3 != 0
    ids = torch.where(mask, inputs["token_ids"], -5)
    results = []
    for change in ({"mask": mask}, {"token_ids": ids, "mask": None}):
        logits = inputs["logits"].clone().requires_grad_()
        outputs = run_op(**inputs | change | {"logits": logits, "ignore_index": -5})
        outputs[0].backward()
        results.append((*outputs, logits.grad))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("shortest", [1, 1000], ids=["skipped", "read"])
@pytest.mark.parametrize("options", [{}, {"inplace_backward": True}, {"softcap": 5.0}], ids=str)
@pytest.mark.parametrize("name", ["grpo", "gspo"])
def test_masked_rows_may_hold_anything(backend, monkeypatch, name, options, shortest):
    monkeypatch.setattr(module, "SKIPPED_BYTES", shortest * 61 * 4)
    if backend == "torch":
        backend = None  # the reference reads every row
    inputs = make_inputs(LENGTHS) | {"params": preset(name), "backend": backend, **options}
    clean = run_op(**inputs)
    masked = ~inputs["mask"]
    assert masked.any()
    inputs["logits"][masked] = torch.nan
    source = inputs["logits"].requires_grad_()
    # Multiplied by a mask, a gradient that is not a number would stay one.
    logits = torch.where(masked[:, None], source, source * 1.0)
    loss, *others = run_op(**inputs | {"logits": logits})
    loss.backward()
    assert all(torch.equal(a, b) for a, b in zip((loss, *others), clean, strict=True))
    assert (source.grad[masked] == 0).all()
    assert source.grad.isfinite().all()


@pytest.mark.parametrize("inplace_backward", [False, True])
@pytest.mark.parametrize("mask", ["all", "none"])
@pytest.mark.parametrize("name", ["grpo", "gspo"])
def test_no_row_has_a_gradient(backend, mask, name, inplace_backward):
    inputs = make_inputs(LENGTHS) | {"params": preset(name), "backend": backend}
    inputs["mask"] = torch.full((29,), mask == "none")
    inputs["advantages"] = torch.zeros(len(LENGTHS)) if mask == "none" else inputs["advantages"]
    source = inputs["logits"].requires_grad_()
    inputs |= {"logits": source * 1.0, "inplace_backward": inplace_backward}
    loss, statistics, logprobs, entropy = run_op(**inputs)
    loss.backward()
    assert (source.grad == 0).all()
    active = statistics[STATISTICS.index("active_tokens")]
    assert float(active) == (29 if mask == "none" else 0)
    assert ((logprobs != 0) == (mask == "none")).all()
    assert ((entropy != 0) == (mask == "none")).all()


@pytest.mark.parametrize("inplace_backward", [False, True])
@pytest.mark.parametrize("lengths", [[], [0, 0]], ids=["no sequence", "empty ones"])
def test_empty_input(backend, lengths, inplace_backward):
    source, nothing = torch.randn(0, 9, requires_grad=True), torch.zeros(0)
    loss, *_ = run_op(
        logits=source * 1.0,
        token_ids=nothing.long(),
        old_logprobs=nothing,
        advantages=torch.zeros(len(lengths)),
        cu_seqlens=torch.zeros(len(lengths) + 1, dtype=torch.int64),
        inplace_backward=inplace_backward,
        backend=backend,
    )
    loss.backward()
    assert float(loss.detach()) == 0.0
    assert source.grad.shape == (0, 9)


@pytest.mark.parametrize("mutant", MUTANTS.values(), ids=MUTANTS.keys())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rule_rejects_mutant(mutant, dtype):
    inputs = make_inputs(LENGTHS, dtype, shared_prompts=True, temperature=0.7)
    with pytest.raises(AssertionError):
        check(mutant, inputs | {"params": ALL_TERMS})
