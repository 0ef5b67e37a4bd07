"""From samples to advantages: rewards, the shuffled control, and what is said aloud."""

from __future__ import annotations

import dataclasses
import math
import threading

import pytest
import torch
from runs.tiny import OVERRIDES, run_tiny, tiny_config

from lvrpo import normalize_advantages
from lvrpo.models.protocol import Answers
from lvrpo.models.unified.policy import UnifiedPolicy
from lvrpo.models.unified.tokenizer import EOS
from lvrpo.params.advantages import ADVANTAGE_PRESETS, AdvantageParams
from lvrpo.rewards.reward import FunctionReward, RewardError
from lvrpo.runs.config_file import load_config
from lvrpo.runs.log import read_evals, read_metrics
from lvrpo.runs.setup import Setup
from lvrpo.trainer.correction import distribution_notes
from lvrpo.trainer.experience import gather_experience, shuffle_within_groups
from lvrpo.trainer.schedule import flow_schedule
from lvrpo.trainer.task import Task

#: (reward - mean) / (standard deviation + 1e-4), of the group alone.
PAPER = "rewards.advantage=paper"
REWARDS = torch.arange(12.0)[:, None] * torch.tensor([1.0, -1.0])  # 3 groups of 4, 2 rewards


def test_shuffling_permutes_the_samples_of_each_group():
    shuffled = shuffle_within_groups(REWARDS, 4, seed=0, step=1, skill="text")
    assert not torch.equal(shuffled, REWARDS)
    assert torch.equal(shuffled[:, 0], -shuffled[:, 1])  # a sample's rewards stay together
    for group, original in zip(shuffled.split(4), REWARDS.split(4), strict=True):
        assert sorted(group[:, 0].tolist()) == original[:, 0].tolist()


def test_shuffling_is_keyed_by_what_it_is_for():
    def shuffled(seed=0, step=1, skill="generate"):
        rewards = torch.arange(64.0)[:, None]
        return shuffle_within_groups(rewards, 8, seed, step, skill).flatten().tolist()

    assert shuffled() == shuffled()
    others = [shuffled(seed=1), shuffled(step=2), shuffled(skill="understand")]
    assert all(other != shuffled() for other in others)


def test_shuffling_is_uniform():
    places = torch.stack(
        [
            shuffle_within_groups(torch.arange(3.0)[:, None], 3, 0, step, "text").flatten()
            for step in range(600)
        ]
    )
    for sample in range(3):
        counts = (places == sample).sum(dim=0)
        assert ((counts - 200).abs() < 5 * math.sqrt(600 * 2 / 9)).all()


def test_shuffling_carries_rewards_that_do_not_apply():
    rewards = REWARDS.clone()
    rewards[5, 1] = math.nan
    shuffled = shuffle_within_groups(rewards, 4, 0, 1, "text")
    (at,) = shuffled[:, 1].isnan().nonzero().flatten().tolist()
    assert 4 <= at < 8
    assert shuffled[at, 0] == 5


@pytest.fixture(scope="module")
def task(tmp_path_factory) -> Task:
    setup = Setup(tiny_config())
    return setup.task(setup.frozen_parts(tmp_path_factory.mktemp("task")))


def gather(task, *overrides, score=None, texts=None):
    """One step of a fresh model, its drawings scored by `score` and its answers by `texts`."""
    config = tiny_config(*overrides)
    policy = task.new_policy()
    rewards = dict(task.make_rewards(policy))
    if score is not None:
        names = config.rewards.generate
        rewards["generate"] = {name: FunctionReward(score, name, True) for name in names}
    if texts is not None:
        rewards["understand"] = {"r_ins": FunctionReward(texts, "r_ins")}
    schedule = flow_schedule(config.rollout)
    checked = dataclasses.replace(task, checks=Setup(config).checks)
    return gather_experience(policy, checked, rewards, config, schedule, step=4)


def test_advantages_are_of_the_group(task):
    scores = [1.0, 2.0, 6.0, 5.0, 5.0, 5.0]
    found, metrics = gather(task, "rewards.advantage=paper", score=lambda samples: scores)
    first, second = found.picture_advantages.split(3)
    deviation = torch.tensor(scores[:3]).std() + 1e-4
    torch.testing.assert_close(first, (torch.tensor(scores[:3]) - 3) / deviation)
    assert not second.any()
    assert metrics["reward/generate/r_ins"] == pytest.approx(4)
    assert metrics["constant_groups/generate/r_ins"] == 0.5
    assert metrics["constant_groups/generate"] == 0.5
    assert metrics["share/generate/r_ins"] == pytest.approx(1, abs=1e-4)
    assert not any("generate" in alarm for alarm in metrics["alarm"])


@pytest.mark.parametrize("name", ADVANTAGE_PRESETS)
def test_every_estimator_of_the_configuration(task, name):
    """Of both modalities, with the lengths of the answers; a drawing is as long as any other."""

    def given(count: int) -> torch.Tensor:
        return torch.arange(count) * 7 % 5 + torch.arange(count) % 2.0

    found, _ = gather(
        task,
        "rollout.understand_prompts=24",
        f"rewards.advantage={name}",
        "loss.advantage_clip=1.5",
        "rewards.truncated=keep",
        score=lambda samples: given(len(samples)),
        texts=lambda samples: given(len(samples)),
    )
    lengths = [len(ids) for ids in found.answers.token_ids]
    assert len(set(lengths)) > 1
    params = AdvantageParams.preset(name, clip=1.5)
    for advantages, tokens in (
        (found.answer_advantages, lengths),
        (found.picture_advantages, [1] * 6),
    ):
        rewards = given(len(tokens))
        expected = normalize_advantages(rewards, 3, lengths=tokens, params=params).values
        torch.testing.assert_close(advantages, expected)
        assert advantages.any()


def test_the_bound_of_an_advantage_holds_for_both_modalities(task):
    scores = [0.0, 0.0, 9.0, 1.0, 1.0, 1.0]
    bound = [PAPER, "rewards.truncated=keep", "loss.advantage_clip=0.25"]
    found, _ = gather(task, *bound, score=lambda s: scores, texts=lambda s: scores)
    for advantages in (found.answer_advantages, found.picture_advantages):
        assert advantages.abs().max() == 0.25


def test_the_sampler_is_corrected_before_the_first_update(task):
    plain, metrics = gather(task)
    assert plain.token_weights is None
    assert not any(key.startswith("sampler/") for key in metrics)
    found, metrics = gather(task, "loss.sampler_correction=tis")
    # The sampler was the policy itself, up to the rounding of another layout.
    torch.testing.assert_close(found.answers.logprobs, plain.answers.logprobs)
    torch.testing.assert_close(found.token_weights, torch.ones(len(found.answers.logprobs)))
    assert metrics["sampler/gap_max"] < 1e-4
    assert metrics["sampler/dropped"] == 0


def test_what_sampling_cut_is_measured_and_weighed(task):
    """A token's weight under TIS is the mass that was kept: sampled more often, it counts less."""
    cut = ["rollout.top_k=7", "rollout.generate_prompts=0"]
    plain, metrics = gather(task, *cut)
    assert plain.token_weights is None
    kept = plain.answers.sampled_from.kept_mass
    assert 0 < kept.min() < kept.max() < 1
    assert metrics["sampler/kept_mass"] == pytest.approx(float(kept.mean()))
    assert metrics["sampler/differs"] == 1
    found, metrics = gather(task, *cut, "loss.sampler_correction=tis")
    assert found.answers.token_ids == plain.answers.token_ids
    torch.testing.assert_close(found.token_weights, kept.to(found.token_weights.dtype))
    assert "sampler/kept_mass" in metrics


@pytest.mark.parametrize("correction", ["", "tis"])
def test_what_sampling_cut_is_said(correction):
    config = tiny_config("rollout.top_p=0.9", f"loss.sampler_correction={correction}")
    (note,) = distribution_notes(config)
    assert "rollout.top_p changed" in note
    assert ("would weigh" in note) == (not correction)
    assert distribution_notes(tiny_config("rollout.stop=['x']")) == []
    both = tiny_config("rollout.min_answer_tokens=1", "rollout.min_p=0.1")
    assert "rollout.min_answer_tokens, rollout.min_p" in distribution_notes(both)[0]
    drawing = tiny_config("rollout.top_p=0.9", "rollout.understand_prompts=0")
    assert distribution_notes(drawing) == []


def test_groups_are_the_samples_of_one_prompt(task):
    seen = []
    gather(task, score=lambda samples: seen.extend(samples.examples) or range(len(samples)))
    uids = [example.uid for example in seen]
    assert uids[:3] == [uids[0]] * 3 != uids[3:] == [uids[3]] * 3


def test_an_alarm_when_nothing_can_be_learned(task):
    _, metrics = gather(task, score=lambda samples: [0.5] * len(samples))
    assert "every generate advantage is zero: this step teaches nothing" in metrics["alarm"]
    assert metrics["constant_groups/generate"] == 1


def failing_for(groups):
    """A reward that fails wherever it sees a drawing of one of these groups of three."""
    order: list[str] = []

    def score(samples):
        order.extend(e.uid for e in samples.examples if e.uid not in order)
        at = [order.index(example.uid) for example in samples.examples]
        if set(at) & set(groups):
            raise ConnectionError(f"no answer about {order[at[0]]}")
        return [float(place + 10 * group) for place, group in enumerate(at)]

    return score


@pytest.mark.parametrize("groups", [(), (0,), (1,), (0, 1)])
@pytest.mark.parametrize("most", [0.49, 0.5, 1.0])
def test_a_failing_reward_is_no_signal_up_to_a_bound(task, groups, most):
    """It costs the groups it fails for; the other keeps the advantages of three scores in a row."""
    settings = [PAPER, f"rewards.max_failures={most}"]
    share = len(groups) / 2
    score = failing_for(groups)
    if share > most:
        with pytest.raises(RewardError, match=rf"ConnectionError: no answer .*{share:.0%} of the"):
            gather(task, *settings, score=score)
        return
    found, metrics = gather(task, *settings, score=score)
    assert metrics["failed/generate/r_ins"] == metrics["unscored/generate"] == share
    assert metrics["failed/understand/r_ins"] == 0
    alarms = [alarm for alarm in metrics["alarm"] if "reward 'r_ins' raised" in alarm]
    assert len(alarms) == (1 if groups else 0)  # once, whatever it failed on
    step = 1 / (1 + 1e-4)  # of 0, 1, 2 with a standard deviation of 1
    for group, advantages in enumerate(found.picture_advantages.split(3)):
        expected = [0.0] * 3 if group in groups else [-step, 0.0, step]
        torch.testing.assert_close(advantages, torch.tensor(expected))


def test_by_default_a_failing_reward_ends_the_run(task):
    with pytest.raises(RewardError, match="reward 'r_ins' raised ConnectionError: no answer"):
        gather(task, score=failing_for({0}))


def test_a_late_reward_is_no_signal(task):
    release = threading.Event()
    settings = ["rewards.max_failures=0.5", "rewards.timeout=0.1"]
    try:
        with pytest.raises(RewardError, match=r"took longer than 0.1 s .* 100% of the samples"):
            gather(task, *settings, score=lambda samples: release.wait())
        _, metrics = gather(
            task, *settings, "rewards.max_failures=1", score=lambda samples: release.wait()
        )
        assert metrics["failed/generate/r_ins"] == 1
    finally:
        release.set()


def test_a_sample_without_a_score_has_no_advantage_and_is_not_counted(task):
    """Its group's others have those of a group without it."""
    found, metrics = gather(task, PAPER, score=lambda samples: [1.0, None, 2.0, None, None, None])
    deviation = math.sqrt(0.5) + 1e-4
    expected = torch.tensor([-0.5 / deviation, 0, 0.5 / deviation, 0, 0, 0])
    torch.testing.assert_close(found.picture_advantages, expected)
    assert metrics["unscored/generate"] == pytest.approx(4 / 6)


ONE_TOKEN = "rollout.max_answer_tokens=1"


def cut_answers(monkeypatch, task, *overrides):
    """One step in which every answer is right, and cut before it could end."""

    def sample(policy, examples, group_size, **_):
        ids = [policy.tokenizer.encode(e.answer) for e in examples for _ in range(group_size)]
        texts = [example.answer for example in examples for _ in range(group_size)]
        logprobs = torch.full((sum(map(len, ids)),), -1.0)
        reasons = ["length"] * len(ids)
        return Answers(list(examples), group_size, ids, texts, logprobs, reasons)

    monkeypatch.setattr(UnifiedPolicy, "sample_texts", sample)
    return gather(task, ONE_TOKEN, "rollout.generate_prompts=0", *overrides)


def test_a_cut_answer_is_not_right(task, monkeypatch):
    found, metrics = cut_answers(monkeypatch, task)
    assert metrics["truncated/understand"] == 1
    assert metrics["reward/understand/r_ins"] == metrics["strict/understand"] == 0
    assert not found.answer_advantages.any()
    _, metrics = cut_answers(monkeypatch, task, "rewards.truncated=keep")
    assert metrics["reward/understand/r_ins"] == metrics["strict/understand"] == 1
    assert metrics["truncated/understand"] == 1


def test_with_one_token_only_an_empty_answer_ends(task):
    """Whatever the policy says: of answers that are cut none is right."""
    found, metrics = gather(task, ONE_TOKEN, "rollout.understand_prompts=24")
    assert set(found.answers.finish_reasons) <= {"end", "length"}
    cut = [reason == "length" for reason in found.answers.finish_reasons]
    assert metrics["truncated/understand"] == pytest.approx(sum(cut) / len(cut))
    assert sum(cut) > len(cut) / 2
    assert metrics["reward/understand/r_ins"] == 0


def test_masked_answers_are_left_out_of_the_update(task, monkeypatch):
    """Advantages and tokens are those of the groups without them; a group may be empty."""
    lengths = [[2, 4, 3], [4, 4, 4]]  # 4 is cut
    scores = [1.0, 9.0, 3.0, 1.0, 2.0, 3.0]

    def sample(policy, examples, group_size, **_):
        ids = [[*range(300, 299 + n), 299 + n if n == 4 else EOS] for g in lengths for n in g]
        logprobs = torch.arange(float(sum(map(len, ids))))
        reasons = ["length" if n == 4 else "end" for g in lengths for n in g]
        texts = [f"text {i}" for i in range(6)]
        return Answers(list(examples), 3, ids, texts, logprobs, reasons)

    monkeypatch.setattr(UnifiedPolicy, "sample_texts", sample)
    mask = [PAPER, "rewards.truncated=mask", "rollout.generate_prompts=0"]
    found, metrics = gather(task, *mask, texts=lambda samples: scores)
    answers = found.answers
    assert answers.texts == ["text 0", "text 2"]
    ((_, tokens),) = answers.groups()
    assert tokens == answers.token_ids == [[300, EOS], [300, 301, EOS]]
    assert answers.logprobs.tolist() == [0, 1, 6, 7, 8]
    deviation = math.sqrt(2) + 1e-4
    torch.testing.assert_close(
        found.answer_advantages, torch.tensor([-1 / deviation, 1 / deviation])
    )
    assert metrics["truncated/understand"] == metrics["unscored/understand"] == pytest.approx(4 / 6)

    lengths[0] = [4, 4, 4]
    found, metrics = gather(task, *mask, texts=lambda samples: scores)
    assert found.answers.groups() == found.answers.texts == []


def test_a_run_whose_every_answer_is_masked_goes_on(tmp_path):
    """There is nothing to learn from, which is said, and nothing breaks."""
    alone = ["rollout.generate_prompts=0", "rewards.truncated=mask", ONE_TOKEN]
    assert run_tiny(tmp_path / "run", *alone)
    rows = [row for row in read_metrics(tmp_path / "run") if row["phase"] == "grpo"]
    assert all(row["truncated/understand"] > 0.5 for row in rows)
    assert all(row["unscored/understand"] == row["truncated/understand"] for row in rows)
    assert "every understand advantage is zero: this step teaches nothing" in rows[0]["alarm"]
    before, after = read_evals(tmp_path / "run")
    assert before["truncated/understand"] > 0.5
    assert before["understand/correct"] == after["understand/correct"] == 0


def test_shuffled_rewards_are_the_same_scores_in_other_places(task):
    scores = [1.0, 2.0, 6.0, 5.0, 7.0, 1.0]
    plain, _ = gather(task, score=lambda samples: scores)
    control, _ = gather(task, "run.shuffle_rewards=true", score=lambda samples: scores)
    assert plain.pictures.images.equal(control.pictures.images)
    assert not torch.equal(plain.picture_advantages, control.picture_advantages)
    for ours, theirs in zip(
        control.picture_advantages.split(3), plain.picture_advantages.split(3), strict=True
    ):
        torch.testing.assert_close(ours.sort().values, theirs.sort().values)


def test_one_modality_alone(task):
    found, metrics = gather(task, "rollout.understand_prompts=0")
    assert found.answers is None
    assert not any("understand" in key for key in metrics)
    found, metrics = gather(task, "rollout.generate_prompts=0")
    assert found.pictures is None
    assert not any("generate" in key for key in metrics)


def test_the_rewards_of_the_default_configuration(tmp_path):
    """r_ins, r_sem and r_kn of real digits, on a tiny model."""
    overrides = [override for override in OVERRIDES if "rewards" not in override]
    config = load_config(overrides=overrides)
    assert list(config.rewards.generate) == ["r_ins", "r_sem", "r_kn"]
    schedule = flow_schedule(config.rollout)

    def gathered():
        setup = Setup(config)
        task = setup.task(setup.frozen_parts(tmp_path))
        policy = task.new_policy()
        rewards = task.make_rewards(policy)
        return gather_experience(policy, task, rewards, config, schedule, step=4)

    found, metrics = gathered()
    assert -1 <= metrics["reward/generate/r_sem"] <= 1
    assert 0 < metrics["reward/generate/r_kn"] < 1
    shares = [metrics[f"share/generate/{name}"] for name in config.rewards.generate]
    assert sum(shares) == pytest.approx(1, abs=1e-3)
    assert found.picture_advantages.isfinite().all()
    # The encoder is kept with the run: a second process scores the same.
    _, repeated = gathered()
    for name in ("r_sem", "r_kn"):
        assert repeated[f"reward/generate/{name}"] == metrics[f"reward/generate/{name}"]
