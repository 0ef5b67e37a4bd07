"""Code of others: what it cannot change, how long it may take, and what its failing costs.

The oracle of every test is written here: which rows a fault may touch, and what all others score.
"""

from __future__ import annotations

import copy
import math
import signal
import threading
import time
from functools import partial, wraps

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lvrpo.data.example import Example
from lvrpo.rewards.registry import load_reward
from lvrpo.rewards.reward import FunctionReward, RewardError, Samples
from lvrpo.rewards.score import score

GROUP = 3


def a_batch(questions: int = 3, drawings: int = 2) -> Samples:
    """Groups of three answers and of three drawings, every answer another text."""
    rng = np.random.default_rng(0)
    parts = []
    for q in range(questions):
        image = rng.random((1, 4, 4), dtype=np.float32)
        example = Example("understand", f"q{q}", f"question {q}", image=image, answer="1")
        texts = [f"{q} {g}" for g in range(GROUP)]
        parts.append(Samples.of_texts([example] * GROUP, texts, ["end", "length", "end"]))
    for d in range(drawings):
        target = rng.random((1, 4, 4), dtype=np.float32)
        example = Example("generate", f"d{d}", f"drawing {d}", target=target)
        images = torch.from_numpy(rng.random((GROUP, 1, 4, 4), dtype=np.float32))
        parts.append(Samples.of_images([example] * GROUP, images))
    return Samples.concat(parts)


def frozen(samples: Samples) -> list[object]:
    """Everything a reward is given, by value."""
    return [
        [vars(example) for example in map(copy.deepcopy, samples.examples)],
        list(samples.texts),
        list(samples.finish_reasons),
        list(samples.image_index),
        samples.images.clone(),
    ]


def assert_equal(found: object, expected: object) -> None:
    if isinstance(expected, torch.Tensor):
        assert torch.equal(found, expected)
    elif isinstance(expected, np.ndarray):
        np.testing.assert_array_equal(found, expected)
    elif isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for name in expected:
            assert_equal(found[name], expected[name])
    elif isinstance(expected, list):
        assert len(found) == len(expected)
        for ours, theirs in zip(found, expected, strict=True):
            assert_equal(ours, theirs)
    else:
        assert found == expected


def pictures_of(samples):
    return [p for e in samples.examples for p in (e.image, e.target) if p is not None]


def write_images(samples):
    samples.images.mul_(0).add_(7)


def write_images_through_numpy(samples):
    samples.images.numpy()[:] = 7


def write_example_pictures(samples):
    for picture in pictures_of(samples):
        picture.flags.writeable = True
        picture[:] = 7


def write_example_pictures_through_torch(samples):
    for picture in pictures_of(samples):
        torch.from_numpy(picture).fill_(7)


def write_lists(samples):
    for name in ("examples", "texts", "finish_reasons", "image_index"):
        values = getattr(samples, name)
        if hasattr(values, "clear"):
            values.clear()


def write_fields(samples):
    for name in ("examples", "texts", "finish_reasons", "image_index", "images"):
        object.__setattr__(samples, name, None)


def write_fields_of_examples(samples):
    for example in samples.examples:
        for name in list(vars(example)):
            object.__setattr__(example, name, None)


WRITERS = [
    write_images,
    write_images_through_numpy,
    write_example_pictures,
    write_example_pictures_through_torch,
    write_lists,
    write_fields,
    write_fields_of_examples,
]


@pytest.mark.parametrize("write", WRITERS, ids=lambda write: write.__name__)
@pytest.mark.parametrize("fails", [False, True])
def test_what_a_reward_writes_is_seen_by_nobody(write, fails):
    """Neither by the rewards after it, nor by its own second call, nor by the caller."""
    samples = a_batch()
    before = frozen(samples)
    seen = []

    def writer(samples):
        count = len(samples)
        if samples.images is not None:
            write(samples)
        if fails and count > GROUP:
            raise RuntimeError("once more, group by group")
        return [0.0] * count

    def reader(samples):
        seen.append(frozen(samples))
        return [0.0] * len(samples)

    rewards = [FunctionReward(writer, "writer"), FunctionReward(reader, "reader")]
    score(rewards, samples, on_failure=pytest.fail if not fails else None.__class__)
    assert_equal(seen, [before])
    assert_equal(frozen(samples), before)


def test_scores_are_of_their_own_memory():
    held = torch.arange(15.0)
    table = score([FunctionReward(lambda samples: held, "held")], a_batch(), truncated="keep")
    held.fill_(7)
    assert table[:, 0].tolist() == list(range(15))


FAULTS = ("raise", "short", "nan", "infinite", "exit", "text", "none")


@settings(max_examples=60, deadline=None)
@given(st.dictionaries(st.integers(0, 14), st.sampled_from(FAULTS), max_size=6))
def test_a_fault_costs_its_own_group_at_most(faults):
    """Rows of a call that fails have no score; a single bad number is lost alone."""
    samples = a_batch()
    row_of = {
        **{text: i for i, text in enumerate(samples.texts) if text is not None},
        **{
            float(image.sum()): at
            for image, at in zip(samples.images, samples.image_index, strict=True)
        },
    }

    def faulty(samples):
        images = iter(() if samples.images is None else samples.images)
        rows = [row_of[float(next(images).sum()) if t is None else t] for t in samples.texts]
        here = {faults.get(row) for row in rows}
        if "raise" in here:
            raise KeyError("a bad sample")
        if "exit" in here:
            raise SystemExit
        scores = [
            {"nan": math.nan, "infinite": -math.inf, "text": "1", "none": None}.get(
                faults.get(row), float(row)
            )
            for row in rows
        ]
        return scores[:-1] if "short" in here else scores

    failures: list[RewardError] = []
    reward = FunctionReward(faulty, "faulty")
    table = score([reward], samples, truncated="keep", on_failure=failures.append)[:, 0]
    whole = {
        row // GROUP for row, fault in faults.items() if fault in ("raise", "exit", "short", "text")
    }
    for row in range(15):
        lost = row // GROUP in whole or faults.get(row) in ("nan", "infinite", "none")
        assert math.isnan(table[row]) if lost else table[row] == row
    failed = [row for failure in failures for row in failure.samples]
    expected = [r for r in range(15) if r // GROUP in whole or faults.get(r) in ("nan", "infinite")]
    assert sorted(failed) == expected
    assert all("faulty" in failure.kind for failure in failures)
    if failed:
        with pytest.raises(RewardError, match="reward 'faulty'"):
            score([reward], samples)


def test_a_kind_of_failure_is_one_text_whatever_it_failed_on():
    def fails(samples):
        raise ValueError(f"bad prompt {samples.examples[0].uid}")

    failures: list[RewardError] = []
    score([FunctionReward(fails, "fails")], a_batch(), on_failure=failures.append)
    assert len(failures) == 5
    assert len({str(failure) for failure in failures}) == 5
    (kind,) = {failure.kind for failure in failures}
    assert kind.startswith("reward 'fails' raised ValueError, at ")


@pytest.fixture
def release():
    """Ends whatever waits for it, so that no thread outlives a test."""
    event = threading.Event()
    yield event
    event.set()


def test_a_call_that_hangs_is_left_behind(release):
    def hangs(samples):
        release.wait()
        return [1.0] * len(samples)

    samples = a_batch()
    with pytest.raises(
        RewardError,
        match=r"'hangs' took longer than 0.2 s \(rewards.timeout\), "
        r"first prompt 'q0' .*, at .*test_failures.py:\d+$",
    ):
        score([FunctionReward(hangs, "hangs")], samples, timeout=0.2)
    failures: list[RewardError] = []
    rewards = [FunctionReward(hangs, "hangs"), FunctionReward(lambda s: [2.0] * len(s), "next")]
    table = score(rewards, samples, timeout=0.2, truncated="keep", on_failure=failures.append)
    assert table[:, 0].isnan().all()
    assert table[:, 1].eq(2).all()
    assert [list(failure.samples) for failure in failures] == [list(range(15))]


def test_the_limit_is_of_all_calls_together(release):
    """A reward that fails at once, and then hangs group by group, waits for no more than that."""
    calls = []

    def fails_then_hangs(samples):
        calls.append(len(samples))
        if len(samples) > GROUP:
            raise RuntimeError
        release.wait()

    failures: list[RewardError] = []
    reward = FunctionReward(fails_then_hangs, "slow")
    table = score([reward], a_batch(), timeout=0.2, on_failure=failures.append)
    assert calls == [15, GROUP]
    assert table.isnan().all()
    assert sum(len(failure.samples) for failure in failures) == 15


def test_a_late_result_is_thrown_away(release):
    started = threading.Event()

    def late(samples):
        started.set()
        release.wait()
        write_images(samples)
        return [1.0] * len(samples)

    samples = a_batch()
    before = frozen(samples)
    failures: list[RewardError] = []
    table = score([FunctionReward(late, "late")], samples, timeout=0.2, on_failure=failures.append)
    assert started.is_set()
    (worker,) = (t for t in threading.enumerate() if t.name == "lvrpo reward")
    release.set()
    worker.join(10)
    assert table.isnan().all()
    assert_equal(frozen(samples), before)


def test_within_its_time_a_call_is_as_without_a_limit():
    def lazily(samples):
        return (float(len(text or "")) for text in samples.texts)

    def own_timeout(samples):
        raise TimeoutError("of a socket")

    samples = a_batch()
    reward = FunctionReward(lazily, "lazily")
    assert torch.equal(score([reward], samples, timeout=60.0), score([reward], samples))
    with pytest.raises(RewardError, match=r"'own' raised TimeoutError: of a socket"):
        score([FunctionReward(own_timeout, "own")], samples, timeout=60.0)


class _Stop(Exception):
    pass


def test_a_signal_comes_through_a_call_with_a_limit(release):
    def stop(signum, frame):
        raise _Stop

    previous = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, 0.2)
    started = time.monotonic()
    try:
        with pytest.raises(_Stop):
            score([FunctionReward(lambda s: release.wait(), "hangs")], a_batch(), timeout=300.0)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
    assert time.monotonic() - started < 60


def test_an_interrupt_is_no_failure_of_the_reward():
    def pressed(samples):
        raise KeyboardInterrupt

    for timeout in (0.0, 60.0):
        with pytest.raises(KeyboardInterrupt):
            score(
                [FunctionReward(pressed, "r")], a_batch(), timeout=timeout, on_failure=pytest.fail
            )


def scores_between(low, high):
    return st.lists(st.floats(low, high, width=32) | st.none(), min_size=15, max_size=15)


@settings(max_examples=60, deadline=None)
@given(scores_between(-3.0, 3.0))
def test_a_cut_answer_scores_as_the_setting_says(values):
    """Of every group the second answer was cut; drawings never are."""
    samples = a_batch()
    cut = {1, 4, 7}
    for truncated in ("zero", "keep", "mask"):
        table = score([FunctionReward(lambda s: values, "r")], samples, truncated=truncated)[:, 0]
        for row, value in enumerate(values):
            if value is None or (truncated == "mask" and row in cut):
                assert math.isnan(table[row])
            elif truncated == "zero" and row in cut:
                assert table[row] == min(value, 0.0)
            else:
                assert table[row] == value


def test_how_cut_answers_score_is_one_of_three():
    with pytest.raises(ValueError, match="truncated is 'no', expected one of zero, keep, mask"):
        score([FunctionReward(lambda s: [0.0] * 15, "r")], a_batch(), truncated="no")


USER = """
import functools
import json

def twice(function):
    def inner(samples):
        return function(samples)
    return inner

def parses(samples):
    # two lines
    return [json.loads(text) for text in samples.texts]

@twice
def decorated(samples):
    return json.loads("no")

@functools.lru_cache
def cached(samples):
    return json.loads("no")

bound = functools.partial(lambda extra, samples: json.loads("no"), 1)

class Parser:
    name, may_be_nan = "parser", False
    def __call__(self, samples):
        return self.parse(samples)
    def parse(self, samples):
        return json.loads("no")

def lazy(samples):
    return (json.loads("no") for _ in samples.texts)

def own(samples):
    raise ValueError("mine")
"""
LINES = {
    "parses": 12,
    "decorated": 16,
    "cached": 20,
    "bound": 22,
    "Parser": 29,
    "lazy": 32,
    "own": 35,
}


@pytest.mark.parametrize("timeout", [0.0, 60.0])
@pytest.mark.parametrize(("name", "line"), LINES.items())
def test_an_error_names_the_users_own_line(tmp_path, name, line, timeout):
    path = tmp_path / "mine.py"
    path.write_text(USER)
    with pytest.raises(RewardError) as found:
        score([load_reward(f"{path}:{name}")], a_batch(), timeout=timeout)
    message = str(found.value)
    assert f", at {path}:{line}" in message
    assert "lvrpo/rewards" not in message
    assert (" (from " in message) == (name != "own")


def test_code_without_a_file_names_no_line_of_ours():
    def by_a_decorator(function):
        @wraps(function)
        def inner(samples):
            return function(samples.texts)

        return inner

    with pytest.raises(RewardError, match=r"test_failures.py:\d+$"):
        score([FunctionReward(by_a_decorator(math.sqrt), "root")], a_batch())
    for code in (math.sqrt, partial(math.sqrt)):
        with pytest.raises(RewardError) as found:
            score([FunctionReward(code, "root")], a_batch())
        assert ".py" not in str(found.value)
