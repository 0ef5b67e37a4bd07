from __future__ import annotations

import json

import pytest
from runs.tiny import OVERRIDES

from lvrpo.runs.changes import (
    changed_config,
    changes_between,
    fingerprint,
    forked_config,
    rate_bridge,
)
from lvrpo.runs.config_file import load_config, read_settings
from lvrpo.runs.directory import RunDirectoryError
from lvrpo.runs.inputs import INPUTS, compare_inputs, read_inputs
from lvrpo.trainer.config import ConfigError
from lvrpo.trainer.schedule import learning_rate


def config_of(*overrides):
    return load_config(None, [*OVERRIDES, "run.steps=12", *overrides])


def test_a_change_after_the_step_that_a_run_went_back_to_has_not_happened():
    config, other = config_of(), config_of("optimizer.lr=0.5")
    start = config.warm_start.steps
    rows = changes_between(config, other, start + 8, None)
    assert rate_bridge(other, rows) == (8, rows[0]["lr"])
    back = {"step": start + 6, "key": "checkpoint", "old": start + 9, "new": start + 6}
    assert rate_bridge(other, [*rows, back]) is None
    # The schedule is then the new one, as if it had always been so.
    rates = [learning_rate(other, step, rate_bridge(other, [*rows, back])) for step in range(12)]
    assert rates == [learning_rate(other, step, None) for step in range(12)]
    earlier = changes_between(config, other, start + 5, None)
    assert rate_bridge(other, [*earlier, *rows, back]) == (5, earlier[0]["lr"])


def test_how_a_run_is_measured_may_change_and_how_it_samples_may_not(tmp_path):
    config = config_of()
    ways = ["eval.temperature=0.6", "eval.top_p=0.9", "eval.top_k=5", "eval.min_p=0.1"]
    measured = read_settings(overrides=[*ways, "eval.repetition_penalty=1.1"])
    assert fingerprint(changed_config(tmp_path, config, measured)) == fingerprint(config)
    for key in ("top_k=5", "top_p=0.9", "min_p=0.1", "repetition_penalty=1.1", "stop=['x']"):
        named = read_settings(overrides=[f"rollout.{key}"])
        assert fingerprint(named.over(config)) != fingerprint(config)
        with pytest.raises(ConfigError, match=f"rollout.{key.partition('=')[0]} is "):
            changed_config(tmp_path, config, named)
        assert forked_config(tmp_path, config, named).rollout != config.rollout


def test_an_input_that_the_run_has_no_record_of_differs():
    now = {"data.source": {"path": "train.jsonl", "lines": "a", "examples": 1, "pictures": {}}}
    assert compare_inputs(now, now) == {}
    assert compare_inputs({}, now) == {"data.source": f"{INPUTS} has no record of train.jsonl"}


@pytest.mark.parametrize("content", ["garbage", "[1]", ""])
def test_a_damaged_record_is_named(tmp_path, content):
    assert read_inputs(tmp_path) is None
    (tmp_path / INPUTS).write_text(content)
    with pytest.raises(RunDirectoryError, match=rf"{INPUTS} is damaged"):
        read_inputs(tmp_path)
    (tmp_path / INPUTS).write_text(json.dumps({"data.source": {}}))
    assert read_inputs(tmp_path) == {"data.source": {}}
