"""A user's own questions, pictures and reward, from the file to the drawing."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from PIL import Image
from runs.own_data import write_own_data
from runs.tiny import OVERRIDES, command, settings, tiny_config

from lvrpo.data.jsonl import DataError, JsonlExamples
from lvrpo.data.sources import FileSource, JsonlSource, LabelErrors
from lvrpo.data.words import common_words
from lvrpo.models.unified.tokenizer import Tokenizer
from lvrpo.report import charts
from lvrpo.rewards.reward import Samples
from lvrpo.runs.gallery import load_gallery
from lvrpo.runs.inference import load_policy
from lvrpo.runs.log import read_evals, read_metrics
from lvrpo.runs.preflight import check_config
from lvrpo.runs.scores import eval_rewards
from lvrpo.runs.setup import Setup, data_of
from lvrpo.trainer.config import ConfigError, DataSection
from lvrpo.trainer.evaluate import EVALUATION_STEP
from lvrpo.trainer.schedule import flow_schedule


@pytest.fixture(scope="module")
def own(tmp_path_factory) -> Path:
    """A folder with the data, and the finished run on it."""
    folder = tmp_path_factory.mktemp("own")
    overrides = settings([*OVERRIDES, *write_own_data(folder)])
    result = command("train", folder / "run", *overrides)
    assert result.exit_code == 0, result.output
    return folder


def test_the_run_learns_from_the_users_reward(own):
    rows = read_metrics(own / "run")
    assert [row["phase"] for row in rows] == ["warm_start"] * 3 + ["grpo"] * 3
    for row in rows[3:]:
        assert 0 <= row["reward/generate/reward.py:brightness"] <= 1
        assert row["share/generate/reward.py:brightness"] == pytest.approx(1, abs=1e-4)
        assert row["grad_norm"] > 0
    panels = charts._by_task(rows, "reward")
    assert {task: list(names.values()) for task, names in panels.items()} == {
        "understand": ["r_ins"],
        "generate": ["reward.py:brightness"],
    }


def test_a_fork_has_the_users_reward_as_it_is_now(own, tmp_path):
    other = tmp_path / "other.py"
    other.write_text((own / "reward.py").read_text())
    changed = "-s", f"rewards.generate={{ '{other}:brightness' = 1.0 }}"
    for name, flags in (("same", ()), ("control", ("--shuffle-rewards",)), ("other", changed)):
        fork = command("train", tmp_path / name, "--from", own / "run", "--no-report", *flags)
        assert fork.exit_code == 0, fork.output
        assert command("train", tmp_path / name, "--steps", 4, "--no-report").exit_code == 0
    other.write_text(other.read_text() + "\n")
    result = command("train", tmp_path / "other", "--steps", 5)
    assert result.exit_code == 2
    assert "the code in" in result.stderr


def test_drawings_without_a_rule_are_neither_right_nor_wrong(own):
    for row in read_evals(own / "run"):
        assert row["understand/total"] == 3
        assert not any(key.startswith("generate") for key in row)
    verdicts = {
        (item.task, item.right) for items in load_gallery(own / "run").values() for item in items
    }
    assert ("generate", None) in verdicts
    assert verdicts <= {("generate", None), ("understand", True), ("understand", False)}
    page = (own / "run" / "report.html").read_text()
    assert "draw a dark square number 0 of test" in page


def test_drawings_without_a_rule_are_scored_by_the_users_reward_before_and_after(own):
    name = "reward.py:brightness"
    before, after = (eval_rewards(row) for row in read_evals(own / "run"))
    for means in (before, after):
        assert set(means) == {("understand", "r_ins"), ("generate", name)}
        assert means["generate", name].count == 3
        assert 0 <= means["generate", name].value <= 1
    # The gallery holds the last evaluation's drawings, at 8 bits.
    pictures = [item for item in load_gallery(own / "run")["after"] if item.task == "generate"]
    assert len(pictures) == 3
    page = (own / "run" / "report.html").read_text()
    assert "reward.py:brightness" in page
    assert "Rewards, mean over the held-out samples" in page
    result = command("eval", own / "run")
    trained = [line for line in result.stdout.splitlines() if line.startswith("as trained")]
    line = next(line for line in trained if name in line)
    assert f" {after['generate', name].value:.4g} " in line
    assert line.endswith("of 3")


def test_a_reward_says_what_is_counted_right(tmp_path):
    overrides = [*OVERRIDES, *write_own_data(tmp_path)]
    graded = f"{tmp_path / 'reward.py'}:brightness"
    setup = Setup(tiny_config(*overrides, f"rewards.right={{ generate = '{graded}' }}"))
    asked = setup.data.source.examples("test", "generate", 1, 0)
    light = "light" in asked[0].prompt
    drawings = torch.stack([torch.full((3, 16, 16), float(shade)) for shade in (light, not light)])
    scores = setup.checks.scores(Samples.of_images([*asked, *asked], drawings))
    assert scores["right"].tolist() == [1, 0]


def test_what_is_right_is_not_said_by_a_reward_that_a_run_makes(tmp_path):
    overrides = [*OVERRIDES, *write_own_data(tmp_path), "rewards.right={ understand = 'r_kn' }"]
    with pytest.raises(ConfigError, match=r"rewards\.right\.understand is 'r_kn', which is made"):
        check_config(tiny_config(*overrides))


def test_drawings_alone_have_a_result(tmp_path):
    """No question, no rule: the user's reward is all that can tell."""
    overrides = write_own_data(tmp_path)
    for name in ("train.jsonl", "test.jsonl"):
        rows = (tmp_path / name).read_text().splitlines(keepends=True)
        (tmp_path / name).write_text("".join(row for row in rows if "answer" not in row))
    config = [*OVERRIDES, *overrides, "rollout.understand_prompts=0"]
    result = command("train", tmp_path / "run", *settings(config))
    assert result.exit_code == 0, result.output
    assert "digits" not in result.stderr
    _, after = read_evals(tmp_path / "run")
    ((key, mean),) = eval_rewards(after).items()
    assert key[0] == "generate"
    # By hand: how light three drawings as trained are, against what their prompts ask for.
    setup, _, policy = load_policy(tmp_path / "run")
    prompts = setup.data.source.examples("test", "generate", 9, 0)
    schedule = flow_schedule(setup.config.rollout)
    drawn = policy.sample_images(prompts, 1, schedule, seed=0, step=EVALUATION_STEP).images
    scores = [
        1 - abs(("light" in example.prompt) - float(image.mean()))
        for example, image in zip(prompts, drawn, strict=True)
    ]
    assert len(scores) == mean.count == 3
    assert mean.value == pytest.approx(np.mean(scores), abs=1e-5)
    assert mean.error == pytest.approx(np.std(scores, ddof=1) / np.sqrt(3), abs=1e-5)
    page = (tmp_path / "run" / "report.html").read_text()
    assert "cannot say whether the model got better" not in page
    shown = command("eval", tmp_path / "run").stdout
    assert all(" generate   reward" in line for line in shown.splitlines())


def test_eval_on_another_file(own, tmp_path):
    result = command("eval", own / "run", "--data", own / "test.jsonl")
    assert result.exit_code == 0, result.output
    assert " understand right " in result.stdout
    assert " generate   right " not in result.stdout  # no rule, nothing to count
    # A file with a rule, relative to its own folder.
    rule = {"kind": "layout", "rows": 2, "cols": 2, "digits": [3, None, None, None]}
    row = {"task": "generate", "prompt": "draw 3 at top-left", "rule": rule}
    (tmp_path / "rules.jsonl").write_text(json.dumps(row))
    result = command("eval", own / "run", "--data", tmp_path / "rules.jsonl")
    assert re.search(" generate   right .* of 1\n", result.stdout)


def test_sample_draws_in_colour_and_answers(own, tmp_path):
    result = command("sample", own / "run", "draw a dark square", "-o", tmp_path / "drawn.png")
    assert result.exit_code == 0, result.output
    with Image.open(tmp_path / "drawn.png") as picture:
        assert (picture.mode, picture.size) == ("RGB", (128, 128))
    result = command(
        "sample", own / "run", "is it dark or light", "--image", own / "test-q0.png", "-n", 4
    )
    assert result.exit_code == 0, result.output
    assert len(result.stdout.split("\n")) == 5


def source_of(folder: Path, *changes: str) -> JsonlSource:
    return check_config(tiny_config(*write_own_data(folder), *changes)).data.source


def test_every_prompt_comes_once_before_any_comes_again(tmp_path):
    source = source_of(tmp_path)
    for count in (1, 6, 7, 12):
        drawn = [example.uid for example in source.examples("train", "generate", count, 3)]
        times = [drawn.count(uid) for uid in set(drawn)]
        assert len(drawn) == count
        assert max(times) - min(times) <= 1 or count < 6
        assert max(times) == -(-count // 6)
    orders = [[e.uid for e in source.examples("train", "generate", 6, seed)] for seed in (1, 1, 2)]
    assert orders[0] == orders[1] != orders[2]


class Numbers:
    """A file of a thousand million lines."""

    def __getitem__(self, index: int) -> int:
        return index


@hypothesis_settings(max_examples=200, deadline=None)
@given(lines=st.integers(1, 40), count=st.integers(0, 100), seed=st.integers(0, 5))
def test_a_prompt_comes_again_only_after_all_others(lines, count, seed):
    source = object.__new__(JsonlSource)
    source.train = Numbers()
    drawn = source._draw(range(lines), "generate", count, seed)
    assert len(drawn) == count
    assert drawn == source._draw(range(lines), "generate", count, seed)
    for start in range(0, count, lines):
        part = drawn[start : start + lines]
        assert len(set(part)) == len(part)


def test_a_draw_costs_what_is_drawn_and_favours_no_line():
    source = object.__new__(JsonlSource)
    source.train = Numbers()
    # A permutation of these would take 8 GB.
    drawn = source._draw(range(10**9), "generate", 64, 0)
    assert len(set(drawn)) == 64
    counts = np.zeros((3, 10), int)
    for seed in range(2000):
        for place, line in enumerate(source._draw(range(10), "generate", 3, seed)):
            counts[place, line] += 1
    # 2000 draws, a tenth each: six standard deviations of a binomial.
    assert np.abs(counts - 200).max() < 6 * np.sqrt(2000 * 0.1 * 0.9)


def test_the_same_wording_in_both_files_is_a_note(tmp_path):
    overrides = write_own_data(tmp_path)
    for name in ("train", "test"):
        path = tmp_path / f"{name}.jsonl"
        path.write_text(re.sub(r" number \d of \w+", "", path.read_text()))
    config = tiny_config(*overrides)
    setup = check_config(config)
    (note,) = setup.data.notes()
    assert note.startswith("3 of 3 held-out drawing prompts are training prompts word for word")
    assert "'draw a dark square' for one" in note
    assert note in setup.notes(setup.frozen_parts(tmp_path / "run"))
    # The same target as well is an overlap.
    (tmp_path / "test-t0.png").write_bytes((tmp_path / "train-t0.png").read_bytes())
    with pytest.raises(
        ConfigError, match="'test:2' of test is also 'train:2' of train: the same w"
    ):
        check_config(config)


def test_labels_of_a_file_are_taken_as_they_are(tmp_path):
    groups = source_of(tmp_path).labelled("understand", 6, LabelErrors(1.0, 1.0), 0, copies=2)
    shown = {example.prompt for group in groups for example in group}
    assert shown == {"is it dark or light"}
    for first, second in groups:
        assert first is second
        assert (first.image.mean() > 0.5) == (first.answer == "light")


def test_words_of_the_training_file_are_tokens_and_the_rest_is_spelled(tmp_path):
    parts = Setup(tiny_config(*write_own_data(tmp_path))).unfitted_parts()
    tokenizer = Tokenizer(parts.family.words)
    low, high = parts.family.answer_range
    assert all(low <= token < high for token in tokenizer.encode("dark light \u00e9tude"))
    assert len(tokenizer.encode("dark light")) == 2
    assert common_words(["b a a", "a-c b!"]) == ["a", "b", "a-c"]
    assert common_words(["рубашка", "t-shirt рубашка"]) == ["рубашка", "t-shirt"]


def test_questions_alone_are_enough(tmp_path):
    """Without target pictures the latents are fitted on the pictures that are asked about."""
    overrides = write_own_data(tmp_path)
    for name in ("train.jsonl", "test.jsonl"):
        rows = (tmp_path / name).read_text().splitlines(keepends=True)
        (tmp_path / name).write_text("".join(row for row in rows if "answer" in row))
    config = tiny_config(*overrides, "rollout.generate_prompts=0")
    setup = check_config(config)
    shown = setup.data.source.examples("train", "understand", 6, 0)
    pictures = np.stack([example.image for example in shown])
    autoencoder = setup.frozen_parts(tmp_path / "run").family.autoencoder
    assert autoencoder.mean.mean() == pytest.approx(pictures.mean(), abs=0.02)
    result = command("train", tmp_path / "run2", *settings([*OVERRIDES, *overrides]))
    assert "set rollout.generate_prompts = 0 to train without it" in result.stderr
    # A reward of drawings that cannot be used is no obstacle where nothing is drawn.
    unused = "rewards.generate={ r_sem = 1.0 }"
    config = settings([*OVERRIDES, *overrides, "rollout.generate_prompts=0", unused])
    result = command("train", tmp_path / "run2", *config)
    assert result.exit_code == 0, result.output


def test_notes_count_the_latents_of_the_users_pictures_and_answers_that_are_cut(tmp_path):
    def notes(*changes: str) -> list[str]:
        config = tiny_config(*write_own_data(tmp_path), *changes)
        folder = tmp_path / f"run {len(changes)}"
        setup = check_config(config)
        return setup.notes(setup.frozen_parts(folder))

    (floor,) = notes()
    (finer,) = notes("model.latent_patch=4")
    assert floor != finer
    rows = (tmp_path / "train.jsonl").read_text()
    assert "max_answer_tokens" not in floor
    config = tiny_config(*write_own_data(tmp_path), "rollout.max_answer_tokens=4")
    (tmp_path / "train.jsonl").write_text(rows.replace('"dark"', '"a b c d e"'))
    setup = check_config(config)
    _, cut = setup.notes(setup.frozen_parts(tmp_path / "run 3"))
    assert cut.startswith("WARNING: 3 of 6 training answers, 'a b c d e' for one, are longer than")


def test_nothing_to_imitate(tmp_path):
    overrides = write_own_data(tmp_path)
    row = {"task": "generate", "prompt": "draw a light square"}
    (tmp_path / "train.jsonl").write_text(json.dumps(row))
    with pytest.raises(ConfigError, match=r"warm_start.steps is 3, but .* no answer and no target"):
        check_config(tiny_config(*overrides, "rollout.understand_prompts=0"))


def without_targets(folder: Path, *, questions: bool) -> list[str]:
    """Own data whose drawing prompts of the training are prompts alone."""
    overrides = write_own_data(folder)
    rows = [json.loads(row) for row in (folder / "train.jsonl").read_text().splitlines()]
    kept = [row for row in rows if questions or row["task"] == "generate"]
    for row in kept:
        row.pop("target", None)
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in kept))
    return overrides


def test_prompts_alone_can_be_drawn_beside_questions(tmp_path):
    overrides = without_targets(tmp_path, questions=True)
    result = command("train", tmp_path / "run", *settings([*OVERRIDES, *overrides]))
    assert result.exit_code == 0, result.output
    assert any("reward/generate/" in key for key in read_metrics(tmp_path / "run")[-1])


def test_without_any_picture_the_data_is_named_before_the_run_exists(tmp_path):
    overrides = without_targets(tmp_path, questions=False)
    alone = ["rollout.understand_prompts=0", "warm_start.steps=0"]
    result = command("train", tmp_path / "run", *settings([*OVERRIDES, *overrides, *alone]))
    assert result.exit_code == 2
    assert "data.source is " in result.stderr
    assert "expected a 'target' with some drawing prompts" in result.stderr
    assert not (tmp_path / "run").exists()


def test_pictures_larger_than_the_default_grid(tmp_path):
    config = tiny_config(
        *write_own_data(tmp_path), "data.height=96", "data.width=64", "model.latent_patch=4"
    )
    setup = check_config(config)
    policy = setup.new_policy(setup.frozen_parts(tmp_path / "run"))
    assert policy.module.config.max_grid == 24
    assert policy.latent_grid == (24, 16)
    builder = policy.builder()
    builder.noise(
        *policy.latent_grid, parent=policy.add_prompt(builder, setup.data.source.train[0])
    )
    builder.build()


def test_one_patch_of_several_tokens_is_trained_and_goes_on_and_draws(tmp_path):
    whole = ["model.latent_patch=16", "model.latent_tokens_per_patch=9", "model.latent_dim=2"]
    changes = [*OVERRIDES, *write_own_data(tmp_path), *whole]
    run = tmp_path / "run"
    result = command("train", run, *settings(changes))
    assert result.exit_code == 0, result.output
    setup, parts, policy = load_policy(run)
    assert policy.latent_grid == (1, 9)
    assert policy.module.config.max_grid == 9
    fitted = check_config(setup.config).frozen_parts(tmp_path / "again")
    for name, tensor in fitted.family.tensors().items():
        assert torch.equal(tensor, parts.family.tensors()[name])
    result = command("train", run, "--steps", setup.config.run.steps + 1)
    assert result.exit_code == 0, result.output
    result = command("sample", run, "draw a light square", "-o", tmp_path / "drawing.png")
    assert result.exit_code == 0, result.output


def test_more_numbers_of_a_patch_than_patches_to_fit_them_on_are_refused(tmp_path):
    size = ["data.height=32", "data.width=32", "model.latent_patch=32"]
    whole = [*size, "model.latent_tokens_per_patch=33", "model.latent_dim=32"]
    setup = check_config(tiny_config(*write_own_data(tmp_path), *whole))
    with pytest.raises(
        ConfigError, match=r"model\.latent_dim: .* patches for 1056 numbers of each"
    ):
        setup.frozen_parts(tmp_path / "run")


def test_a_data_section_names_its_source():
    with pytest.raises(ConfigError, match=r"data.eval_source is empty.*mine\.jsonl"):
        data_of(DataSection(source="mine.jsonl"))


@pytest.mark.parametrize("skill", ["understand", "generate"])
def test_each_split_is_its_own_file(tmp_path, skill):
    for number, name in enumerate(("train", "test", "validation")):
        Image.new("L", (16, 16), number).save(tmp_path / f"{name}.png")
        rows = [
            {"task": "understand", "prompt": "what", "image": f"{name}.png", "answer": "a"},
            {"task": "generate", "prompt": name},
        ]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    files = [
        JsonlExamples(tmp_path / f"{name}.jsonl", (1, 16, 16))
        for name in ("train", "test", "validation")
    ]
    source = JsonlSource(*files)
    for name in ("train", "test", "validation"):
        (example,) = source.examples(name, skill, 1, 0)
        assert example.uid.startswith(f"{name}:")
    with pytest.raises(DataError, match=r"data\.validation_source is empty, expected the JSONL"):
        JsonlSource(*files[:2]).examples("validation", skill, 1, 0)
    assert FileSource(files[0]).examples("test", skill, 1, 0)
