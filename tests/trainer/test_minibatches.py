"""The minibatches of a rollout are the rollout, and their gradients are parts of its gradient."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from trainer.small_policy import OBJECTIVE, SCHEDULE, experience, prompts, small_policy

from lvrpo.models.protocol import Answers, Pictures
from lvrpo.trainer.experience import Experience
from lvrpo.trainer.minibatches import minibatches
from lvrpo.trainer.update import merge_updates, policy_gradient

QUESTIONS, DRAWINGS = prompts("understand", 6), prompts("generate", 6)
QUESTION_UIDS, DRAWING_UIDS = ({e.uid for e in some} for some in (QUESTIONS, DRAWINGS))


@st.composite
def experiences(draw: st.DrawFn) -> tuple[Experience, int]:
    """Of either skill or both, with answers left out anywhere; and how many groups there are."""
    texts = draw(st.integers(0, 6))
    images = draw(st.integers(0 if texts else 1, 6))
    size = draw(st.integers(1, 4))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    found = Experience(None, None, None, None)
    if texts:
        lengths = draw(st.lists(st.integers(1, 3), min_size=texts * size, max_size=texts * size))
        tokens = sum(lengths)
        ids = torch.randint(9, (tokens,), generator=generator).split(lengths)
        answers = Answers(
            QUESTIONS[:texts],
            size,
            [row.tolist() for row in ids],
            [str(i) for i in range(texts * size)],
            torch.randn(tokens, generator=generator),
            ["end"] * (texts * size),
        )
        advantages = torch.randn(texts * size, generator=generator)
        if draw(st.booleans()):
            kept = torch.rand(texts * size, generator=generator) < 0.6
            answers, advantages = answers.where(kept), advantages[kept]
        weights = torch.rand(len(answers.logprobs), generator=generator)
        found = dataclasses.replace(
            found,
            answers=answers,
            answer_advantages=advantages,
            token_weights=weights if draw(st.booleans()) else None,
        )
    if images:
        steps = [torch.randn(images * size, 2, 4, 3, generator=generator) for _ in range(3)]
        pixels = torch.rand(images * size, 1, 8, 8, generator=generator)
        found = dataclasses.replace(
            found,
            pictures=Pictures(DRAWINGS[:images], size, pixels, *steps, [0, 1], "a schedule"),
            picture_advantages=torch.randn(images * size, generator=generator),
        )
    return found, min(texts or images, images or texts)


def samples_of(found: Experience) -> Iterator[list[Any]]:
    """Per group: its prompt, then everything that belongs to each of its samples."""
    answers, pictures = found.answers, found.pictures
    if answers is not None:
        sample = token = 0
        for group, example in enumerate(answers.examples):
            taken: list[Any] = [example.uid]
            size = answers.sizes[group] if answers.sizes else answers.group_size
            for i in range(sample, sample + size):
                ids = answers.token_ids[i]
                taken += [ids, answers.texts[i], answers.finish_reasons[i]]
                taken += answers.logprobs[token : token + len(ids)].tolist()
                taken += [float(found.answer_advantages[i])]
                if found.token_weights is not None:
                    taken += found.token_weights[token : token + len(ids)].tolist()
                token += len(ids)
            sample += size
            if size:
                yield taken
        assert (sample, token) == (len(answers.token_ids), len(answers.logprobs))
        assert len(found.answer_advantages) == sample
    if pictures is not None:
        for group, example in enumerate(pictures.examples):
            of_group = slice(group * pictures.group_size, (group + 1) * pictures.group_size)
            tensors = (pictures.images, pictures.latents, pictures.velocities, pictures.noise)
            yield [
                example.uid,
                *(tensor[of_group].tolist() for tensor in tensors),
                found.picture_advantages[of_group].tolist(),
            ]
        assert len(found.picture_advantages) == len(pictures.latents)


@given(experiences(), st.data())
def test_the_minibatches_of_every_pass_are_the_rollout(case, data):
    found, groups = case
    count, epochs = data.draw(st.integers(1, groups)), data.draw(st.integers(1, 3))
    whole = list(samples_of(found))
    parts = list(minibatches(found, epochs, count, seed=data.draw(st.integers(0, 9)), step=3))
    assert len(parts) == epochs * count
    for first in range(0, len(parts), count):
        dealt = [list(samples_of(part)) for part in parts[first : first + count]]
        places = [[whole.index(group) for group in part] for part in dealt]
        assert sorted(place for part in places for place in part) == list(range(len(whole)))
        assert all(part == sorted(part) for part in places)
        for uids in (QUESTION_UIDS, DRAWING_UIDS):
            sizes = [sum(group[0] in uids for group in part) for part in dealt]
            if found.answers is None or not found.answers.sizes or uids is DRAWING_UIDS:
                assert max(sizes) - min(sizes) <= 1


def dealt(found: Experience, **key: int) -> list[list[list[Any]]]:
    return [list(samples_of(part)) for part in minibatches(found, 2, 3, **key)]


def test_who_is_in_which_minibatch_is_a_matter_of_seed_step_and_pass():
    found = experience(small_policy(), 6, 6)
    first = dealt(found, seed=0, step=1)
    assert dealt(found, seed=0, step=1) == first
    assert dealt(found, seed=1, step=1) != first
    assert dealt(found, seed=0, step=2) != first
    assert first[:3] != first[3:]


def gradient_of(policy, reference, found, objective) -> dict[str, Tensor]:
    policy.module.zero_grad()
    policy_gradient(policy, reference, found, SCHEDULE, objective)
    named = policy.module.named_parameters()
    return {name: p.grad.clone() for name, p in named if p.grad is not None}


@pytest.mark.parametrize("mix", [(3, 0), (0, 3), (5, 3)], ids=str)
@pytest.mark.parametrize("count", [1, 2, 3])
def test_gradients_of_minibatches_weighed_by_their_samples_are_that_of_the_rollout(mix, count):
    found = experience(small_policy(), *mix)
    policy, reference = small_policy(seed=2), small_policy(seed=1)
    whole = gradient_of(policy, reference, found, OBJECTIVE)
    total = {name: torch.zeros_like(value) for name, value in whole.items()}
    for part in minibatches(found, 1, count, seed=0, step=1):
        share = dataclasses.replace(
            OBJECTIVE,
            text_weight=OBJECTIVE.text_weight * of(part.answer_advantages, found.answer_advantages),
            image_weight=OBJECTIVE.image_weight
            * of(part.picture_advantages, found.picture_advantages),
        )
        for name, value in gradient_of(policy, reference, part, share).items():
            total[name] += value
    for name, value in whole.items():
        if count == 1:
            assert torch.equal(total[name], value), name
        scale = max(float(value.abs().max()), 1e-3)
        assert float((total[name] - value).abs().max()) <= 1e-10 * scale, name


def of(part: Tensor | None, whole: Tensor | None) -> float:
    return 0.0 if part is None or whole is None else len(part) / len(whole)


@given(
    st.lists(
        st.dictionaries(
            st.sampled_from(["ratio/text/min", "ratio/image/max", "clip/text", "lr"]),
            st.floats(-1e6, 1e6),
        ),
        min_size=1,
        max_size=5,
    )
)
def test_a_step_tells_the_extremes_and_the_means_of_its_updates(updates):
    merged = merge_updates(updates)
    assert merged.keys() == {name for update in updates for name in update}
    for name, value in merged.items():
        found = [update[name] for update in updates if name in update]
        if name.endswith(("/min", "/max")):
            assert value == (min if name.endswith("/min") else max)(found)
        else:
            assert value == pytest.approx(sum(found) / len(found), abs=1e-6)
    assert merge_updates(updates[:1]) == updates[0]


def test_a_ratio_that_is_not_a_number_stays_none():
    nan = {"ratio/text/min": float("nan")}
    merged = merge_updates([{"ratio/text/min": 0.5}, nan, {"ratio/text/min": 0.7}])
    assert merged["ratio/text/min"] != merged["ratio/text/min"]
