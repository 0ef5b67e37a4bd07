"""Every preset against its published formula, written for padded batches and differentiated by
autograd, with the normaliser of the library it comes from."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from loss_inputs import make_inputs
from torch import Tensor

from lvrpo.ops.grpo_loss import LOSS_PRESETS, LossParams, grpo_loss
from lvrpo.params.policy_loss import LOSS_CHOICES

LENGTHS = [3, 5, 1, 8, 4, 9, 6]
MAX_LENGTH = 10
BETA = 0.04


class Padded:
    """[B, L] tensors with a 0/1 mask; the third sequence is masked as a whole."""

    def __init__(self, inputs: dict[str, Tensor]) -> None:
        def pad(x: Tensor) -> Tensor:
            return torch.nn.utils.rnn.pad_sequence(list(x.split(LENGTHS)), batch_first=True)

        self.logp, self.old, self.ref = (
            pad(inputs[k]) for k in ("logprobs", "old_logprobs", "ref_logprobs")
        )
        self.mask = pad(inputs["mask"].double())
        self.advantage = inputs["advantages"][:, None].expand_as(self.mask)
        self.length = self.mask.sum(1)
        self.difference = self.logp - self.old
        d = self.ref - self.logp
        self.kl = d.exp() - d - 1

    def mean(self, x: Tensor) -> Tensor:
        """[B, L] -> [B, 1] over the mask."""
        return (x * self.mask).sum(1, keepdim=True) / self.length.clamp(min=1)[:, None]

    # The normalisers of TRL, by its names of the losses.
    def grpo(self, loss: Tensor) -> Tensor:
        return ((loss * self.mask).sum(1) / self.length.clamp(min=1.0)).mean()

    def bnpo(self, loss: Tensor) -> Tensor:
        return (loss * self.mask).sum() / self.mask.sum().clamp(min=1.0)

    def dr_grpo(self, loss: Tensor) -> Tensor:
        return (loss * self.mask).sum() / (len(loss) * MAX_LENGTH)

    def per_sequence(self, loss: Tensor) -> Tensor:
        """RLOO, GMPO: one loss per sequence [B, 1], then their mean; KL as a mean over tokens.

        A sequence without a token has the constant loss -A there and none here.
        """
        return (loss[:, 0] * (self.length > 0)).mean() + BETA * self.mean(self.kl).mean()


def ppo(ratio: Tensor, advantage: Tensor, low: float, high: float) -> Tensor:
    clipped = torch.clamp(ratio, 1 - low, 1 + high)
    return -torch.min(ratio * advantage, clipped * advantage)


def dapo(x: Padded) -> Tensor:
    return x.bnpo(ppo(x.difference.exp(), x.advantage, 0.2, 0.28) + BETA * x.kl)


def grpo(x: Padded) -> Tensor:
    return x.grpo(ppo(x.difference.exp(), x.advantage, 0.2, 0.2) + BETA * x.kl)


def bnpo(x: Padded) -> Tensor:
    return x.bnpo(ppo(x.difference.exp(), x.advantage, 0.2, 0.2) + BETA * x.kl)


def dr_grpo(x: Padded) -> Tensor:
    return x.dr_grpo(ppo(x.difference.exp(), x.advantage, 0.2, 0.2) + BETA * x.kl)


def gspo(x: Padded) -> Tensor:
    return x.grpo(ppo(x.mean(x.difference).exp(), x.advantage, 3e-4, 4e-4) + BETA * x.kl)


def gspo_token(x: Padded) -> Tensor:
    ratio = torch.exp(x.logp - x.logp.detach() + x.mean(x.difference).detach())
    return x.grpo(ppo(ratio, x.advantage, 3e-4, 4e-4) + BETA * x.kl)


def cispo(x: Padded) -> Tensor:
    weight = torch.clamp(x.difference.exp(), max=5.0).detach()
    return x.bnpo(-weight * x.advantage * x.logp + BETA * x.kl)


def sapo(x: Padded) -> Tensor:
    tau = 1.0 + 0.05 * (x.advantage <= 0)
    gate = torch.sigmoid(tau * (x.difference.exp() - 1)) * 4 / tau
    return x.grpo(-gate * x.advantage + BETA * x.kl)


def vespo(x: Padded) -> Tensor:
    log_w = (torch.clamp(x.difference, -20, 20) * x.mask).sum(1, keepdim=True)
    log_w = torch.clamp(log_w, math.log(1e-8), 20.0)
    k = 3.0 - 1.0 * (x.advantage >= 0)
    rate = 2.0 + 1.0 * (x.advantage >= 0)
    phi = torch.exp(rate + k * log_w - rate * log_w.exp()).detach()
    return x.bnpo(-phi * x.advantage * x.logp + BETA * x.kl)


def luspo(x: Padded) -> Tensor:
    loss = ppo(x.mean(x.difference).exp(), x.advantage[:, :1], 3e-4, 4e-4)
    return (loss * x.length[:, None]).mean() + BETA * (x.kl * x.mask).sum(1).mean()


def gmpo(x: Padded) -> Tensor:
    sign = torch.sign(x.advantage)
    clamped = torch.clamp(x.difference, -0.4, 0.4)
    kept = sign * torch.min(sign * x.difference, sign * clamped)
    return x.per_sequence(-x.mean(kept).exp() * x.advantage[:, :1])


def rloo(x: Padded) -> Tensor:
    ratio = (x.difference * x.mask).sum(1, keepdim=True).exp()
    return x.per_sequence(ppo(ratio, x.advantage[:, :1], 0.2, 0.2))


def score(x: Padded) -> Tensor:
    return x.bnpo(-x.advantage * x.logp + BETA * x.kl)


def dppo(x: Padded, up: Tensor, down: Tensor) -> Tensor:
    valid = torch.where(x.advantage > 0, up, down).detach().double()
    weight = torch.clamp(x.difference.exp(), max=20.0).detach()
    return x.bnpo(-x.advantage * weight * x.logp * valid + BETA * x.kl)


def dppo_tv(x: Padded) -> Tensor:
    change = x.logp.exp() - x.old.exp()
    return dppo(x, change <= 0.15, change >= -0.15)


def dppo_kl(x: Padded) -> Tensor:
    p, q = x.logp.exp(), x.old.exp()
    divergence = q * (x.old - x.logp) + (1 - q) * torch.log((1 - q + 1e-8) / (1 - p + 1e-8))
    near = divergence <= 0.05
    return dppo(x, near | (p <= q), near | (p >= q))


def dro(x: Padded) -> Tensor:
    """Its penalty is the KL here, whose reference is the old policy in a call that means DRO."""
    return x.bnpo(-x.advantage * x.logp + BETA * (x.ref - x.logp).square() / 2)


def kl_cov(x: Padded) -> Tensor:
    """As if every token were chosen, with a reference of its own."""
    return x.bnpo(-x.advantage * x.difference.exp() + BETA * (x.ref - x.logp).abs())


PUBLISHED = {
    "grpo": grpo,
    "dr_grpo": dr_grpo,
    "bnpo": bnpo,
    "dapo": dapo,
    "gspo": gspo,
    "gspo_token": gspo_token,
    "cispo": cispo,
    "sapo": sapo,
    "vespo": vespo,
    "luspo": luspo,
    "gmpo": gmpo,
    "rloo": rloo,
    "gpg": score,
    "reinforce": score,
    "dppo_tv": dppo_tv,
    "dppo_kl": dppo_kl,
    "dro": dro,
    "clip_cov": bnpo,
    "kl_cov": kl_cov,
}


def masked_inputs(spread: float = 1.0) -> dict[str, Any]:
    inputs = make_inputs(LENGTHS, torch.float64)
    del inputs["entropy"], inputs["policy_weights"]
    inputs["old_logprobs"] = torch.lerp(inputs["logprobs"], inputs["old_logprobs"], spread)
    inputs["mask"][8] = False
    return inputs


def test_every_preset_has_a_formula_and_a_row_of_the_docs():
    assert set(PUBLISHED) == set(LOSS_PRESETS)
    page = (Path(__file__).parents[2] / "docs/ops/grpo_loss.md").read_text(encoding="utf-8")
    names = {*LOSS_PRESETS, *(name for names in LOSS_CHOICES.values() for name in names)}
    missing = [name for name in sorted(names) if not re.search(rf"\b{name}\b", page)]
    assert not missing, f"docs/ops/grpo_loss.md does not say what these are: {missing}"


@pytest.mark.parametrize("spread", [0.002, 1.0, 8.0])
@pytest.mark.parametrize("name", LOSS_PRESETS)
def test_preset_is_its_published_formula(backend, name, spread):
    inputs = masked_inputs(spread)
    length = {"max_length": MAX_LENGTH} if name == "dr_grpo" else {}
    params = LossParams.preset(name, beta=BETA, **length)
    logprobs = inputs["logprobs"].requires_grad_()
    ours, metrics = grpo_loss(**inputs, params=params, backend=backend)
    expected = PUBLISHED[name](Padded(inputs))
    torch.testing.assert_close(ours, expected)
    torch.testing.assert_close(
        torch.autograd.grad(ours, logprobs), torch.autograd.grad(expected, logprobs)
    )
    held = float(metrics.clip_fraction_low + metrics.clip_fraction_high)
    if name in ("sapo", "vespo", "gpg", "reinforce", "dro", "kl_cov"):
        assert held == 0
    elif spread == 8.0:
        assert 0 < held <= 1


def verl_kl(logp: Tensor, ref: Tensor, kind: str, straight_through: bool) -> Tensor:
    """Its kl_penalty, with narrower clamps so that they bind here."""
    d = ref - logp
    value = {"k1": -d, "abs": d.abs(), "k2": d.square() / 2}.get(kind)
    if value is None:
        d = torch.clamp(d, min=-0.5, max=0.5)
        value = torch.clamp(d.exp() - d - 1, min=-0.1, max=0.1)
    k2 = (logp - ref).square() / 2
    return k2 - k2.detach() + value.detach() if straight_through else value


@pytest.mark.parametrize("factor", ["none", "ratio", "detached_ratio"])
@pytest.mark.parametrize("straight_through", [False, True])
@pytest.mark.parametrize("kind", ["k1", "k2", "k3", "abs"])
def test_kl_is_that_of_verl(backend, kind, straight_through, factor):
    inputs = masked_inputs()
    logprobs = inputs["logprobs"].requires_grad_()
    limits = {"kl_log_ratio_limit": 0.5, "kl_limit": 0.1} if kind == "k3" else {}
    params = LossParams(
        beta=0.7,
        kl=kind,
        kl_factor=factor,
        kl_gradient="k2" if straight_through else "own",
        aggregation="token_sum",
        **limits,
    )
    inputs["advantages"] = torch.zeros(len(LENGTHS), dtype=torch.float64)
    ours, metrics = grpo_loss(**inputs, params=params, backend=backend)
    kl = verl_kl(logprobs, inputs["ref_logprobs"], kind, straight_through)
    ratio = (logprobs - inputs["old_logprobs"]).exp()
    ratio = {"none": 1.0, "ratio": ratio, "detached_ratio": ratio.detach()}[factor]
    mask = inputs["mask"].double()
    expected = 0.7 * (ratio * kl * mask).sum()
    torch.testing.assert_close(ours, expected)
    in_all = (ratio * kl * mask).sum() / mask.sum()
    torch.testing.assert_close(metrics.kl, in_all.detach().float())
    torch.testing.assert_close(
        torch.autograd.grad(ours, logprobs), torch.autograd.grad(expected, logprobs)
    )


def verl_agg(x: Padded, loss: Tensor, mode: str) -> Tensor:
    """Its agg_loss: sequences without a token are no sequences."""
    if mode == "token_mean":
        return (loss * x.mask).sum() / x.mask.sum()
    sums = (loss * x.mask).sum(1)
    count = (x.length > 0).sum()
    if mode == "seq_mean_token_mean":
        return (sums / (x.length + 1e-8)).sum() / count
    mean = sums.sum() / count
    return mean / MAX_LENGTH if mode == "seq_mean_token_sum_norm" else mean


@pytest.mark.parametrize(
    "mode",
    ["token_mean", "seq_mean_token_mean", "seq_mean_token_sum", "seq_mean_token_sum_norm"],
)
def test_aggregation_is_that_of_verl(backend, mode):
    inputs = masked_inputs()
    length = {"max_length": MAX_LENGTH} if mode == "seq_mean_token_sum_norm" else {}
    params = LossParams(aggregation=mode, count_empty=False, **length)
    x = Padded(inputs)
    expected = verl_agg(x, ppo(x.difference.exp(), x.advantage, 0.2, 0.2), mode)
    torch.testing.assert_close(grpo_loss(**inputs, params=params, backend=backend).loss, expected)


def test_gspo_token_takes_advantages_per_token(backend):
    inputs = masked_inputs()
    inputs["advantages"] = torch.randn(sum(LENGTHS), dtype=torch.float64)
    logprobs = inputs["logprobs"].requires_grad_()
    params = LossParams.preset("gspo_token", clip_low=0.02, clip_high=0.02)
    ours = grpo_loss(**inputs, params=params, backend=backend).loss
    x = Padded(inputs | {"advantages": torch.zeros(len(LENGTHS))})
    advantage = torch.nn.utils.rnn.pad_sequence(
        list(inputs["advantages"].split(LENGTHS)), batch_first=True
    )
    ratio = torch.exp(x.logp - x.logp.detach() + x.mean(x.difference).detach())
    expected = x.grpo(ppo(ratio, advantage, 0.02, 0.02))
    torch.testing.assert_close(ours, expected)
    torch.testing.assert_close(
        torch.autograd.grad(ours, logprobs), torch.autograd.grad(expected, logprobs)
    )
