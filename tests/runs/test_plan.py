"""`lvrpo plan`: what it tells, and whose numbers they are."""

from __future__ import annotations

import json

import pytest
import torch
from runs.tiny import OVERRIDES, command, settings, tiny_config

from lvrpo.models.packs import Pack
from lvrpo.planning.memory import Numerics
from lvrpo.planning.rows import Rows
from lvrpo.runs.plan import plan_run
from lvrpo.runs.setup import Setup
from lvrpo.trainer.experience import Experience, gather_experience
from lvrpo.trainer.objective import Objective
from lvrpo.trainer.schedule import flow_schedule
from lvrpo.trainer.update import pack_experience


def planned(*arguments: object) -> dict:
    result = command("plan", "--json", *arguments, tiny=True)
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_a_plan_is_told_as_tables_and_as_json():
    found = planned()
    result = command("plan", tiny=True)
    assert result.exit_code == 0
    for name in [*found["state"], *found["flops"], *found["update"], "forecast from formulas"]:
        assert name in result.stdout
    assert found["flops"]["update"] < found["flops"]["update, separate prompts"]
    assert found["activations"]["checkpointed"] < found["activations"]["kept"]
    assert set(found["peak"]) == {"warm start", "rollout", "update", "evaluation"}


def test_the_parameters_are_those_of_the_run(tmp_path):
    config = tiny_config()
    setup = Setup(config)
    module = setup.new_policy(setup.unfitted_parts()).module
    assert planned()["parameters"]["trained"] == sum(p.numel() for p in module.parameters())


def test_the_buffers_are_those_of_the_update():
    """An untrained policy answers to the limit now and then; the rows of drawings are exact."""
    config = tiny_config("rollout.understand_prompts=0")
    setup = Setup(config)
    policy = setup.new_policy(parts := setup.unfitted_parts())
    task, schedule = setup.task(parts), flow_schedule(config.rollout)
    step = config.warm_start.steps + 1
    rewards = setup.make_rewards(parts, policy)
    experience, _ = gather_experience(policy, task, rewards, config, schedule, step)
    objective = Objective.from_config(config)
    packs: list[Pack] = [*pack_experience(policy, experience, schedule, objective)]
    work = plan_run(config, Numerics()).work
    assert [Rows.of_pack(pack) for pack in packs] == work.buffers
    assert isinstance(experience, Experience)
    assert experience.pictures is not None
    assert work.pictures.samples == len(experience.pictures.images)
    assert work.trained == len(experience.pictures.steps)


def test_ranks_share_the_state_and_the_groups():
    alone, shared = planned(), planned("--ranks", 2)
    assert shared["state"]["optimizer"] == pytest.approx(alone["state"]["optimizer"] / 2, abs=8)
    assert shared["rows"]["pass"] < alone["rows"]["pass"]
    assert alone["wire"] == {"rollout": 0, "update": 0}
    weights = 4 * alone["parameters"]["trained"]
    assert shared["wire"]["update"] == 4 * weights // 2  # three gathers, one scatter, of a half
    narrow = planned("--ranks", 2, "--bf16")
    assert narrow["wire"]["update"] < shared["wire"]["update"]
    assert narrow["update"]["activations"] < shared["update"]["activations"]


@pytest.mark.parametrize(
    ("key", "option"),
    [
        ("run.precision=bf16", "--bf16"),
        ("model.gradient_checkpointing=true", "--checkpointing"),
        ("run.device=cuda", "--gpu"),
    ],
)
def test_what_the_configuration_says_is_not_said_again(key, option):
    assert planned("--set", key) == planned(option) != planned()


def test_seconds_follow_from_rate_and_bandwidth():
    found = planned("--rate", 1e9, "--bandwidth", 1e6, "--ranks", 2)
    for kind, rate in (("flops", 1e9), ("wire", 1e6)):
        for name, count in found[kind].items():
            assert found["seconds"][kind][name] == pytest.approx(count / rate)
    result = command("plan", "--rate", 1e9, tiny=True)
    assert result.exit_code == 2
    assert (
        result.stderr == "lvrpo: plan: --rate is 1e+09 and --bandwidth 0, expected both or none\n"
    )


def test_more_ranks_than_groups_are_refused():
    result = command("plan", "--ranks", 3, tiny=True)
    assert result.exit_code == 2
    assert "rollout.understand_prompts is 2, expected at least 3" in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_a_model_that_no_machine_holds_takes_no_memory_to_plan():
    wide = ["model.hidden=8192", "model.mlp=29568", "model.layers=80", "model.heads=256"]
    result = command("plan", "--json", *settings([*OVERRIDES, *wide]))
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["parameters"]["trained"] > 100e9
    assert torch.empty(0).device.type == "cpu"
