"""Every number of the configuration: refused by its key, or a run that takes a step with it."""

from __future__ import annotations

import typing
from typing import Any

import pytest
from pydantic import TypeAdapter
from runs.tiny import OVERRIDES, Stop, StopAfter, command, run_tiny, settings

from lvrpo import backends
from lvrpo.backends.cuda import CudaBackend
from lvrpo.models.flow import DYNAMICS
from lvrpo.params.advantages import ADVANTAGE_PRESETS
from lvrpo.params.flow import KL_FORMS, VARIANTS
from lvrpo.params.sampler_correction import SAMPLER_CORRECTION_PRESETS
from lvrpo.runs.config_file import load_config
from lvrpo.runs.preflight import check_config
from lvrpo.trainer.config import TEXT_PRESETS, ConfigError, TrainConfig

VALUES = (
    "-1",
    "0",
    "nan",
    "inf",
    "-inf",
    "1e20",
    "1e300",
    "-1e-9",
    "1" + "0" * 20,
    "1" + "0" * 400,
)


def keys() -> dict[str, dict[str, Any]]:
    """`section.key` of the whole configuration with its JSON schema."""
    return {
        f"{section}.{name}": schema
        for section, kind in typing.get_type_hints(TrainConfig).items()
        for name, schema in TypeAdapter(kind).json_schema()["properties"].items()
    }


def number_of(schema: dict[str, Any]) -> dict[str, Any]:
    """The schema of a number, or of those in a table."""
    return schema.get("additionalProperties", schema)


NUMERIC = {
    key: schema
    for key, schema in keys().items()
    if number_of(schema).get("type") in ("integer", "number")
}
TABLES = {
    "rewards.understand": "{{ r_ins = {} }}",
    "rewards.generate": "{{ r_ins = {} }}",
    "data.questions": "{{ name = 1.0, sum = {} }}",
    "data.requests": "{{ place = 1.0, sum = {} }}",
}


def test_every_number_has_its_bounds():
    assert len(NUMERIC) > 40
    for key, schema in NUMERIC.items():
        assert key in TABLES or schema["type"] in ("integer", "number"), key
        assert number_of(schema).keys() & {"minimum", "exclusiveMinimum"}, key
        assert number_of(schema).keys() & {"maximum", "exclusiveMaximum"}, key


@pytest.mark.parametrize("key", NUMERIC)
def test_a_number_is_refused_by_its_key_or_takes_a_step(tmp_path, key):
    taken = 0
    for number, value in enumerate(VALUES):
        if NUMERIC[key].get("type") == "integer" and not value.lstrip("-").isdigit():
            continue
        setting = f"{key}={TABLES.get(key, '{}').format(value)}"
        none = ["run.eval_items=0", "run.frontier_items=0"]
        short = ["warm_start.steps=1", "run.steps=1", *none, setting]
        try:
            load_config(overrides=[*OVERRIDES, *short])
        except ConfigError as error:
            said = str(error)
            result = command("train", tmp_path / "refused", *settings([*OVERRIDES, *short]))
            assert (result.exit_code, result.stdout) == (2, ""), setting
            assert key in said
            assert key in result.stderr
            assert not (tmp_path / "refused").exists()
            continue
        taken += 1
        # The step the key has a say in; weights of a senseless rate may end the run after it.
        last = 1 if key.startswith("warm_start.") else 2
        if key in ("warm_start.steps", "run.steps"):
            last = 1
        said = f"{key} is taken"
        try:
            run_tiny(tmp_path / str(number), *short, signals=StopAfter(last))
        except Stop:
            pass
        except ConfigError as error:
            said = str(error)
        assert key in said, setting
    assert taken < len(VALUES)


CHECKED_BY_OTHERS = (
    "data.source",
    "data.eval_source",
    "data.validation_source",
    "run.backend",
    "run.device",
    "model.path",
    "rollout.curriculum",
)


def test_every_word_has_its_choices():
    words = {key: schema for key, schema in keys().items() if schema.get("type") == "string"}
    assert {key for key, schema in words.items() if "enum" not in schema} == {*CHECKED_BY_OTHERS}
    for key in words.keys() - {*CHECKED_BY_OTHERS}:
        with pytest.raises(ConfigError, match=f"{key} is 'best', expected one of "):
            load_config(overrides=[f"{key}=best"])


@pytest.mark.parametrize(
    ("key", "names"),
    {
        "loss.preset": TEXT_PRESETS,
        "loss.image_variant": VARIANTS,
        "loss.image_kl_form": KL_FORMS,
        "loss.sampler_correction": SAMPLER_CORRECTION_PRESETS,
        "rewards.advantage": ADVANTAGE_PRESETS,
        "rollout.dynamics": DYNAMICS,
    }.items(),
)
def test_whatever_an_op_offers_has_a_key(key, names):
    section, _, name = key.partition(".")
    for each in names:
        config = load_config(overrides=[f"{key}={each}"])
        assert getattr(getattr(config, section), name) == each


@pytest.mark.parametrize("backend", backends.ALL, ids=lambda backend: backend.name)
def test_a_run_on_a_backend_says_why_it_cannot_run_here(tmp_path, monkeypatch, backend):
    if backend.device in ("cpu", "") and not backend.why_unavailable():
        assert check_config(load_config(overrides=[*OVERRIDES, f"run.backend={backend.name}"]))
        monkeypatch.setattr(type(backend), "why_unavailable", lambda _: "its kernels are asleep")
    run, key = tmp_path / "run", f"run.backend={backend.name}"
    result = command("train", run, "-s", key, tiny=True)
    assert result.exit_code == 2
    reason = backend.why_unavailable() or "it runs on CUDA tensors"
    assert f"run.backend is '{backend.name}', which cannot run here: " in result.stderr
    assert reason in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert not run.exists()


def test_no_run_is_on_a_backend_of_a_gpu_alone(monkeypatch):
    monkeypatch.setattr(CudaBackend, "why_unavailable", lambda _: "")
    monkeypatch.setattr(CudaBackend, "has_kernels", lambda *_: True)
    with pytest.raises(ConfigError, match=r"'cuda', which cannot run here: .* on CUDA tensors"):
        check_config(load_config(overrides=["run.backend=cuda"]))


def test_sections_have_no_other_types():
    for key, schema in keys().items():
        assert schema["type"] in ("integer", "number", "string", "boolean", "object", "array"), key


@pytest.mark.parametrize("setting", ["rollout.dynamics=ode", "run.threads=1"])
def test_of_a_run_that_only_answers(tmp_path, setting):
    """What concerns drawings alone is no obstacle where nothing is drawn."""
    assert run_tiny(tmp_path, "rollout.generate_prompts=0", setting, "run.steps=1")


def test_a_backend_of_the_environment_is_checked_before_anything_is_created(tmp_path, monkeypatch):
    monkeypatch.setenv("LVRPO_BACKEND", "foo")
    result = command("train", tmp_path / "run", tiny=True)
    assert result.exit_code == 2
    assert "LVRPO_BACKEND is 'foo' in the environment" in result.stderr
    assert not (tmp_path / "run").exists()


def test_a_model_that_no_machine_holds(tmp_path):
    result = command("train", tmp_path / "run", "-s", "model.mlp=65536", "-s", "model.hidden=65536")
    assert result.exit_code == 2
    assert "model.hidden = 65536" in result.stderr
    assert "this machine has" in result.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("preset", ["dapo", "gspo", "cispo"])
def test_a_bound_that_is_not_set_stays_the_preset_s(preset):
    from lvrpo.params.policy_loss import LossParams
    from lvrpo.trainer.objective import Objective

    own = LossParams.preset(preset)
    changed = Objective.from_config(
        load_config(overrides=[f"loss.preset={preset}", "loss.text_clip_low=0.125"])
    )
    assert (changed.text.clip_low, changed.text.clip_high) == (0.125, own.clip_high)
    as_it_is = Objective.from_config(load_config(overrides=[f"loss.preset={preset}"]))
    assert (as_it_is.text.clip_low, as_it_is.text.clip_high) == (own.clip_low, own.clip_high)
