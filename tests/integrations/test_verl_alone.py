"""What is for verl and does not need it: options by name, and estimators by their formulas."""

from __future__ import annotations

import collections
import importlib
import math
import statistics
import sys
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch

import lvrpo
from lvrpo.integrations import verl as ours
from lvrpo.integrations import versions


def actor(loss: str, **options: Any) -> types.SimpleNamespace:
    """What `LossParams.from_verl` reads, with the defaults of verl 0.9."""
    defaults = {
        "clip_ratio": 0.2,
        "clip_ratio_low": None,
        "clip_ratio_high": 0.28,
        "clip_ratio_c": 3.0,
        "loss_agg_mode": "token-mean",
        "loss_scale_factor": None,
        "entropy_coeff": 0.0,
        "use_kl_loss": False,
        "kl_loss_coef": 0.001,
        "kl_loss_type": "low_var_kl",
        "tau_pos": 1.0,
        "tau_neg": 1.05,
    }
    policy = types.SimpleNamespace(loss_mode=loss, dro_beta=None, ppo_kl_coef=0.1)
    return types.SimpleNamespace(policy_loss=policy, **defaults | options)


SAID = {
    "lvrpo": {"ratio_cap": 3.0, "clip_low": 0.2, "clip_high": 0.28},
    "lvrpo_gspo": {"ratio": "seq_mean_token", "clip_high": 0.28, "log_ratio_limit": 10.0},
    "gpg": {"ratio": "none"},
    "kl_cov": {"clip_low": math.inf, "clip_high": math.inf, "beta": 0.1, "kl": "abs"},
}


@pytest.mark.parametrize(("loss", "fields"), SAID.items())
def test_options_are_fields(loss, fields):
    same = {"aggregation": "token_mean", "count_empty": False}
    assert lvrpo.LossParams.from_verl(actor(loss)) == lvrpo.LossParams(**same, **fields)


def test_a_kl_and_a_bonus_are_fields():
    config = actor("gpg", use_kl_loss=True, kl_loss_type="k3+", entropy_coeff=0.01)
    params = lvrpo.LossParams.from_verl(config)
    assert (params.beta, params.kl, params.kl_gradient) == (0.001, "k3", "k2")
    assert (params.kl_log_ratio_limit, params.kl_limit, params.entropy_coef) == (20.0, 10.0, 0.01)


def test_a_coefficient_of_nobody():
    with pytest.raises(ValueError, match=r"policy_loss.dro_beta is None, the coefficient of dro"):
        lvrpo.LossParams.from_verl(actor("dro"))


def above_mean(own: float, group: list[float]) -> float:
    return own - statistics.fmean(group)


#: By estimator: the advantage of a score among those of its group of at least two.
FORMULAS: dict[str, Callable[[float, list[float]], float]] = {
    "grpo": lambda own, group: above_mean(own, group) / (statistics.stdev(group) + 1e-6),
    "rloo": lambda own, group: above_mean(own, group) * len(group) / (len(group) - 1),
}


@pytest.mark.parametrize("name", FORMULAS)
def test_an_estimator_is_its_formula(name):
    """And in a group of one the score itself."""
    scores = [0.5, 1.0, 0.25, 0.0, 0.75, 2.0]
    uid = ["c", "a", "b", "a", "b", "a"]
    groups = collections.defaultdict(list)
    for own, group in zip(scores, uid, strict=True):
        groups[group].append(own)
    expected = [
        FORMULAS[name](own, groups[group]) if len(groups[group]) > 1 else own
        for own, group in zip(scores, uid, strict=True)
    ]
    mask = torch.tensor([[1, 1, 0], [1, 0, 0], [1, 1, 1], [1, 1, 0], [1, 0, 0], [1, 1, 1]])
    rewards = torch.zeros(6, 3, dtype=torch.float64)
    rewards[:, 0] = torch.tensor(scores)
    advantages, returns = ours.ESTIMATORS[name](rewards, mask, index=uid)
    assert torch.equal(advantages, returns)
    assert torch.equal(advantages, advantages * mask)
    assert advantages[:, 0].tolist() == pytest.approx(expected, rel=1e-5)


PARITY = "lvrpo.integrations.verl.parity"


@pytest.mark.parametrize(
    "use",
    [
        lambda: ours.register(),
        lambda: ours.forward_with_lvrpo_backend(None),
        lambda: importlib.import_module(PARITY),
    ],
    ids=["register", "head", "parity"],
)
def test_without_verl_there_is_one_line_to_install_it(use, monkeypatch):
    monkeypatch.delitem(sys.modules, PARITY, raising=False)

    def missing(package: str) -> str:
        raise versions.importlib.metadata.PackageNotFoundError(package)

    monkeypatch.setattr(versions.importlib.metadata, "version", missing)
    with pytest.raises(ModuleNotFoundError, match=r"not installed: verl; pip install 'lvrpo\[verl"):
        use()
