"""Dynamic sampling: groups that teach something in place of those that do not, and no more."""

from __future__ import annotations

import dataclasses
import math

import torch
from hypothesis import given
from hypothesis import strategies as st
from trainer.small_policy import SAMPLING, SCHEDULE, prompts, small_policy
from trainer.test_experience import gather, task  # noqa: F401

from lvrpo.models.protocol import Answers
from lvrpo.models.sampling import SampledFrom
from lvrpo.trainer.resampling import has_signal, resample

G = 3


def answers(names: list[str]) -> Answers:
    """Groups whose texts and tokens tell what they are of."""
    examples = [dataclasses.replace(prompts("understand", 1)[0], uid=name) for name in names]
    ids = [[n, g][: 1 + g % 2] for n, _ in enumerate(names) for g in range(G)]
    count = sum(map(len, ids))
    sampled_from = SampledFrom(torch.arange(count) + 0.5, torch.ones(count), torch.ones(count) > 0)
    return Answers(
        examples,
        G,
        ids,
        [f"{name}{g}" for name in names for g in range(G)],
        torch.arange(count) + hash(names[0]) % 97,
        ["end"] * len(ids),
        sampled_from=sampled_from,
    )


def table(signals: list[bool]) -> torch.Tensor:
    varied, constant = [0.0, 1.0, 0.0], [0.5] * G
    return torch.tensor([varied if signal else constant for signal in signals]).view(-1, 1)


def by_definition(groups: torch.Tensor, weights: list[float]) -> list[bool]:
    return [
        any(
            weight and len({x for x in group[:, k].tolist() if not math.isnan(x)}) > 1
            for k, weight in enumerate(weights)
        )
        for group in groups
    ]


@given(st.data())
def test_a_signal_is_two_scores_that_differ(data):
    count, rewards = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 3))
    values = st.sampled_from([0.0, 1.0, math.nan])
    size = count * G * rewards
    scores = torch.tensor(data.draw(st.lists(values, min_size=size, max_size=size)))
    weights = data.draw(
        st.lists(st.sampled_from([0.0, 0.5, -1.0]), min_size=rewards, max_size=rewards)
    )
    found = has_signal(scores.view(-1, rewards), G, weights)
    assert found.tolist() == by_definition(scores.view(count, G, rewards), weights)


@given(
    st.lists(st.booleans(), min_size=1, max_size=5),
    st.lists(st.lists(st.booleans(), max_size=5), max_size=4),
    st.integers(0, 4),
)
def test_groups_with_a_signal_come_first_and_the_number_stays(first, later, rounds):
    asked = []

    def draw(turn, count, seen):
        asked.append((turn, count, len(seen)))
        signals = later[turn - 1][:count] if turn <= len(later) else []
        names = [f"{turn}:{n}:{signal}" for n, signal in enumerate(signals)]
        assert not seen & set(names)
        return answers(names) if names else None

    def rate(groups):
        return table([example.uid.endswith("True") for example in groups.examples])

    names = [f"0:{n}:{signal}" for n, signal in enumerate(first)]
    groups, scores, metrics = resample(
        answers(names), table(first), weights=[1.0], rounds=rounds, draw=draw, rate=rate
    )
    pool, need = list(names), len(first)
    used, sampled = 0, 0
    for turn in range(1, rounds + 1):
        missing = need - sum(name.endswith("True") for name in pool)
        signals = (later[turn - 1] if turn <= len(later) else [])[: max(missing, 0)]
        if missing <= 0 or not signals:
            break
        pool += [f"{turn}:{n}:{signal}" for n, signal in enumerate(signals)]
        used, sampled = turn, sampled + len(signals)
    wanted = names
    if used:
        wanted = [n for n in pool if n.endswith("True")] + [n for n in pool if n.endswith("False")]
    wanted = wanted[:need]
    assert [example.uid for example in groups.examples] == wanted
    assert groups.texts == [f"{name}{g}" for name in wanted for g in range(G)]
    assert torch.equal(scores, table([name.endswith("True") for name in wanted]))
    assert len(groups.logprobs) == sum(map(len, groups.token_ids)) == len(groups.sampled_from[0])
    assert metrics == {
        "signal": sum(first) / need,
        "rounds": used,
        "resampled": sampled / need,
    }
    assert len(asked) <= rounds


def test_what_is_taken_and_put_together_is_what_was_sampled():
    policy = small_policy()
    questions, drawings = prompts("understand", 4), prompts("generate", 4)
    key = {"seed": 1, "step": 2}
    for whole, sample in (
        (questions, lambda some: policy.sample_texts(some, G, sampling=SAMPLING, **key)),
        (drawings, lambda some: policy.sample_images(some, G, SCHEDULE, **key)),
    ):
        all_of_it, order = sample(whole), [2, 0, 3]
        taken = all_of_it.take(order)
        apart = type(taken).concat([sample([whole[at]]) for at in order])
        for field in dataclasses.fields(taken):
            ours, theirs = (getattr(each, field.name) for each in (taken, apart))
            if isinstance(ours, torch.Tensor):
                torch.testing.assert_close(ours, theirs)
            elif field.name == "examples":
                assert [e.uid for e in ours] == [e.uid for e in theirs]
            else:
                assert ours == theirs, field.name


def constant_for_some(samples):
    """Where the uid has an odd number of letters, the samples of the group differ."""
    scores = []
    for at, example in enumerate(samples.examples):
        scores.append(float(at % 2) if len(example.uid) % 2 else 0.5)
    return scores


def test_a_step_learns_from_groups_with_a_signal(task):  # noqa: F811
    off, before = gather(task, texts=constant_for_some)
    on, after = gather(task, "rollout.resample_rounds=20", texts=constant_for_some)
    assert not any(name.startswith("resampling") for name in before)
    share = after["resampling/signal/understand"]
    assert share == 1 - before["constant_groups/understand"]
    assert len(on.answers.examples) == len(off.answers.examples)
    assert after["strict/understand"] == before["strict/understand"]
    if share < 1:
        assert after["constant_groups/understand"] == 0
        assert after["resampling/rounds/understand"] >= 1
        assert after["resampling/resampled/understand"] >= 1 - share
    uids = [example.uid for example in on.answers.examples]
    assert len(set(uids)) == len(uids)
    again, _ = gather(task, "rollout.resample_rounds=20", texts=constant_for_some)
    assert again.answers.token_ids == on.answers.token_ids


def test_rounds_are_bounded(task):  # noqa: F811
    keys = ("rollout.resample_rounds=2", "rewards.truncated=keep")
    found, metrics = gather(task, *keys, texts=lambda samples: [1.0] * len(samples))
    assert metrics["resampling/signal/understand"] == 0
    assert metrics["resampling/rounds/understand"] == 2
    assert metrics["resampling/resampled/understand"] == 2
    assert not found.answer_advantages.any()
