"""Wrong input: one line that names the thing, exit code 2, nothing half-written."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from runs.test_resume import assert_same_run
from runs.tiny import OVERRIDES, Stop, StopAfter, command, run_tiny, settings

from lvrpo.models.unified.policy import UnifiedPolicy
from lvrpo.runs.checkpoint import checkpoints, load_newest
from lvrpo.runs.log import read_metrics
from lvrpo.trainer import loop


def refused(*arguments: object, tiny: bool = False, after_start: bool = False) -> str:
    """The one line of a command that must refuse its input."""
    result = command(*arguments, tiny=tiny)
    assert result.exit_code == 2, result.output
    lines = result.stderr.splitlines()
    assert lines[-1].startswith("lvrpo: ")
    assert after_start or len(lines) == 1, result.stderr
    assert "Traceback" not in result.output
    return lines[-1].removeprefix("lvrpo: ")


def contents(directory: Path) -> dict[str, bytes]:
    files = [path for path in directory.rglob("*") if path.is_file() and path.name != ".lock"]
    return {str(path.relative_to(directory)): path.read_bytes() for path in files}


@pytest.fixture
def run(trained, tmp_path) -> Path:
    """A finished run to spoil."""
    return Path(shutil.copytree(trained, tmp_path / "run"))


@pytest.fixture
def half_way(tmp_path) -> Path:
    """A run that stopped after its fourth step of six."""
    with pytest.raises(Stop):
        run_tiny(tmp_path / "run", signals=StopAfter(4))
    return tmp_path / "run"


BAD_SETTINGS = {
    "rollout.curriculum=hardest": "rollout.curriculum is 'hardest', expected 'module:function'",
    "rollout.curriculum=absent.py:hardest": "rollout.curriculum: ",
    "rollout.curriculum=builtins:sorted": "rollout.curriculum raised TypeError: ",
    "rewards.arguments={number=3}": "rewards.arguments.number is 3, expected a table",
    "rewards.arguments={number={relative=1}}": "rewards.arguments has 'number', expected the name "
    "of a reward in use: r_ins",
    "rewards.arguments={r_ins={strict_weight=1}}": "reward 'r_ins' takes no arguments",
    "run.sede=1": "unknown key run.sede; [run] has seed",
    "runs.seed=1": "unknown section [runs]",
    "run.seed=x": "run.seed is 'x', expected an integer",
    "run.threads=-1": "run.threads is -1, expected an integer in [0, 1024]",
    "run.device=gpu": "run.device is 'gpu', expected '' or 'cpu', 'cuda' or 'cuda:N'",
    "run.device=cpu:1": "run.device is 'cpu:1', expected ''",
    "run.device=cuda:999": "run.device is 'cuda:999', expected a GPU that is there: GPU 999",
    "run.backend=gpu": "run.backend is 'gpu', expected one of cpp, cuda, triton, torch",
    "data.channels=0": "data.channels is 0, expected an integer in [1, 3]",
    "data.questions={color=1.0}": "data.questions: SceneConfig: understand has kind 'color'",
    "data.requests={place=0}": "data.requests: SceneConfig: generate has no weight above zero",
    "model.heads=3": "model.heads is 3, expected a multiple of kv_heads = 2",
    "model.image_patch=3": "model.image_patch is 3, which does not tile pictures of 16 x 16",
    "model.latent_patch=3": "model.latent_patch is 3, which does not tile pictures of 16 x 16",
    "model.latent_dim=65": "model.latent_dim is 65, in each of model.latent_tokens_per_patch = 1, ",
    "model.latent_tokens_per_patch=6": "is 12, in each of model.latent_tokens_per_patch = 6, expec",
    "warm_start.label_noise=2": "warm_start.label_noise is 2",
    "rollout.dynamics=foo": "rollout.dynamics is 'foo', expected one of flow_sde",
    "rollout.dynamics=ode": "rollout.dynamics is 'ode' with rollout.noise_level 0.7: no step",
    "rollout.noise_level=-1": "rollout.noise_level is -1, expected a number in ",
    "rollout.stop_token_ids=[0]": "rollout.stop_token_ids has 0, expected tokens in [",
    "rollout.shift=0": "rollout.shift is 0, expected a number in ",
    "rollout.generate_prompts=-1": "rollout.generate_prompts is -1",
    "loss.preset=best": "loss.preset is 'best', expected one of grpo",
    "loss.image_kl_form=l1": "loss.image_kl_form is 'l1', expected one of velocity_mse",
    "loss.advantage_clip=0": "loss.advantage_clip is 0, expected a number in ",
    "rewards.advantage=best": "rewards.advantage is 'best'",
    "rewards.semantic_pool=mean": "rewards.semantic_pool is 'mean'",
    "rewards.strict_weight=2": "rewards.strict_weight is 2, expected a number in ",
    "rewards.generate={}": "rewards.generate is {}, expected a reward",
    "rewards.generate={r_new=1.0}": "rewards: unknown reward 'r_new'; expected one of r_ins",
    "rewards.generate={'absent.py:f'=1.0}": "absent.py:f': FileNotFoundError",
    "rewards.generate={'json:absent'=1.0}": "json has no attribute 'absent'",
    "optimizer.lr=nan": "optimizer.lr is nan, expected a number",
    "optimizer.final_lr_fraction=-1": "optimizer.final_lr_fraction is -1, expected a number in ",
    "loss.advantage_clip=-1": "loss.advantage_clip is -1, expected a number in (0, 1e6]",
    "loss.text_kl=-1": "loss.text_kl is -1, expected a number in ",
    "run.seed=99999999999999999999": "run.seed is 99999999999999999999",
    "rollout.group_size=1": "rollout.group_size is 1, expected an integer in [2, ",
    "rewards.generate={r_ins=nan}": "rewards.generate.r_ins is nan",
    "rewards.generate={r_ins=0}": "rewards.generate is {'r_ins': 0.0}, expected a reward",
    "optimizer.updates_per_rollout=0": "optimizer.updates_per_rollout is 0",
    "run.objective=lvrpo": "run.objective is 'lvrpo', expected one of grpo, supervised",
    "optimizer.minibatches=65536": "optimizer.minibatches is 65536, expected at most rollout.un",
}


@pytest.mark.parametrize(("setting", "message"), BAD_SETTINGS.items(), ids=BAD_SETTINGS.keys())
def test_a_bad_setting_is_refused_before_anything_is_created(tmp_path, setting, message):
    assert message in refused("train", tmp_path / "run", "--set", setting)
    assert not (tmp_path / "run").exists()


def test_bad_config_file(tmp_path):
    path = tmp_path / "mine.toml"
    for text, message in {
        "[run]\nsede = 1\n": f"{path}:2: unknown key run.sede",
        "[model]\n\nheads = 3\n": f"{path}:3: model.heads is 3",
        "[data]\nquestions = {nam = 1}\n": f"{path}:2: data.questions: SceneConfig: understand",
        "[run\n": f"{path}: not TOML",
    }.items():
        path.write_text(text)
        assert message in refused("train", tmp_path / "run", "--config", path)
    assert f"{tmp_path / 'no.toml'}: No such file" in refused(
        "train", tmp_path / "run", "--config", tmp_path / "no.toml"
    )
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("setting", ["rollout.group_size=4", "model.mlp=8", "run.seed=3"])
def test_other_settings_than_the_run_was_started_with(run, setting):
    before = contents(run)
    message = refused("train", run, *settings([*OVERRIDES, setting]))
    assert "was started with another configuration" in message
    assert f"{setting.partition('=')[0]} is " in message
    assert contents(run) == before


def test_a_negative_number_of_items(run):
    assert command("eval", run, "--items", -1).exit_code == 2


@pytest.mark.parametrize("option", [[], ["--dry-run"]])
def test_a_file_is_no_run_directory(tmp_path, option):
    (tmp_path / "mine.toml").write_text("")
    message = refused("train", tmp_path / "mine.toml", *option)
    assert f"{tmp_path / 'mine.toml'} is a file; give a new directory" in message


@pytest.mark.parametrize("content", ["notes.txt", "checkpoints/x"])
def test_a_directory_that_is_not_a_run(tmp_path, content):
    (tmp_path / content).parent.mkdir(exist_ok=True)
    (tmp_path / content).write_text("mine")
    before = contents(tmp_path)
    message = refused("train", tmp_path, tiny=True)
    assert f"{tmp_path} is not empty and not a run" in message
    assert content.split("/")[0] in message
    assert contents(tmp_path) == before
    assert not (tmp_path / ".lock").exists()


def test_what_a_kill_left_of_the_configuration_is_no_obstacle(tmp_path):
    (tmp_path / ".config.toml.123").write_text("[ru")
    (tmp_path / ".lock").touch()
    assert run_tiny(tmp_path, "run.steps=0", "warm_start.steps=1")


def test_a_file_in_the_place_of_the_directory(tmp_path):
    (tmp_path / "run").write_text("mine")
    line = refused("train", tmp_path / "run", tiny=True)
    assert f"{tmp_path / 'run'} is a file; give a new directory" in line
    assert (tmp_path / "run").read_text() == "mine"


@contextlib.contextmanager
def held(directory: Path) -> Iterator[None]:
    program = (
        "import sys, time; from pathlib import Path; from lvrpo.runs.directory import locked"
        "\nwith locked(Path(sys.argv[1])): print(flush=True); time.sleep(60)"
    )
    holder = subprocess.Popen([sys.executable, "-c", program, directory], stdout=subprocess.PIPE)
    assert holder.stdout is not None
    holder.stdout.readline()
    try:
        yield
    finally:
        holder.kill()
        holder.communicate()


def test_a_run_directory_in_use(run):
    before = contents(run)
    with held(run):
        assert refused("train", run) == f"{run} is in use by another process"
    assert contents(run) == before
    assert command("train", run, "--no-report").exit_code == 0  # a killed holder holds nothing


@pytest.mark.parametrize("arguments", [("eval",), ("report",), ("sample", "draw 3 at top-left")])
def test_commands_on_what_is_not_a_run(tmp_path, arguments):
    name, *rest = arguments
    for directory in (tmp_path / "absent", tmp_path):
        assert str(directory) in refused(name, directory, *rest)
    assert list(tmp_path.iterdir()) == []


def test_a_run_without_a_checkpoint(run):
    shutil.rmtree(run / "checkpoints")
    assert "has no checkpoint yet: lvrpo train" in refused("eval", run)
    shutil.rmtree(run / "task")
    assert "has no checkpoint yet: lvrpo train" in refused("sample", run, "draw 3 at top-left")
    assert not (run / "task").exists()


def flip_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


@pytest.mark.parametrize("spoil", [flip_a_byte, truncate, Path.unlink])
@pytest.mark.parametrize("which", ["checkpoints", "task", "reference"])
def test_corrupt_checkpoint(run, spoil, which):
    damaged = checkpoints(run / which)[-1]
    spoil(damaged / "tensors.safetensors")
    before = contents(run)
    assert f"{damaged} is corrupt" in refused("train", run, after_start=True)
    if which != "reference":
        assert f"{damaged} is corrupt" in refused("eval", run)
    assert contents(run) == before


def test_an_earlier_checkpoint_serves_when_the_damaged_one_is_deleted(run, trained):
    damaged = checkpoints(run / "checkpoints")[-1]
    truncate(damaged / "state.json")
    assert f"{damaged} is corrupt" in refused("train", run, after_start=True)
    shutil.rmtree(damaged)
    assert command("train", run, "--no-report").exit_code == 0
    assert_same_run(run, trained)


def test_checkpoint_of_another_configuration(run, tmp_path):
    run_tiny(tmp_path / "other", "model.mlp=24")
    for path in checkpoints(run / "checkpoints"):
        shutil.rmtree(path)
    theirs = checkpoints(tmp_path / "other" / "checkpoints")[-1]
    ours = run / "checkpoints" / theirs.name
    shutil.copytree(theirs, ours)
    before = contents(run)
    assert f"{ours} is foreign" in refused("train", run, after_start=True)
    assert f"{ours} is foreign" in refused("eval", run)
    assert contents(run) == before


def test_checkpoint_of_another_program(run):
    newest = checkpoints(run / "checkpoints")[-1]
    (newest / "state.json").write_text(json.dumps({"format": "pytorch", "step": 6}))
    before = contents(run)
    for name in ("train", "eval"):
        message = refused(name, run, after_start=name == "train")
        assert f"{newest} is foreign: its format is 'pytorch'" in message
    assert contents(run) == before


def test_no_disk_space_keeps_the_previous_checkpoint(half_way, trained):
    """Files may not grow beyond 200 kB: logs fit, a checkpoint does not."""
    limit = 200_000
    saved = load_newest(half_way / "checkpoints")
    assert (saved.path / "tensors.safetensors").stat().st_size > limit
    result = subprocess.run(
        [sys.executable, "-m", "lvrpo", "train", half_way, "--no-report"],
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
        capture_output=True,
        text=True,
    )
    assert result.returncode == 2, result.stderr
    last = result.stderr.splitlines()[-1]
    assert last.startswith(f"lvrpo: {half_way}/checkpoints/step-00000006: ")
    assert last.endswith("the checkpoints before it are kept")
    assert "Traceback" not in result.stderr
    assert load_newest(half_way / "checkpoints").step == saved.step
    assert command("train", half_way, "--no-report").exit_code == 0
    assert_same_run(half_way, trained)


REWARDS = """
import json, time

def raises(samples):
    raise RuntimeError("the service is down")

def nan(samples):
    return [1.0] * (len(samples) - 1) + [float("nan")]

def infinite(samples):
    return [1.0] * (len(samples) - 1) + [float("inf")]

def short(samples):
    return [1.0]

def one_number(samples):
    return 0.5

def texts_only(samples):
    return [None if text is None else 1.0 for text in samples.texts]

def below(samples):
    return [json.loads("no JSON") for text in samples.texts]

def leaves(samples):
    raise SystemExit(0)

def later(samples):
    if len(samples) == 6:  # of a step, not of the eight that are tried before
        raise RuntimeError("the service is down")
    return [1.0] * len(samples)

def sleeps(samples):
    while len(samples) == 6:
        time.sleep(3600)
    return [1.0] * len(samples)

def spins(samples):
    while len(samples) == 6:
        pass
    return [1.0] * len(samples)

def picky(samples):
    if len(samples) in (3, 6) and samples.images[0].mean() > samples.images[-1].mean():
        raise ConnectionError("the service is down")
    return [1.0] * len(samples)
"""
BAD_REWARDS = {
    "raises": "reward 'raises' raised RuntimeError: the service is down, first prompt 'train/gen",
    "nan": "reward 'nan' is NaN for sample 7 (a drawing) of prompt 'train/generate",
    "infinite": "reward 'infinite' is infinite for sample 7 (a drawing) of prompt 'train/generate",
    "short": "reward 'short' returned shape (1,) for 8 samples, expected one number each, at",
    "one_number": "returned float 0.5, expected one number per sample (8), at",
    "texts_only": "rewards.generate: no reward (mine.py:texts_only) has a score for any",
    "below": "mine.py:23 (from {json}:",
    "leaves": "reward 'leaves' raised SystemExit: 0",
}


def own_reward_overrides(folder: Path, name: str) -> list[str]:
    (folder / "mine.py").write_text(REWARDS)
    return settings([*OVERRIDES, f"rewards.generate={{ '{folder}/mine.py:{name}' = 1.0 }}"])


@pytest.mark.parametrize(("name", "message"), BAD_REWARDS.items())
def test_a_reward_function_that_fails_is_met_before_the_start(tmp_path, name, message):
    overrides = own_reward_overrides(tmp_path, name)
    found = refused("train", tmp_path / "run", *overrides)
    assert message.format(folder=tmp_path, json=json.decoder.__file__) in found
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["raises", "nan", "short", "leaves"])
def test_what_says_what_is_right_is_met_before_the_start(tmp_path, name):
    overrides = own_reward_overrides(tmp_path, "later")
    overrides += settings([f"rewards.right={{ generate = '{tmp_path}/mine.py:{name}' }}"])
    found = refused("train", tmp_path / "run", *overrides)
    assert BAD_REWARDS[name] in found
    assert not (tmp_path / "run").exists()


def test_a_reward_function_that_fails_in_a_step(tmp_path):
    overrides = own_reward_overrides(tmp_path, "later")
    message = "reward 'later' raised RuntimeError: the service is down, first prompt 'test/gen"
    run = tmp_path / "run"
    assert message in refused("train", run, *overrides, after_start=True)
    # What was reached before it is there, and the second attempt says the same.
    assert load_newest(run / "checkpoints").step == 3
    before = contents(run / "checkpoints")
    assert message in refused("train", run, after_start=True)
    assert contents(run / "checkpoints") == before


@pytest.mark.parametrize("name", ["sleeps", "spins"])
def test_a_reward_function_that_hangs_ends_the_run_and_the_process(tmp_path, name):
    """The thread that is left behind keeps neither the error nor the end of the process back."""
    overrides = own_reward_overrides(tmp_path, name)
    run = tmp_path / "run"
    ended = subprocess.run(
        [sys.executable, "-m", "lvrpo", "train", run, *overrides, "-s", "rewards.timeout=1"],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert ended.returncode == 2, ended.stderr
    last = ended.stderr.splitlines()[-1]
    assert f"reward '{name}' took longer than 1 s (rewards.timeout), first prompt 'test/" in last
    assert "mine.py:" in last
    assert load_newest(run / "checkpoints").step == 3


def test_a_reward_function_that_fails_is_no_signal_if_asked(tmp_path):
    """Calls fail by chance; the run goes on, says so once, and logs for how many samples."""
    overrides = own_reward_overrides(tmp_path, "picky")
    name = f"{tmp_path}/mine.py:picky"
    both = settings(
        [
            f"rewards.generate={{ r_ins = 1.0, '{name}' = 1.0 }}",
            "rewards.max_failures=1",
            "run.steps=8",
        ]
    )
    result = command("train", tmp_path / "run", *overrides, *both)
    assert result.exit_code == 0, result.output
    rows = [row for row in read_metrics(tmp_path / "run") if row["phase"] == "grpo"]
    shares = [row["failed/generate/mine.py:picky"] for row in rows]
    assert len(shares) == 8
    assert 0 < max(shares) <= 1
    assert set(shares) <= {0.0, 0.5, 1.0}
    said = [line for line in result.output.splitlines() if "'picky' raised" in line]
    assert len(said) == 1
    assert "mine.py:" in said[0]


def test_a_rollout_that_the_update_cannot_reproduce(tmp_path, monkeypatch):
    sample_texts = UnifiedPolicy.sample_texts

    def misreport(*arguments, **options):
        answers = sample_texts(*arguments, **options)
        return dataclasses.replace(answers, logprobs=answers.logprobs - 0.01)

    monkeypatch.setattr(UnifiedPolicy, "sample_texts", misreport)
    message = refused("train", tmp_path / "run", tiny=True, after_start=True)
    assert message.startswith("self test: ratio/text/max is 1.01")
    assert "before the first update" in message
    assert load_newest(tmp_path / "run" / "checkpoints").step == 3


def test_a_rollout_with_another_schedule(tmp_path, monkeypatch):
    gather = loop.gather_experience

    def with_another(policy, task, rewards, config, schedule, *others):
        other = dataclasses.replace(schedule, shift=2.0)
        return gather(policy, task, rewards, config, other, *others)

    monkeypatch.setattr(loop, "gather_experience", with_another)
    message = refused("train", tmp_path / "run", tiny=True, after_start=True)
    assert message.startswith("pictures were sampled with schedule ")
