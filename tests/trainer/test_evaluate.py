"""What is measured is what was sampled: each number against its definition, sample by sample."""

from __future__ import annotations

import math
from itertools import combinations, product
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from runs.tiny import tiny_config
from trainer.fake_family import LinearPolicy
from trainer.small_policy import prompts

from lvrpo.data.example import Example, cluster_of
from lvrpo.rewards.answers import check_answers
from lvrpo.rewards.checks import VerdictChecks
from lvrpo.rewards.reward import FunctionReward
from lvrpo.trainer import evaluate as module
from lvrpo.trainer.evaluate import Planned, evaluate, measure
from lvrpo.trainer.measurement import AS_CONFIGURED, AS_TRAINED, GREEDY, HEADLINE, LOW_NOISE
from lvrpo.trainer.sampling import (
    GROUP_SIZE,
    as_configured,
    as_trained,
    at_temperature,
    by_ode,
    frontier,
    headline,
)

CONFIG = tiny_config()
TASK = SimpleNamespace(checks=VerdictChecks(check_answers))
BLANK = np.zeros((1, 4, 4), np.float32)


class Script:
    """A policy that says and draws what it is told."""

    def __init__(self, texts=(), images=()):
        self.texts, self.images = iter(texts), iter(images)

    def sample_texts(self, examples, group_size, **_):
        texts = [next(self.texts) for _ in range(len(examples) * group_size)]
        reasons = ["length" if text == "cut" else "end" for text in texts]
        return SimpleNamespace(texts=texts, finish_reasons=reasons)

    def sample_images(self, examples, group_size, schedule, **_):
        count = len(examples) * group_size
        return SimpleNamespace(images=torch.stack([next(self.images) for _ in range(count)]))


def measured(policy, sampling, examples, rewards=None, config=CONFIG):
    planned = Planned(sampling, examples, rewards or {})
    return measure(policy, TASK, config, planned, seed=0, label="now", step=3)


def question(number, answer="1"):
    return Example("understand", f"q{number}", f"what {number}", image=BLANK, answer=answer)


TEXTS = st.sampled_from(["1", "2", "1 1", "cut", ""])
GROUPS = st.integers(2, 5).flatmap(
    lambda group: st.lists(st.lists(TEXTS, min_size=group, max_size=group), min_size=1, max_size=6)
)


@settings(max_examples=50, deadline=None)
@given(GROUPS, st.integers(1, 12))
def test_answers_are_scored_where_they_stand_whatever_is_drawn_at_once(groups, chunk):
    examples = [question(i) for i in range(len(groups))]
    texts = [text for group in groups for text in group]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "CHUNK", chunk)
        found = measured(Script(texts), at_temperature(CONFIG, 0.7, len(groups[0])), examples)
    assert found.scores["right"] == [float(text == "1") for text in texts]
    assert found.scores["truncated"] == [float(text == "cut") for text in texts]
    assert found.uids == [example.uid for example in examples]
    assert found.clusters == [cluster_of(example) for example in examples]
    for group, diversity in zip(groups, found.diversity, strict=True):
        pairs = [a != b for a, b in combinations(group, 2)]
        assert diversity == pytest.approx(sum(pairs) / len(pairs))


def test_the_diversity_of_drawings_is_a_distance():
    images = torch.rand(3, 4, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    sampling = by_ode(CONFIG, 0.5, 4)
    found = measured(Script(images=images.flatten(0, 1)), sampling, prompts("generate", 3))
    for drawn, diversity in zip(images.double(), found.diversity, strict=True):
        squares = [float((a - b).square().sum()) for a, b in combinations(drawn, 2)]
        assert diversity == pytest.approx(math.sqrt(sum(squares) / len(squares)), rel=1e-5)
    # No rule is known to the checks: nothing tells, and the rest is not there.
    assert found.scores == {"right": [None] * 12}


SCORE = st.sampled_from([None, -1.0, 0.0, 0.25, 3.0])


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(SCORE, SCORE), min_size=1, max_size=7), st.integers(1, 3))
def test_the_reward_is_the_weighted_sum_of_those_that_have_a_score(table, batch):
    """Rewards are called on parts of their own size, in order."""
    config = tiny_config(
        "rewards.understand={ first = 2.0, second = -0.5 }",
        f"rollout.understand_prompts={batch}",
    )

    def column(k):
        scores = iter([row[k] for row in table])
        return FunctionReward(lambda samples: [next(scores) for _ in samples.texts], f"r{k}")

    rewards = {"understand": {"first": column(0), "second": column(1)}}
    examples = [question(i) for i in range(len(table))]
    found = measured(
        Script(["1"] * len(table)), at_temperature(CONFIG, 1.0), examples, rewards, config
    )
    total = [
        None if row == (None, None) else 2.0 * (row[0] or 0) - 0.5 * (row[1] or 0) for row in table
    ]
    for name, expected in [
        ("reward", total),
        ("reward/first", [row[0] for row in table]),
        ("reward/second", [row[1] for row in table]),
    ]:
        known = any(score is not None for score in expected)
        assert found.scores.get(name) == (expected if known else None)


@pytest.mark.parametrize(
    "sampling",
    [
        *(at_temperature(CONFIG, t, 3) for t in (0.0, 0.3, 2.0)),
        *(by_ode(CONFIG, noise, 3) for noise in (0.0, 0.3, 1.0)),
        *(as_trained(CONFIG, skill, 3) for skill in ("understand", "generate")),
    ],
    ids=lambda sampling: f"{sampling.skill} {sampling.name}",
)
def test_a_mode_is_what_has_no_diversity(sampling):
    found = measured(LinearPolicy.fresh(), sampling, prompts(sampling.skill, 6))
    assert (max(found.diversity) < 1e-6) == (sampling.name in (GREEDY, LOW_NOISE))


@pytest.mark.parametrize("skill", ["understand", "generate"])
@pytest.mark.parametrize("temperature", [0.25, 1.0, 1.7])
@pytest.mark.parametrize(
    "more", [[], ["rollout.top_p=0.9", "eval.temperature=0.6", "eval.guidance=3"]]
)
def test_the_ways_of_a_run_have_names_and_settings_of_their_own(skill, temperature, more):
    config = tiny_config(f"rollout.temperature={temperature}", *more)
    ways = [as_trained(config, skill), headline(config, skill), *frontier(config, skill)]
    ways += as_configured(config, skill)
    keys = [(way.name, way.group_size) for way in ways]
    assert len(set(keys)) == len(keys)
    assert headline(config, skill).name == HEADLINE[skill]
    points = frontier(config, skill)
    assert all(way.group_size == GROUP_SIZE for way in points)
    assert headline(config, skill).name not in {way.name for way in points}
    assert len({tuple(way.settings.items()) for way in points}) == len(points)
    assert sum(way.name == AS_TRAINED for way in points) == 1


def test_ways_end_answers_alike_and_differ_in_what_they_sample_from():
    ends = ["rollout.stop=['x']", "rollout.stop_token_ids=[300]", "rollout.min_answer_tokens=1"]
    config = tiny_config(*ends, "rollout.top_k=9", "eval.temperature=0.6", "eval.top_p=0.9")
    ways = [as_trained(config, "understand"), headline(config, "understand")]
    ways += [*as_configured(config, "understand"), *frontier(config, "understand")]
    for way in ways:
        how = way.texts
        assert (how.stop, how.stop_token_ids, how.min_tokens) == (("x",), (300,), 1)
    settings_of = {way.name: way.settings for way in ways}
    assert settings_of[AS_TRAINED] == {"temperature": 1.0, "top_k": 9}
    assert settings_of[GREEDY] == {"temperature": 0.0}
    assert settings_of[AS_CONFIGURED] == {"temperature": 0.6, "top_p": 0.9}
    assert settings_of["temperature 1"] == {"temperature": 1.0}
    (guided,) = as_configured(tiny_config("eval.guidance=4", "eval.guidance_until=0.3"), "generate")
    assert guided.settings == {"dynamics": "ode", "start_noise": 1.0, "guidance": 4.0}
    scales = "eval.guidance=4", "eval.guidance_image=1.5"
    (edited,) = as_configured(tiny_config(*scales), "generate")
    assert edited.settings == guided.settings | {"guidance_image": 1.5}
    assert (edited.guidance.params.text_scale, edited.guidance.params.image_scale) == (4.0, 1.5)
    assert guided.guidance.until == 0.3
    assert as_configured(CONFIG, "understand") == as_configured(CONFIG, "generate") == []


@pytest.mark.parametrize(("items", "frontier_items"), list(product([0, 3], [0, 2, 5])))
def test_a_run_measures_both_ends_on_the_same_prompts(items, frontier_items):
    config = tiny_config(f"run.eval_items={items}", f"run.frontier_items={frontier_items}")
    asked = []

    def examples(split, skill, count, seed):
        asked.append((split, skill))
        return prompts(skill, count, seed)

    task = SimpleNamespace(checks=TASK.checks, source=SimpleNamespace(examples=examples))
    told = []
    found, gallery = evaluate(
        LinearPolicy.fresh(),
        task,
        {"understand": {"r_ins": FunctionReward(lambda samples: [1.0] * len(samples), "r_ins")}},
        config,
        label="after",
        step=7,
        progress=lambda done, total: told.append((done, total)),
    )
    assert set(asked) == {("test", "understand"), ("test", "generate")}
    for measurement in found:
        once = measurement.group_size == 1
        count = items if once else frontier_items
        whole = prompts(measurement.skill, max(items, frontier_items))
        assert measurement.uids == [example.uid for example in whole[:count]]
        assert (measurement.label, measurement.step) == ("after", 7)
        scored = (measurement.skill, measurement.sampling) == ("understand", AS_TRAINED)
        assert ("reward" in measurement.scores) == scored
    ways = {(m.skill, m.sampling, m.group_size) for m in found}
    assert len(ways) == len(found) == 4 * bool(items) + 8 * bool(frontier_items)
    total = sum(len(m.uids) * m.group_size for m in found)
    assert not told or told[-1] == (total, total)
    assert [done for done, _ in told] == sorted({done for done, _ in told})
    assert bool(gallery) == bool(items or frontier_items)
