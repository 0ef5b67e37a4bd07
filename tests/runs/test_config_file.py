from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest
import tomli_w

from lvrpo.runs.config_file import (
    expected,
    from_table,
    line_of,
    load_config,
    read_settings,
    to_table,
    to_toml,
)
from lvrpo.trainer.config import ConfigError, RunSection, TrainConfig


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
    "wrong type in a table": (["rewards.generate={r_ins='x'}"], "rewards.generate.r_ins is 'x'"),
    "no table": (["rewards.generate=3"], "rewards.generate is 3, expected a table of names, each "),
    "an entry of a table": (
        ["rewards.right.understand=exact"],
        """expected the whole table: --set 'rewards.right={ understand = "exact" }'""",
    ),
    "no section": (["run=3"], "'run=3' is not of the form"),
    "an empty section": ([".steps=3"], "'.steps=3' is not of the form section.key=value"),
    "an empty key": (["run.=3"], "'run.=3' is not of the form section.key=value"),
    "no float is an int": (["run.seed=1.0"], "run.seed is 1.0, expected an integer"),
    "close to a key": (["run.sede=1"], r"run.sede; .*; did you mean run.seed\?"),
    "close to a section": (["runs.seed=1"], r"\[runs\]; .*; did you mean run\?"),
    "close to a choice": (["loss.preset=gpro"], r"is 'gpro', .* gspo, .*; did you mean grpo\?"),
    "close to nothing": (["loss.preset=best"], "reinforce$"),
    "not an assignment": (["run.seed"], "not of the form"),
    "too small": (["rollout.group_size=0"], "rollout.group_size is 0"),
    "too many stochastic steps": (["rollout.stochastic_steps=11"], "stochastic_steps is 11"),
    "temperature": (["rollout.temperature=0"], "rollout.temperature is 0"),
    "no skill": (
        ["rewards.right={ read = 'exact' }"],
        "rewards.right has 'read', expected a table of understand or generate, each with a string",
    ),
    "adapters": (["model.lora_rank=2"], "lora_rank is 2, expected no such key where .*'unified'"),
    "top-p": (["rollout.top_p=0"], r"rollout.top_p is 0, expected a number in \(0, 1\]"),
    "no list": (["rollout.stop=x"], "rollout.stop is 'x', expected a list, each a string"),
    "an entry of a list": (["rollout.stop=['x', 3]"], "rollout.stop.1 is 3, expected a string"),
    "an empty stop string": (["rollout.stop=['']"], r"rollout.stop is \[''\], expected strings"),
    "more tokens than the most": (["rollout.min_answer_tokens=9"], "min_answer_tokens is 9, .*8"),
    "a sampling that is off": (["eval.top_p=0.5"], "eval.top_p is 0.5, expected 1.0 where eval.t"),
    "an image that guides alone": (
        ["rollout.guidance_image=1.5"],
        "rollout.guidance_image is 1.5, expected 1 where rollout.guidance is 1: nothing is guided",
    ),
    "an image that guides an eval alone": (
        ["eval.guidance_image=0.5", "rollout.guidance=4"],
        "eval.guidance_image is 0.5, expected 1 where eval.guidance is 1: nothing is guided",
    ),
    "an overflowing eval": (["eval.temperature=1e-9"], "eval.temperature is 1e-09, expected 0 or"),
    "advantage": (["rewards.advantage=best"], "rewards.advantage is 'best'"),
    "noise": (["warm_start.label_noise=2"], "label_noise is 2"),
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


BAD_LINES = {
    "[run]\n# twice\nseed = 1\nsteps = -1\n": "4: run.steps is -1",
    "run.steps = -1": "1: run.steps is -1",
    "[run]\nsede = 1": "2: unknown key run.sede",
    "\n\n[runs]\nseed = 1": "3: unknown section [runs]",
    "run = 3": "1: run is 3, expected a section",
    "[rewards.generate]\nr_ins = 'x'": "2: rewards.generate.r_ins is 'x'",
    "[rewards]\ngenerate = {}\n": "2: rewards.generate is {}",
    "[rewards]\ngenerate = { r_ins = 1, r_sem = 1e9 }\n": "2: rewards.generate.r_sem is",
    "[rollout]\nshift = 1\nstochastic_steps = 11": "3: rollout.stochastic_steps is 11",
}


@pytest.mark.parametrize(("text", "message"), BAD_LINES.items())
def test_an_error_names_file_line_and_key(tmp_path, text, message):
    path = tmp_path / "mine.toml"
    path.write_text(text)
    with pytest.raises(ConfigError) as error:
        load_config(path)
    assert str(error.value).startswith(f"{path}:{message}")


def test_an_error_of_the_command_line_names_no_file(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text("[run]\nsteps = 1\n")
    with pytest.raises(ConfigError, match=r"^run.steps is -1"):
        load_config(path, ["run.steps=-1"])


def test_what_is_found_later_is_located_too(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text("[model]\nheads = 3\n")
    settings = read_settings(path)
    with pytest.raises(ConfigError, match=r"mine.toml:2: model.heads is 3"), settings.located():
        raise ConfigError("model.heads is 3, expected a multiple of kv_heads = 2")
    with pytest.raises(ConfigError, match=r"^model.mlp is"), settings.located():
        raise ConfigError("model.mlp is not in that file")


def test_a_line_is_that_where_a_value_begins():
    text = "a = 1\n[b]\nc = [\n  1,\n  2,\n]\nd.e = 3\nf = '''\nd = 4\n'''\n"
    lines = {key: line_of(text, key) for key in ("a", "b", "b.c", "b.d.e", "b.f", "b.g", "a.b")}
    assert lines == {"a": 1, "b": 2, "b.c": 3, "b.d.e": 7, "b.f": 8, "b.g": None, "a.b": None}


def test_sections_check_themselves():
    """Without a file and without its errors: whoever makes a section in Python is told too."""
    with pytest.raises(ValueError, match="greater than or equal to 0"):
        RunSection(steps=-1)
    with pytest.raises(dataclasses.FrozenInstanceError):
        RunSection().steps = 2


def test_the_page_of_the_configuration_says_what_the_code_does():
    """Every key in the order of its section, with its default and what it may be."""
    page = (Path(__file__).parents[2] / "docs" / "configuration.md").read_text()
    tables = {}
    for part in page.split("\n## ")[1:]:
        rows = re.findall(r"^\| `(\w+)` \| (.*?) \| (.*?) \| .+ \|$", part, re.M)
        if part.startswith("["):
            tables[part[1 : part.index("]")]] = {name: cells for name, *cells in rows}
    for section, values in to_table(TrainConfig()).items():
        in_code = {
            name: [_in_toml(value), expected(f"{section}.{name}")] for name, value in values.items()
        }
        assert tables[section] == in_code
        assert list(tables[section]) == list(in_code)


def _in_toml(value: object) -> str:
    if isinstance(value, dict):
        entries = ", ".join(f"{name} = {weight}" for name, weight in value.items())
        return f"{{ {entries} }}" if entries else "{}"
    return tomli_w.dumps({"key": value}).removeprefix("key = ").strip()
