"""What nobody reads before a kernel does may be anything: offsets, ids, rows and ranges.

A kernel stays inside its tensors (`interpreter_memory` watches it), what it cannot use counts
nowhere, and every output is written. The oracle leaves out by hand what is to count nowhere.
"""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from runnable import WITH_KERNELS
from torch import Tensor

import lvrpo
from lvrpo import backends, checks
from lvrpo.ops.grpo_loss import LossParams
from lvrpo.testing import check_against_plain

pytestmark = pytest.mark.usefixtures("poison_empty")

#: Those whose kernels are for tensors that the host does not read.
UNREAD = [name for name in WITH_KERNELS if name != "cpp"]
TOKENS, VOCAB = 9, 21
#: Offsets [B + 1] that do not fit 9 tokens.
OFFSETS = {
    "too far": [0, 4, 16],
    "far too far": [0, 2**40, 2**62],
    "begin below": [-(2**40), 3, 9],
    "begin late": [2, 5, 9],
    "end early": [0, 4, 4, 6],
    "all below": [-3, -2, -1],
    "all beyond": [10, 11, 12],
}
DISORDER = {
    "back and forth": [0, 7, 2, 9],
    "from the end": [9, 5, 0],
    "out and back": [0, 2**40, 3, -5, 6],
}
all_offsets = pytest.mark.parametrize("name", [*OFFSETS, *DISORDER])


@pytest.fixture(params=UNREAD)
def unread(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Name of a backend; no op reads a value."""
    monkeypatch.setattr(checks, "check_values", lambda _: False)
    return str(request.param)


def needs(backend: str, op: str) -> None:
    if not backends.named(backend).implements(op):
        pytest.skip(f"{op} has no kernels there")


def kept_of(name: str, size: int = TOKENS) -> tuple[Tensor, slice]:
    """Offsets of the tokens that some sequence has, counted from the first of them; and which."""
    inside = torch.tensor(OFFSETS[name]).clamp(0, size)
    first, end = int(inside[0]), int(inside[-1])
    return inside - first, slice(first, end)


def of_loss(size: int, sequences: int) -> dict[str, Tensor]:
    made = torch.Generator().manual_seed(size)
    tokens = {name: -torch.rand(size, generator=made) for name in ("old_logprobs", "ref_logprobs")}
    return {**tokens, "advantages": torch.randn(sequences, generator=made)}


def cut(inputs: dict[str, Any], kept: slice) -> dict[str, Any]:
    """The same of the tokens alone that are kept."""
    return {name: x if name == "advantages" else x[kept] for name, x in inputs.items()}


#: What keeps policy terms by the entropies and log-probs of the call itself.
SELECTIONS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "all tokens": ({}, {}),
    "some tokens": (
        {"top_entropy": 0.5, "off_policy_threshold": 0.1},
        {"entropy_aggregation": "token_mean"},
    ),
}
all_selections = pytest.mark.parametrize("selection", SELECTIONS.values(), ids=SELECTIONS)


@all_offsets
@all_selections
@pytest.mark.parametrize("ratio", ["token", "seq_mean"])
def test_offsets_of_a_loss(unread, name, ratio, selection):
    needs(unread, "grpo_loss")
    offsets = torch.tensor((OFFSETS | DISORDER)[name])
    options, changes = selection
    params = LossParams(ratio=ratio, beta=0.1, entropy_coef=0.01, **changes)
    given = {
        **{x: -torch.rand(TOKENS) for x in ("logprobs", "entropy")},
        **of_loss(TOKENS, len(offsets) - 1),
    }

    def run(
        inputs: dict[str, Tensor], cu_seqlens: Tensor, backend: str
    ) -> tuple[Tensor, dict[str, Any], list[Tensor]]:
        leaves = {x: inputs[x].clone().requires_grad_() for x in ("logprobs", "entropy")}
        result = lvrpo.grpo_loss(
            **{**inputs, **leaves},
            cu_seqlens=cu_seqlens,
            level="sequence",
            params=params,
            backend=backend,
            **options,
        )
        gradients = torch.autograd.grad(result.loss, list(leaves.values()))
        return result.loss.detach(), result.metrics.as_dict(), list(gradients)

    loss, metrics, gradients = run(given, offsets, unread)
    assert loss.isfinite()
    assert all(gradient.isfinite().all() for gradient in gradients)
    if name in OFFSETS:
        inside, kept = kept_of(name)
        gold_loss, gold_metrics, gold = run(cut(given, kept), inside, "torch")
        torch.testing.assert_close(loss, gold_loss)
        torch.testing.assert_close(metrics, gold_metrics, equal_nan=True)
        for ours, expected in zip(gradients, gold, strict=True):
            whole = torch.zeros(TOKENS)
            whole[kept] = expected
            torch.testing.assert_close(ours, whole)


@all_offsets
@all_selections
@pytest.mark.parametrize("ratio", ["token", "seq_mean"])
@pytest.mark.parametrize("op", ["logits_grpo_loss", "linear_grpo_loss"])
def test_offsets_of_a_fused_loss(unread, op, name, ratio, selection):
    needs(unread, op)
    offsets = torch.tensor((OFFSETS | DISORDER)[name])
    options, changes = selection
    params = LossParams(ratio=ratio, beta=0.1, entropy_coef=0.01, **changes)
    factors = {"logits": torch.randn(TOKENS, VOCAB)}
    if op == "linear_grpo_loss":
        factors = {"hidden": torch.randn(TOKENS, 5), "weight": torch.randn(VOCAB, 5)}
    rows = next(iter(factors))
    ids = torch.randint(VOCAB, (TOKENS,))
    given = {"token_ids": ids, **of_loss(TOKENS, len(offsets) - 1)}

    def run(
        factors: dict[str, Tensor], inputs: dict[str, Tensor], cu_seqlens: Tensor, backend: str
    ) -> tuple[Tensor, list[Tensor]]:
        leaves = {key: x.clone().requires_grad_() for key, x in factors.items()}
        result = getattr(lvrpo, op)(
            **leaves,
            **inputs,
            cu_seqlens=cu_seqlens,
            level="sequence",
            params=params,
            backend=backend,
            **options,
        )
        return result.loss.detach(), list(torch.autograd.grad(result.loss, list(leaves.values())))

    loss, gradients = run(factors, given, offsets, unread)
    assert loss.isfinite()
    assert all(gradient.isfinite().all() for gradient in gradients)
    if name in OFFSETS:
        inside, kept = kept_of(name)
        fewer = {**factors, rows: factors[rows][kept]}
        gold_loss, gold = run(fewer, cut(given, kept), inside, "torch")
        torch.testing.assert_close(loss, gold_loss)
        whole = torch.zeros_like(factors[rows])
        whole[kept] = gold[0]
        for ours, expected in zip(gradients, [whole, *gold[1:]], strict=True):
            size = 1.0 + expected.abs().max()
            torch.testing.assert_close(ours / size, expected / size)


@all_offsets
@pytest.mark.parametrize("scale", ["group", "batch"])
@pytest.mark.parametrize("whiten", ["none", "token"])
def test_offsets_of_groups(unread, name, scale, whiten):
    needs(unread, "normalize_advantages")
    offsets = torch.tensor((OFFSETS | DISORDER)[name])
    rewards, lengths = torch.randn(TOKENS, 2), torch.randint(1, 9, (TOKENS,))
    params = lvrpo.AdvantageParams(scale=scale, whiten=whiten)
    found = lvrpo.normalize_advantages(
        rewards, offsets, lengths=lengths, params=params, backend=unread
    )
    assert found.values.isfinite().all()
    assert found.per_reward.isfinite().all()
    if name in OFFSETS:
        inside, kept = kept_of(name)
        gold = lvrpo.normalize_advantages(
            rewards[kept], inside, lengths=lengths[kept], params=params, backend="torch"
        )
        whole = torch.zeros(TOKENS)
        whole[kept] = gold.values
        torch.testing.assert_close(found.values, whole)


def targets(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Ids, rows and ranges that are nowhere as often as not."""
    made = torch.Generator().manual_seed(seed)

    def integers(low: int, high: int, *shape: int) -> Tensor:
        near = torch.randint(low, high, shape, generator=made)
        far = torch.randint(-(2**40), 2**40, shape, generator=made)
        return torch.where(torch.rand(shape, generator=made) < 0.25, far, near)

    ids, rows = integers(-5, VOCAB + 5, 3 * TOKENS), integers(-2, TOKENS + 2, 3 * TOKENS)
    return ids, rows, integers(-5, VOCAB + 5, TOKENS, 2)


def plain_logprobs(logits: Tensor, ids: Tensor, rows: Tensor, ranges: Tensor) -> Tensor:
    """0 for a token without a row, or outside the columns that its row has."""
    logprobs = []
    for token, row in zip(ids.tolist(), rows.tolist(), strict=True):
        logprobs.append(0.0 * logits.sum())
        if 0 <= row < len(logits):
            low, high = max(0, int(ranges[row, 0])), min(logits.shape[1], int(ranges[row, 1]))
            if low <= token < high:
                logprobs[-1] = logits[row, low:high].log_softmax(0)[token - low]
    return torch.stack(logprobs)


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("shared", [False, True], ids=["own rows", "shared rows"])
@pytest.mark.parametrize("op", ["gather_logprobs", "linear_logprobs"])
def test_ids_rows_and_ranges(unread, op, shared, seed):
    needs(unread, op)
    ids, rows, ranges = targets(seed)
    index = rows if shared else None
    if not shared:
        ids, rows = ids[:TOKENS], torch.arange(TOKENS)
    # The columns of a larger tensor: what is next to a row would show.
    wide = torch.full((TOKENS, VOCAB + 64), 50.0, dtype=torch.float64)
    wide[:, 32:-32] = torch.randn(TOKENS, VOCAB)
    factors = [wide[:, 32:-32].float()]
    if op == "linear_logprobs":
        factors = [torch.randn(TOKENS, 5), torch.randn(VOCAB, 5)]
    results = []
    for dtype in (torch.float32, torch.float64):
        leaves = [x.to(dtype).requires_grad_() for x in factors]
        if dtype == torch.float32:
            run = getattr(lvrpo, op)
            logprobs = run(*leaves, ids, index, vocab_range=ranges, backend=unread)
        else:
            logits = leaves[0] if len(leaves) == 1 else leaves[0] @ leaves[1].T
            logprobs = plain_logprobs(logits, ids, rows, ranges)
        weights = torch.linspace(1.0, 2.0, len(ids)).to(dtype)
        results.append([logprobs.detach(), *torch.autograd.grad(logprobs @ weights, leaves)])
    for ours, gold in zip(*results, strict=True):
        check_against_plain(ours, gold, gold.float(), scale=float(gold.abs().max()) + 1.0)


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("op", ["logits_grpo_loss", "linear_grpo_loss"])
def test_ids_and_ranges_of_a_fused_loss(unread, op, seed):
    needs(unread, op)
    ids, _, ranges = targets(seed)
    ids = ids[:TOKENS]
    factors = [torch.randn(TOKENS, VOCAB)]
    if op == "linear_grpo_loss":
        factors = [torch.randn(TOKENS, 5), torch.randn(VOCAB, 5)]
    logits = factors[0] if len(factors) == 1 else factors[0] @ factors[1].T
    logprobs = plain_logprobs(logits.double(), ids, torch.arange(TOKENS), ranges)
    counts = logprobs != 0
    leaves = [x.clone().requires_grad_() for x in factors]
    result = getattr(lvrpo, op)(
        *leaves,
        ids,
        None,
        torch.ones(1),
        torch.tensor([0, TOKENS]),
        params=LossParams.preset("reinforce", aggregation="token_sum"),
        vocab_range=ranges,
        backend=unread,
    )
    torch.testing.assert_close(result.logprobs.detach(), logprobs.float())
    assert int(result.metrics.dropped_tokens) == int((~counts).sum())
    gradients = torch.autograd.grad(result.loss, leaves)
    exact = [x.double().requires_grad_() for x in factors]
    logits = exact[0] if len(exact) == 1 else exact[0] @ exact[1].T
    gold = torch.autograd.grad(
        -plain_logprobs(logits, ids, torch.arange(TOKENS), ranges).sum(), exact
    )
    for ours, expected in zip(gradients, gold, strict=True):
        torch.testing.assert_close(ours, expected.float())


@pytest.mark.skipif(not backends.triton_interprets(), reason="it watches Triton's interpreter")
@pytest.mark.parametrize("how", ["load", "store", "atomic"])
def test_triton_one_element_too_far_is_seen(how):
    stray = importlib.import_module("stray")  # only here: it needs Triton
    buffer = torch.zeros(9)
    inside = buffer[2:7]
    for at in (0, 4):
        stray.touch[1,](inside, at, how)
    for at in (-1, 5, 10**9):
        with pytest.raises(Exception, match="1 of 1 elements outside the tensors given"):
            stray.touch[1,](inside, at, how)
    assert not buffer[:2].any()
    assert not buffer[7:].any()
