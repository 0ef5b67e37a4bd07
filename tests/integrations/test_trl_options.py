"""What a GRPOConfig becomes, and what is refused by name when a trainer is made."""

from __future__ import annotations

import importlib
import importlib.metadata
import subprocess
import sys
import types

import pytest

from lvrpo import LossParams

#: The options of TRL 1.16 that are of the loss, at their defaults.
DEFAULTS = {
    "loss_type": "dapo",
    "importance_sampling_level": "token",
    "beta": 0.0,
    "use_bias_correction_kl": True,
    "epsilon": 0.2,
    "epsilon_high": None,
    "delta": None,
    "sapo_temperature_pos": 1.0,
    "sapo_temperature_neg": 1.05,
    "vespo_k_pos": 2.0,
    "vespo_lambda_pos": 3.0,
    "vespo_k_neg": 3.0,
    "vespo_lambda_neg": 2.0,
    "max_completion_length": 256,
    "entropy_coef": 0.0,
    "use_adaptive_entropy": False,
    "use_vllm": False,
    "vllm_importance_sampling_correction": True,
}


def config(**options):
    return types.SimpleNamespace(**DEFAULTS | options)


def test_the_options_are_read_without_trl():
    code = (
        "import sys, types, lvrpo; sys.modules['trl'] = None\n"
        f"options = types.SimpleNamespace(**{DEFAULTS!r})\n"
        "print(lvrpo.LossParams.from_trl(options) == lvrpo.LossParams(aggregation='token_mean'))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "True", done.stderr


def test_the_defaults_are_those_of_trl():
    trl = pytest.importorskip("trl", reason="pip install 'lvrpo[trl]'")
    fresh = trl.GRPOConfig(output_dir="unused", bf16=False, max_completion_length=256)
    assert {name: getattr(fresh, name) for name in DEFAULTS} == DEFAULTS


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"loss_type": "ppo"}, ("loss_type is 'ppo'", "vespo")),
        ({"importance_sampling_level": "word"}, ("importance_sampling_level is 'word'", "'token'")),
        (
            {"loss_type": "vespo", "use_vllm": True, "beta": 0.1},
            ("use_bias_correction_kl is True", "expected False"),
        ),
        ({"beta": -0.1}, ("beta is -0.1",)),
    ],
)
def test_what_cannot_be_honoured_is_refused_in_a_line(options, words):
    with pytest.raises(ValueError, match="is ") as refused:
        LossParams.from_trl(config(**options))
    assert "\n" not in str(refused.value)
    assert all(word in str(refused.value) for word in words)


@pytest.mark.parametrize("threshold", [-0.1, float("nan")])
def test_a_threshold_that_drops_what_the_sampler_made_is_refused(threshold, tmp_path):
    trl = pytest.importorskip("trl", reason="pip install 'lvrpo[trl]'")
    from lvrpo.integrations.trl import check_options

    options = trl.GRPOConfig(
        output_dir=str(tmp_path), bf16=False, off_policy_mask_threshold=threshold
    )
    with pytest.raises(ValueError, match="off_policy_mask_threshold is"):
        check_options(options)


def test_a_trainer_refuses_before_a_model_is_loaded(tmp_path):
    trl = pytest.importorskip("trl", reason="pip install 'lvrpo[trl]'")
    from lvrpo.integrations.trl import GRPOTrainer

    options = trl.GRPOConfig(
        output_dir=str(tmp_path), bf16=False, loss_type="vespo", beta=0.1, use_vllm=True
    )
    with pytest.raises(ValueError, match="use_bias_correction_kl is True"):
        GRPOTrainer("a/model-that-nobody-has", args=options)


def test_arguments_of_another_trainer_are_refused():
    trl = pytest.importorskip("trl", reason="pip install 'lvrpo[trl]'")
    from lvrpo.integrations.trl import GRPOTrainer

    found = "args is a trl.trainer.dpo_config.DPOConfig, expected a trl.GRPOConfig"
    options = trl.DPOConfig(output_dir="unused", bf16=False)
    with pytest.raises(TypeError, match=found):
        GRPOTrainer("a/model-that-nobody-has", args=options)


def test_without_trl_one_line_says_what_to_install(monkeypatch):
    def nowhere(name):
        raise importlib.metadata.PackageNotFoundError(name)

    with pytest.raises(
        ModuleNotFoundError, match=r"^not installed: trl; pip install 'lvrpo\[trl\]'$"
    ):
        fresh_import(nowhere, monkeypatch)


@pytest.mark.parametrize("release", ["1.15.9", "1.17.0", "2.0"])
def test_another_release_of_trl_is_refused_with_the_range(release, monkeypatch):
    with pytest.raises(ImportError, match=rf"^trl is {release}, .*>=1.16,<1.17"):
        fresh_import(lambda name: release, monkeypatch)


@pytest.mark.parametrize("release", ["5.23.2", "5.25.0", "6.0"])
def test_another_release_of_transformers_is_refused_before_a_model_is_loaded(release, monkeypatch):
    found = {"trl": "1.16.0", "transformers": release}
    with pytest.raises(ImportError, match=rf"^transformers is {release}, .*>=5.24,<5.25"):
        fresh_import(found.__getitem__, monkeypatch)


def fresh_import(version, monkeypatch):
    """Import the integration anew, where packages have other releases."""
    monkeypatch.delitem(sys.modules, "lvrpo.integrations.trl", raising=False)
    monkeypatch.setattr(importlib.metadata, "version", version)
    importlib.import_module("lvrpo.integrations.trl")
