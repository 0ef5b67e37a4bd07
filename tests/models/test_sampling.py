"""A sample is its own: whatever shares its batch, and as one full forward pass would have it."""

from __future__ import annotations

import copy
import dataclasses
import math

import pytest
import torch
from trainer.small_policy import (
    GROUP,
    MAX_TOKENS,
    SCHEDULE,
    answers,
    pictures,
    prompts,
    small_policy,
)

from lvrpo.models.flow import Guidance, drawn_noise
from lvrpo.models.protocol import DivergedError
from lvrpo.models.sampling import Sampling
from lvrpo.models.unified import decoding
from lvrpo.models.unified.model import KVCache
from lvrpo.models.unified.tokenizer import BOS, DRAW, EOS
from lvrpo.ops.flow_step import flow_step
from lvrpo.params.flow import GuidanceParams
from lvrpo.testing import check_against_plain


@pytest.fixture(params=[torch.float32, torch.float64, "streams"], ids=str)
def policy(request):
    if request.param == "streams":
        return small_policy(torch.float32, backend=None, keeps_noise=False)
    return small_policy(request.param, backend=None)


def of_prompt(found, at):
    """(tokens, log-probs) of the samples of one prompt."""
    lengths = [len(tokens) for tokens in found.token_ids]
    logprobs = found.logprobs.split(lengths)
    rows = slice(at * found.group_size, (at + 1) * found.group_size)
    return found.token_ids[rows], torch.cat(logprobs[rows])


def test_answers_do_not_depend_on_the_batch(policy):
    questions = prompts("understand", 5)
    together = answers(policy, questions)
    backwards = answers(policy, questions[::-1])
    for at, question in enumerate(questions):
        alone = answers(policy, [question])
        for other, place in ((together, at), (backwards, len(questions) - 1 - at)):
            tokens, logprobs = of_prompt(other, place)
            assert tokens == alone.token_ids
            check_against_plain(logprobs, alone.logprobs.double(), alone.logprobs, scale=8.0)


def test_pictures_do_not_depend_on_the_batch(policy):
    requests = prompts("generate", 4)
    together = pictures(policy, requests)
    for at, request in enumerate(requests):
        alone = pictures(policy, [request])
        rows = slice(at * GROUP, (at + 1) * GROUP)
        assert torch.equal(together.noise[rows], alone.noise)
        for name in ("images", "latents", "velocities"):
            ours, theirs = getattr(together, name)[rows], getattr(alone, name)
            # Rounding of another tiling, carried through the denoising steps.
            check_against_plain(ours, theirs.double(), theirs, scale=64.0, name=name)


def test_a_smaller_group_is_the_start_of_a_larger_one(policy):
    question, request = prompts("understand", 1), prompts("generate", 1)
    assert answers(policy, question, 2).token_ids == answers(policy, question, 5).token_ids[:2]
    few, many = pictures(policy, request, 2), pictures(policy, request, 5)
    assert torch.equal(few.noise, many.noise[:2])


def test_a_prompt_that_comes_twice_gets_other_samples(policy):
    question, request = prompts("understand", 1), prompts("generate", 1)
    assert answers(policy, question * 2).token_ids == answers(policy, question, 2 * GROUP).token_ids
    twice = pictures(policy, request * 2).noise
    assert torch.equal(twice, pictures(policy, request, 2 * GROUP).noise)
    assert len(twice.flatten(1).unique(dim=0)) == 2 * GROUP


@pytest.mark.parametrize("block", [1, 3])
def test_laying_the_buffer_out_anew_changes_nothing(policy, monkeypatch, block):
    questions = prompts("understand", 6)
    low, high = policy.answer_range
    stops = tuple(range(low, high, 5))
    sampling = Sampling(max_tokens=7, temperature=1.3, stop_token_ids=stops)
    whole = policy.sample_texts(questions, GROUP, sampling=sampling, seed=0, step=0)
    assert len({len(tokens) for tokens in whole.token_ids}) > 3
    rows = []
    move = KVCache.move

    def counted(cache, there, here, count):
        rows.append(count)
        move(cache, there, here, count)

    monkeypatch.setattr(KVCache, "move", counted)
    monkeypatch.setattr(decoding, "BLOCK", block)
    found = policy.sample_texts(questions, GROUP, sampling=sampling, seed=0, step=0)
    assert found.token_ids == whole.token_ids
    check_against_plain(found.logprobs, whole.logprobs.double(), whole.logprobs, scale=8.0)
    # What each layout has rows for: the answers that go on, and their prompts.
    prompt_rows = [policy.prompt(question).rows for question in questions]
    for turn, count in enumerate(rows):
        # The first token is drawn before anything is laid out.
        active = [len(tokens) > turn * block + 1 for tokens in whole.token_ids]
        groups = [any(active[i * GROUP : (i + 1) * GROUP]) for i in range(6)]
        room = min((turn + 1) * block, 7)
        kept = sum(n for n, is_kept in zip(prompt_rows, groups, strict=True) if is_kept)
        assert count == kept + room * sum(active)


def test_answers_end_at_the_end_token_or_at_the_limit(policy):
    found = answers(policy, prompts("understand", 24))
    lengths = {len(tokens) for tokens in found.token_ids}
    ended = [tokens for tokens in found.token_ids if tokens[-1] == EOS]
    assert ended
    assert len(ended) < len(found.token_ids)
    assert max(lengths) == MAX_TOKENS
    for tokens, text in zip(found.token_ids, found.texts, strict=True):
        assert EOS not in tokens[:-1]
        assert tokens[-1] == EOS or len(tokens) == MAX_TOKENS
        assert text == policy.tokenizer.decode(tokens)
    assert len(found.logprobs) == sum(map(len, found.token_ids))


def test_tokens_are_of_the_answer_range(policy):
    low, high = policy.answer_range
    found = answers(policy, prompts("understand", 8))
    assert all(low <= token < high for tokens in found.token_ids for token in tokens)


def test_tokens_follow_the_models_distribution():
    """Frequencies of the first token over many samples, against its probabilities."""
    policy = small_policy()
    (question,) = prompts("understand", 1)
    count = 4000
    found = policy.sample_texts(
        [question], count, sampling=Sampling(max_tokens=1, temperature=0.7), seed=0, step=0
    )
    low, high = policy.answer_range
    builder = policy.builder()
    policy.add_prompt(builder, question)
    with torch.no_grad():
        text, _ = policy.module(builder.build(), backend="torch")
        expected = (policy.module.logits(text[-1])[low:high] / 0.7).softmax(0)
    drawn = torch.tensor([tokens[0] - low for tokens in found.token_ids])
    counts = drawn.bincount(minlength=high - low)
    # Each count is binomial: 5 standard deviations, and a little for the rare ones.
    deviation = (count * expected * (1 - expected)).sqrt()
    assert ((counts - count * expected).abs() <= 5 * deviation + 2).all()


def greedy(policy, questions, group_size=1, seed=0):
    return policy.sample_texts(
        questions,
        group_size,
        sampling=Sampling(max_tokens=MAX_TOKENS, temperature=0.0),
        seed=seed,
        step=0,
    )


def test_a_greedy_answer_is_the_likeliest_token_after_the_other(policy):
    questions = prompts("understand", 8)
    found = greedy(policy, questions)
    (pack,) = policy.packs(found.groups())
    with torch.no_grad():
        outputs = policy.forward(pack)
        logits = policy.module.logits(outputs.hidden)[pack.row_index]
        logprobs = outputs.logprobs(pack, temperature=1.0, backend=policy.backend)
    low, high = policy.answer_range
    assert pack.token_ids.tolist() == (logits[:, low:high].argmax(dim=-1) + low).tolist()
    check_against_plain(found.logprobs, logprobs.double(), logprobs, scale=8.0)


def test_greedy_answers_are_equal_whatever_the_seed(policy):
    questions = prompts("understand", 4)
    found = greedy(policy, questions, GROUP, seed=5)
    once = greedy(policy, questions).token_ids
    assert found.token_ids == [tokens for tokens in once for _ in range(GROUP)]


def test_of_equally_likely_tokens_the_greedy_answer_has_the_lowest(policy):
    with torch.no_grad():
        for parameter in policy.module.head.parameters():
            parameter.zero_()
    low, _ = policy.answer_range
    found = greedy(policy, prompts("understand", 2))
    assert {tokens[0] for tokens in found.token_ids} == {low}


def test_logprobs_are_those_of_a_full_forward_pass(policy):
    found = answers(policy, prompts("understand", 4))
    (pack,) = policy.packs(found.groups())
    with torch.no_grad():
        logprobs = policy.forward(pack).logprobs(pack, temperature=1.3, backend=policy.backend)
    assert pack.token_ids.tolist() == [token for tokens in found.token_ids for token in tokens]
    check_against_plain(found.logprobs, logprobs.double(), logprobs, scale=8.0)


def test_the_stored_steps_make_the_picture_again(policy):
    """x of the next step follows from latents, velocities and noise; the rest is an ODE."""
    found = pictures(policy, prompts("generate", 3))
    assert found.steps == list(SCHEDULE.stochastic_steps) == [0, 1, 2]
    for k in found.steps[:-1]:
        at = SCHEDULE.coefficients(k)
        velocity, noise = found.velocities[:, k], found.noise[:, k]
        x, _ = flow_step(velocity, found.latents[:, k], at, noise, backend=policy.backend)
        assert torch.equal(x, found.latents[:, k + 1])


@pytest.mark.parametrize("window", [None, (2, 4)])
def test_noise_that_is_not_kept_is_that_of_streams(window):
    """Of a sample's seed: the start is subsequence 0, and every step has the next."""
    policy = small_policy(torch.float32, keeps_noise=False)
    schedule = dataclasses.replace(SCHEDULE, num_steps=6, window=window)
    found = policy.sample_images(prompts("generate", 2), GROUP, schedule, seed=7, step=2)
    seeds, subsequences = found.noise.unbind(2)
    assert found.noise.dtype == torch.int64
    assert len(seeds[:, 0].unique()) == 2 * GROUP
    assert torch.equal(seeds, seeds[:, :1].expand_as(seeds))
    steps = torch.tensor(found.steps)
    assert steps.tolist() == (list(schedule.stochastic_steps) if window is None else [2, 3, 4])
    assert torch.equal(subsequences, (1 + steps).expand_as(subsequences))
    if window is None:
        start = torch.stack([seeds[:, 0], torch.zeros_like(seeds[:, 0])], dim=1)
        assert torch.equal(found.latents[:, 0], drawn_noise(start, policy.latent_shape))


def test_the_stored_velocities_are_those_of_a_full_forward_pass(policy):
    found = pictures(policy, prompts("generate", 3))
    steps = len(found.steps)
    times = torch.tensor([float(SCHEDULE.times[k]) for k in found.steps])
    (pack,) = policy.packs(
        [],
        [(example, GROUP * steps) for example in found.examples],
        found.latents.flatten(0, 1),
        times.repeat(len(found.latents)),
    )
    with torch.no_grad():
        velocity = policy.forward(pack).velocity.view_as(found.velocities)
    check_against_plain(found.velocities, velocity.double(), velocity, scale=8.0)


def test_starting_noise_and_schedule_are_carried_along(policy):
    requests = prompts("generate", 1)
    found = pictures(policy, requests)
    assert found.fingerprint == SCHEDULE.fingerprint()
    other = dataclasses.replace(SCHEDULE, shift=2.0)
    assert found.fingerprint != other.fingerprint()
    assert found.images.shape == (GROUP, 1, 16, 16)
    assert found.images.min() >= 0
    assert found.images.max() <= 1
    # Of standard normals, all different.
    assert len(found.latents[:, 0].flatten(1).unique(dim=0)) == GROUP


@pytest.mark.parametrize("scale", [0.0, 0.25, 1.0, 2.0])
def test_the_starting_noise_is_scaled_and_no_other(policy, scale):
    requests = prompts("generate", 2)
    whole = pictures(policy, requests)
    found = policy.sample_images(requests, GROUP, SCHEDULE, start_noise=scale, seed=7, step=2)
    assert torch.equal(found.latents[:, 0], whole.latents[:, 0] * scale)
    assert torch.equal(found.noise, whole.noise)


def test_without_any_noise_there_is_one_drawing_of_a_prompt(policy):
    requests = prompts("generate", 3)
    ode = dataclasses.replace(SCHEDULE, dynamics="ode")
    found = policy.sample_images(requests, GROUP, ode, start_noise=0.0, seed=1, step=4)
    once = policy.sample_images(requests, 1, ode, start_noise=0.0, seed=2, step=0)
    repeated = once.images.repeat_interleave(GROUP, dim=0)
    check_against_plain(found.images, repeated.double(), repeated, scale=64.0)
    assert found.latents.shape[:2] == (len(requests) * GROUP, 0)


@pytest.mark.parametrize("renorm", ["none", "global", "channel"])
@pytest.mark.parametrize("until", [0.0, 0.6, 1.0])
def test_guided_drawings_follow_the_guided_velocity(policy, renorm, until):
    """Step by step against full passes over a drawing with its words and one without them."""
    params = GuidanceParams(text_scale=2.5, renorm=renorm, renorm_min=0.3)
    requests = prompts("generate", 2)
    guidance = Guidance(params, until)
    found = policy.sample_images(requests, 2, SCHEDULE, guidance=guidance, seed=7, step=2)
    plain = policy.sample_images(requests, 2, SCHEDULE, seed=7, step=2)
    assert torch.equal(found.noise, plain.noise)
    assert torch.equal(found.latents[:, 0], plain.latents[:, 0])

    def velocity(request, x, time, *, with_words):
        builder = policy.builder()
        if with_words:
            parent = policy.add_prompt(builder, request)
        else:
            parent = builder.text([BOS, DRAW])
        builder.noise(*policy.latent_grid, parent=parent)
        with torch.no_grad():
            _, latent = policy.module(builder.build(x, torch.full((len(x),), time)))
            return policy.module.velocity(latent)

    is_guided = [float(time) > until for time in SCHEDULE.times[:-1]]
    for sample in range(4):
        for k in found.steps:
            x, time = found.latents[sample, k], float(SCHEDULE.times[k])
            v = velocity(requests[sample // 2], x, time, with_words=True)
            if is_guided[k]:
                u = velocity(requests[sample // 2], x, time, with_words=False)
                pushed = u + 2.5 * (v - u)
                over = {"none": None, "global": (0, 1), "channel": (1,)}[renorm]
                factor = 1.0
                if over is not None:
                    norms = (each.norm(dim=over, keepdim=True) for each in (v, pushed))
                    factor = (next(norms) / (next(norms) + 1e-8)).clamp(0.3, 1)
                v = factor * pushed
            check_against_plain(found.velocities[sample, k], v.double(), v, scale=64.0)
    assert torch.equal(found.images, plain.images) == (not any(is_guided))


def test_an_answer_says_why_it_ended(policy):
    found = answers(policy, prompts("understand", 24))
    for tokens, reason in zip(found.token_ids, found.finish_reasons, strict=True):
        assert reason == ("end" if EOS in tokens else "length")
    assert set(found.finish_reasons) == {"end", "length"}


def test_samples_that_are_left_out_leave_the_others_as_they_are(policy):
    found = answers(policy, prompts("understand", 4))
    kept = torch.tensor([True, False, True, False, False, False, True, True, True] + [False] * 3)
    left = found.where(kept)
    assert left.token_ids == [ids for ids, k in zip(found.token_ids, kept, strict=True) if k]
    assert left.texts == [text for text, k in zip(found.texts, kept, strict=True) if k]
    lengths = [len(ids) for ids in found.token_ids]
    pieces = zip(found.logprobs.split(lengths), kept, strict=True)
    assert torch.equal(left.logprobs, torch.cat([piece for piece, k in pieces if k]))
    assert [len(tokens) for _, tokens in left.groups()] == [2, 3]
    assert [example.uid for example, _ in left.groups()] == [
        found.examples[0].uid,
        found.examples[2].uid,
    ]
    assert found.where(torch.ones(12, dtype=torch.bool)).groups() == found.groups()


def broken(policy, value, part):
    """The policy with one weight of a layer, or of what reads or writes a modality, spoiled."""
    spoiled = copy.deepcopy(policy)
    names = dict(spoiled.module.named_parameters())
    with torch.no_grad():
        names[part].view(-1)[0] = value
    return spoiled


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_broken_weights_are_named_before_anybody_looks_at_the_samples(policy, value):
    """Every parameter that the samples depend on, one after the other."""
    question, request = prompts("understand", 1), prompts("generate", 1)
    messages = []
    for part, _ in policy.module.named_parameters():
        for sample, examples in ((answers, question), (pictures, request)):
            try:
                found = sample(broken(policy, value, part), examples)
            except DivergedError as error:
                messages.append(str(error))
            else:  # this sample does not depend on that weight
                numbers = found.logprobs if sample is answers else found.images
                assert numbers.isfinite().all()
    assert len(messages) > 10
    assert len(set(messages)) == 2
    assert all(m.startswith("step 2: the policy's ") and "optimizer.lr" in m for m in messages)
