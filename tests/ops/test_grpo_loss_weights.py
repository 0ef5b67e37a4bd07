"""What counts, how much it counts, and what is measured: against the published formulas, written
for padded batches in plain PyTorch."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from loss_inputs import metrics_of
from torch import Tensor

from lvrpo import top_entropy_mask
from lvrpo.ops.grpo_loss import LOSS_PRESETS, LossMetrics, LossParams, grpo_loss

LENGTHS = [3, 6, 1, 5, 4]
COLUMNS = max(LENGTHS)


def padded(seed: int = 0) -> dict[str, Tensor]:
    """[B, C] inputs; padding, holes and a sequence that is masked as a whole, all of it garbage."""
    generator = torch.Generator().manual_seed(seed)

    def normal(spread: float) -> Tensor:
        return spread * torch.randn(len(LENGTHS), COLUMNS, generator=generator).double()

    column = torch.arange(COLUMNS)
    mask = (column < torch.tensor(LENGTHS)[:, None]) & (column != 2)
    mask[3] = False
    logp = -normal(1.0).abs() - 0.1
    inputs = {
        "logprobs": logp,
        "old_logprobs": logp + normal(0.3),
        "ref_logprobs": logp + normal(0.4),
        "entropy": normal(1.0).abs(),
    }
    garbage = torch.tensor([math.nan, math.inf, -math.inf, 1e38])[column % 4].double()
    inputs = {name: torch.where(mask, x, garbage) for name, x in inputs.items()}
    weights = torch.rand(len(LENGTHS), COLUMNS, generator=generator).double() * (column % 3 != 0)
    inputs["policy_weights"] = torch.where(mask, weights, garbage)
    return inputs | {"mask": mask, "advantages": normal(1.0)[:, 0]}


def params_of(name: str, **changes: Any) -> LossParams:
    return LossParams.preset(name, **({"max_length": 8} if name == "dr_grpo" else {}), **changes)


def run(backend: str, params: LossParams, **inputs: Any) -> tuple[Tensor, Tensor, LossMetrics]:
    logprobs = inputs.pop("logprobs").clone().requires_grad_()
    loss, metrics = grpo_loss(logprobs, **inputs, params=params, backend=backend)
    loss.backward()
    assert logprobs.grad is not None
    return loss.detach(), logprobs.grad, metrics


def clean(x: Tensor, mask: Tensor) -> Tensor:
    return torch.where(mask, x, 0.0)


@pytest.mark.parametrize("name", ["grpo", "dapo", "bnpo", "dr_grpo", "gspo", "luspo"])
def test_policy_weights_multiply_the_policy_term_alone(backend, name):
    # TRL: per_token_loss = policy * weights + beta * KL, and every denominator is of the mask.
    inputs = padded()
    params = params_of(name, beta=0.3, clip_low=0.1, clip_high=0.15)
    loss, gradient, _ = run(backend, params, **inputs)

    mask = inputs["mask"]
    names = ("old_logprobs", "ref_logprobs", "policy_weights")
    old, ref, weights = (clean(inputs[key], mask) for key in names)
    logp = clean(inputs["logprobs"], mask).requires_grad_()
    length = mask.sum(1, keepdim=True).clamp(min=1)
    gap = logp - old
    if params.ratio == "seq_mean":
        gap = gap.mul(mask).sum(1, keepdim=True) / length
    ratio, a = gap.exp(), inputs["advantages"][:, None]
    policy = -torch.min(ratio * a, ratio.clamp(0.9, 1.15) * a) * weights
    kl = (ref - logp).exp() - (ref - logp) - 1
    each = (policy + 0.3 * kl) * mask
    total = {
        "token_mean": each.sum() / mask.sum(),
        "seq_mean_token_mean": (each.sum(1) / length[:, 0]).mean(),
        "seq_mean_token_sum": each.sum(1).mean(),
        "seq_mean_token_sum_norm": each.sum(1).mean() / 8,
    }[params.aggregation]
    torch.testing.assert_close(loss, total.detach())
    torch.testing.assert_close(gradient, torch.autograd.grad(total, logp)[0])


@pytest.mark.parametrize("name", LOSS_PRESETS)
def test_a_policy_weight_of_zero_still_counts(backend, name):
    inputs = padded()
    del inputs["policy_weights"]
    params = params_of(name, beta=0.3, entropy_coef=0.1)
    _, _, whole = run(backend, params, **inputs)
    _, _, metrics = run(backend, params, **inputs, policy_weights=torch.zeros(5, COLUMNS))
    same = metrics_of(whole) | {"policy_loss": 0.0}
    assert metrics_of(metrics) == same
    without = dict(inputs, advantages=torch.zeros(5).double())
    expected, slope, _ = run(backend, params, **without)
    loss, gradient, _ = run(backend, params, **inputs, policy_weights=torch.zeros(5, COLUMNS))
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradient, slope)


def test_the_rule_of_the_top_entropy_tokens(backend):
    # 80/20: only the tokens of high entropy pull, and the mean is still over all tokens.
    inputs = padded()
    mask, entropy = inputs["mask"], inputs["entropy"]
    chosen = entropy >= entropy[mask].quantile(0.8)
    del inputs["policy_weights"]
    top = top_entropy_mask(entropy[mask], fraction=0.2)
    weights = torch.zeros(5, COLUMNS).double().masked_scatter(mask, top.double())
    loss, gradient, _ = run(backend, params_of("dapo"), **inputs, policy_weights=weights)
    logp = clean(inputs["logprobs"], mask).requires_grad_()
    ratio, a = (logp - clean(inputs["old_logprobs"], mask)).exp(), inputs["advantages"][:, None]
    policy = -torch.min(ratio * a, ratio.clamp(0.8, 1.28) * a)
    expected = (policy * (mask & chosen)).sum() / mask.sum()
    torch.testing.assert_close(loss, expected.detach())
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, logp)[0])


LAYOUTS = {
    "bool": lambda mask: mask,
    "int64": lambda mask: mask.long(),
    "int32": lambda mask: mask.int(),
    "uint8": lambda mask: mask.byte(),
    "float": lambda mask: mask.float() * 0.5,
    "list": lambda mask: mask.int().tolist(),
}


@pytest.mark.parametrize("mask_as", LAYOUTS)
@pytest.mark.parametrize("name", LOSS_PRESETS)
def test_padded_tokens_are_packed_ones(backend, name, mask_as):
    inputs = padded()
    params = params_of(name, beta=0.1, entropy_coef=0.1)
    mask = inputs.pop("mask")
    results = [run(backend, params, **inputs, mask=LAYOUTS[mask_as](mask))]
    counts = mask.sum(1).tolist()
    packed = {key: x[mask] if x.dim() == 2 else x for key, x in inputs.items()}
    offsets = torch.tensor([0, *counts]).cumsum(0)
    for advantages in (inputs["advantages"], inputs["advantages"][:, None]):
        packed["advantages"] = advantages
        results.append(run(backend, params, **packed, cu_seqlens=offsets.int()))
    packed["advantages"] = inputs["advantages"].tolist()
    results.append(run(backend, params, **packed, cu_seqlens=offsets.tolist()))
    if not params.needs_sequence_advantages:
        each = inputs["advantages"][:, None].expand(5, COLUMNS)
        results.append(run(backend, params, **inputs | {"advantages": each}, mask=mask))
    for loss, gradient, metrics in results:
        torch.testing.assert_close(loss, results[0][0])
        gradient = gradient[mask] if gradient.dim() == 2 else gradient
        torch.testing.assert_close(gradient, results[0][1][mask])
        assert metrics_of(metrics) == pytest.approx(metrics_of(results[0][2]), rel=1e-6)
    assert (results[0][1][~mask] == 0).all()


def test_advantages_mean_what_is_said_where_sizes_coincide(backend):
    arguments = (torch.zeros(2), None, torch.tensor([1.0, -1.0]), torch.tensor([0, 2, 2]))
    token = grpo_loss(*arguments, level="token", backend=backend)
    sequence = grpo_loss(*arguments, level="sequence", backend=backend)
    assert float(token.loss) == 0.0
    assert float(sequence.loss) == -0.5  # one token of the two sequences' mean each
    # One token a sequence: both are the same, and nothing has to be said.
    single = grpo_loss(*arguments[:3], torch.arange(3), backend=backend)
    assert float(single.loss) == 0.0
    # A ratio per sequence leaves no choice.
    grpo_loss(*arguments, params=LossParams.preset("gspo"), backend=backend)


def test_a_batch_of_any_size_is_one_graph(backend):
    # Down to one sequence, whose size a graph has as a constant next to sizes that vary.
    torch.compiler.reset()

    def loss_of(logprobs: Tensor, advantages: Tensor, cu_seqlens: Tensor, coef: float) -> Tensor:
        params = LossParams(entropy_coef=coef)
        by = {"params": params, "backend": backend, "entropy": logprobs.abs()}
        return grpo_loss(logprobs, None, advantages, cu_seqlens, **by).loss

    compiled = torch.compile(loss_of, dynamic=True, fullgraph=True, backend="aot_eager")
    for step, (tokens, sequences) in enumerate(((6, 3), (8, 4), (5, 2), (4, 1))):
        offsets = torch.linspace(0, tokens, sequences + 1).long()
        given = -torch.rand(tokens), torch.ones(sequences), offsets, 0.1 + step
        torch.testing.assert_close(compiled(*given), loss_of(*given))


ZEROS = {
    "int": 0,
    "float": 0.0,
    "int64": torch.tensor(0),
    "fp32": torch.tensor(0.0),
    "one element": torch.zeros(1),
}


@pytest.mark.parametrize("zero", ZEROS)
@pytest.mark.parametrize("name", ["dapo", "grpo", "gspo"])
def test_a_count_of_zero_is_no_loss(backend, name, zero):
    nothing_counts(backend, name, zero, grpo_loss)


@pytest.mark.parametrize("zero", ["int", "int64"])
def test_a_count_of_zero_is_no_loss_unread(backend, zero):
    torch.compiler.reset()
    nothing_counts(
        backend, "dapo", zero, torch.compile(grpo_loss, fullgraph=True, backend="aot_eager")
    )


def nothing_counts(backend: str, name: str, zero: str, function: Callable[..., Any]) -> None:
    logprobs = torch.full((2, 3), -1.0, requires_grad=True)
    loss, _ = function(
        logprobs,
        torch.full((2, 3), -9.0),
        torch.ones(2),
        mask=torch.zeros(2, 3, dtype=torch.long),
        ref_logprobs=torch.zeros(2, 3),
        denominator=ZEROS[zero],
        params=LossParams.preset(name, beta=0.1),
        backend=backend,
    )
    loss.backward()
    assert float(loss.detach()) == 0.0
    assert (logprobs.grad == 0).all()


BROKEN = {
    "log-prob": ("logprobs", math.nan),
    "infinite log-prob": ("logprobs", -math.inf),
    "old": ("old_logprobs", -math.inf),
    "reference": ("ref_logprobs", math.nan),
    "entropy": ("entropy", math.inf),
    "advantage": ("advantages", math.nan),
    "infinite advantage": ("advantages", math.inf),
    "weight": ("policy_weights", math.nan),
    "negative weight": ("policy_weights", -1.0),
}


def with_broken(inputs: dict[str, Tensor], what: str) -> tuple[dict[str, Tensor], Tensor]:
    """The inputs with something in them that is not finite, and the mask without it."""
    key, value = BROKEN[what]
    at: Any = 1 if key == "advantages" else (1, 0)
    broken, kept = inputs[key].clone(), inputs["mask"].clone()
    broken[at], kept[at] = value, False
    if key == "advantages":  # but those that a policy weight of 0 does without
        kept[at] = inputs["mask"][at] & (inputs["policy_weights"][at] == 0)
    return inputs | {key: broken}, kept


@pytest.mark.parametrize("what", BROKEN)
def test_the_host_refuses_what_is_not_finite(backend, what):
    bad, _ = with_broken(padded(), what)
    with pytest.raises(ValueError, match=rf"{BROKEN[what][0]}\[1(, 0)?\] is"):
        run(backend, params_of("grpo", beta=0.1, entropy_coef=0.1), **bad)


@pytest.mark.parametrize("name", LOSS_PRESETS)
def test_an_advantage_that_nobody_asks_for_may_be_anything(backend, name):
    inputs = padded()
    params = params_of(name, beta=0.1, entropy_coef=0.1)
    inputs["policy_weights"] = torch.rand(5, COLUMNS)
    inputs["policy_weights"][1] = 0.0
    results = []
    for value in (0.0, math.nan, math.inf):
        inputs["advantages"][1] = value
        loss, gradient, metrics = run(backend, params, **inputs)
        assert float(metrics.dropped_tokens) == 0
        results.append([loss, gradient])
    assert all(torch.equal(a, b) for a, b in zip(results[0], results[1], strict=True))
    for a, b in zip(results[0], results[2], strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", ["dapo", "gspo"])
def test_what_the_host_refuses_does_not_count_unread(backend, name):
    inputs = padded()
    params = params_of(name, beta=0.1, entropy_coef=0.1)
    torch.compiler.reset()
    compiled = torch.compile(grpo_loss, fullgraph=True, backend="aot_eager")
    for what in BROKEN:
        bad, kept = with_broken(inputs, what)
        leaf = bad.pop("logprobs").clone().requires_grad_()
        loss, metrics = compiled(leaf, **bad, params=params, backend=backend)
        loss.backward()
        expected, gradient, _ = run(backend, params, **inputs | {"mask": kept})
        assert float(metrics.dropped_tokens) == float(inputs["mask"].sum() - kept.sum())
        torch.testing.assert_close(loss.detach(), expected)
        torch.testing.assert_close(leaf.grad, gradient)


def hand_metrics(inputs: dict[str, Tensor], params: LossParams) -> dict[str, float]:
    """What the metrics of a clipped ratio are, by their descriptions."""
    mask = inputs["mask"]
    logp, old, ref = (
        clean(inputs[key], mask) for key in ("logprobs", "old_logprobs", "ref_logprobs")
    )
    gap, some = logp - old, mask.any(1)
    a = inputs["advantages"][:, None].expand_as(gap)
    ratio, on = gap.exp(), mask
    if params.ratio == "seq_mean":
        mean = gap.sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp(min=1)
        ratio, on, a = mean.exp(), some[:, None], a[:, :1]
    low = on & (a < 0) & (ratio < 1 - params.clip_low)
    high = on & (a > 0) & (ratio > 1 + params.clip_high)
    kl_old = (gap.exp() - 1 - gap) * mask
    of_sequence = kl_old.sum(1)[some] / mask.sum(1)[some]
    kl = (ref - logp).exp() - 1 - (ref - logp)
    if params.kl_factor == "ratio":
        kl = kl * gap.exp()
    elif params.kl_factor == "sequence_ratio":
        kl = kl * (gap.sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp(min=1)).exp()
    share = [(x.sum(1)[some] / on.sum(1)[some]) for x in (low.double(), high.double())]
    seen = ratio[on]
    return {
        "kl": float(kl[mask].mean()),
        "entropy": float(inputs["entropy"][mask].mean()),
        "clip_fraction_low": float(low.sum() / on.sum()),
        "clip_fraction_high": float(high.sum() / on.sum()),
        "clip_fraction_low_min": float(share[0].min()),
        "clip_fraction_high_max": float(share[1].max()),
        "kl_old": float(kl_old.sum() / mask.sum()),
        "kl_old_max": float(of_sequence.max()),
        "ratio_min": float(seen.min()),
        "ratio_max": float(seen.max()),
        "ratio_mean": float(seen.mean()),
        "effective_sample_size": float(seen.sum() ** 2 / (seen.square().sum() * len(seen))),
        "active_tokens": float(mask.sum()),
        "active_sequences": float(some.sum()),
        "dropped_tokens": 0.0,
    }


@pytest.mark.parametrize("kl_factor", ["none", "ratio", "sequence_ratio"])
@pytest.mark.parametrize("ratio", ["token", "seq_mean"])
@pytest.mark.parametrize("seed", range(3))
def test_metrics_are_what_they_say(backend, seed, ratio, kl_factor):
    inputs = padded(seed)
    params = LossParams(ratio=ratio, clip_low=0.05, clip_high=0.1, beta=0.1, kl_factor=kl_factor)
    loss, _, metrics = run(backend, params, **inputs)
    found = metrics_of(metrics)
    assert found.pop("policy_loss") <= float(loss)
    assert found.pop("clip_fraction_cap") == 0.0
    assert found == pytest.approx(hand_metrics(inputs, params), rel=1e-5)


@pytest.mark.parametrize("name", LOSS_PRESETS)
def test_micro_batches_merge_to_the_metrics_of_the_whole(backend, name):
    inputs = padded()
    params = params_of(name, beta=0.1, entropy_coef=0.1)
    denominator = {"token_mean": int(inputs["mask"].sum()), "token_sum": 1}
    by = {"denominator": denominator.get(params.aggregation, 5)}
    loss, _, whole = run(backend, params, **inputs, **by)
    parts = [
        run(backend, params, **{key: x[rows] for key, x in inputs.items()}, **by)
        for rows in (slice(0, 1), slice(1, 4), slice(4, 5))
    ]
    torch.testing.assert_close(sum(part[0] for part in parts), loss)
    merged = LossMetrics.merge(part[2] for part in parts)
    assert metrics_of(merged) == pytest.approx(metrics_of(whole), rel=1e-6)


@pytest.mark.parametrize("name", ["gpg", "reinforce"])
def test_without_a_ratio_nothing_is_clipped(backend, name):
    _, metrics = grpo_loss(
        *(torch.tensor([-1.0, -2.0]), torch.tensor([-2.0, -1.0]), [1.0, -1.0], [0, 1, 2]),
        params=LossParams.preset(name),
        backend=backend,
    )
    assert float(metrics.clip_fraction_low) == float(metrics.clip_fraction_high) == 0.0


#: By what they count: the loss, and shares low, high and cap of ratios 0.5, 1.05, 1.15 and 2, where
#: the advantage is positive and where it is negative.
HELD = {
    "a cap above the clip": (
        LossParams(clip_high=0.1, ratio_cap=1.5),
        ((0.0, 0.5, 0.0), (0.25, 0.0, 0.25)),
    ),
    "a cap below the clip": (
        LossParams(clip_high=0.28, ratio_cap=1.1),
        ((0.0, 0.5, 0.0), (0.25, 0.0, 0.25)),
    ),
    "a weight of at most 0.9": (
        LossParams(surrogate="detached", clip_low=math.inf, clip_high=-0.1),
        ((0.0, 0.75, 0.0), (0.0, 0.75, 0.0)),
    ),
}


@pytest.mark.parametrize("ratio", ["token", "seq_mean"])
@pytest.mark.parametrize("what", HELD)
def test_what_a_bound_holds_is_counted_on_its_side(backend, what, ratio):
    params, shares = HELD[what]
    log_ratio = torch.tensor([0.5, 1.05, 1.15, 2.0]).log()
    old = torch.full((4, 2), -3.0)
    for sign, expected in zip((1.0, -1.0), shares, strict=True):
        _, metrics = grpo_loss(
            *(old + log_ratio[:, None], old, [sign] * 4),
            params=dataclasses.replace(params, ratio=ratio),
            backend=backend,
        )
        held = metrics.clip_fraction_low, metrics.clip_fraction_high, metrics.clip_fraction_cap
        assert tuple(map(float, held)) == expected
