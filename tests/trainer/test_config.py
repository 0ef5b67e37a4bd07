from __future__ import annotations

import dataclasses

import pytest

from lvrpo.trainer.config import (
    ConfigError,
    TrainConfig,
    from_table,
    load_config,
    to_table,
    to_toml,
)


def test_toml_round_trip(tmp_path):
    config = load_config(overrides=["run.seed=7", "rewards.generate={ r_ins = 2 }"])
    path = tmp_path / "config.toml"
    path.write_text(to_toml(config))
    assert load_config(path) == config
    assert config.run.seed == 7
    assert config.rewards.generate == {"r_ins": 2.0}
    assert from_table(to_table(config)) == config


def test_overrides_win_over_the_file(tmp_path):
    path = tmp_path / "config.toml"
    path.write_text("[run]\nseed = 1\nsteps = 5\n")
    config = load_config(path, ["run.seed=2", "rollout.dynamics=cps"])
    assert (config.run.seed, config.run.steps, config.rollout.dynamics) == (2, 5, "cps")


BAD = {
    "unknown section": (["runs.seed=1"], r"unknown section \[runs\]"),
    "unknown key": (["run.sede=1"], r"unknown key run.sede; \[run\] has seed"),
    "wrong type": (["run.seed=one"], "run.seed is 'one', expected an integer"),
    "bool is no int": (["run.seed=true"], "run.seed is True, expected an integer"),
    "wrong type in a table": (["rewards.generate={r_ins='x'}"], "rewards.generate is"),
    "not an assignment": (["run.seed"], "not of the form"),
    "too small": (["rollout.group_size=0"], "rollout.group_size is 0"),
    "too many stochastic steps": (["rollout.stochastic_steps=11"], "stochastic_steps is 11"),
    "temperature": (["rollout.temperature=0"], "rollout.temperature is 0"),
    "advantage": (["rewards.advantage=best"], "rewards.advantage is 'best'"),
    "noise": (["warm_start.label_noise_generate=2"], "label_noise_generate is 2"),
}


@pytest.mark.parametrize(("overrides", "message"), BAD.values(), ids=BAD.keys())
def test_bad_value_names_the_key(overrides, message):
    with pytest.raises(ConfigError, match=message):
        load_config(overrides=overrides)


def test_bad_file(tmp_path):
    path = tmp_path / "config.toml"
    path.write_text("run = ")
    with pytest.raises(ConfigError, match=r"config\.toml: not TOML"):
        load_config(path)
    with pytest.raises(ConfigError, match=r"absent\.toml: No such file"):
        load_config(tmp_path / "absent.toml")


def test_every_key_is_documented():
    from pathlib import Path

    page = (Path(__file__).parents[2] / "docs" / "configuration.md").read_text()
    for section in dataclasses.fields(TrainConfig):
        for field in dataclasses.fields(section.default_factory):
            assert f"`{field.name}`" in page, f"{section.name}.{field.name} is not explained"
