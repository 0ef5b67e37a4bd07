"""The hook that chooses the prompts of a step."""

from __future__ import annotations

import dataclasses

import pytest
from runs.tiny import tiny_config
from trainer.small_policy import prompts
from trainer.test_experience import gather, task  # noqa: F401

from lvrpo.runs.setup import Setup
from lvrpo.trainer.curriculum import Curriculum, CurriculumError

EXAMPLES = prompts("understand", 6)


def test_it_is_asked_for_what_the_step_needs():
    asked = []

    def last(examples, count, step):
        asked.append((len(examples), count, step))
        return examples[-count:]

    hook = Curriculum(last, pool=3)
    assert hook.pick(EXAMPLES, 2, 5) == EXAMPLES[-2:]
    assert hook.pick(EXAMPLES[:1], 2, 6) == EXAMPLES[:1]
    assert asked == [(6, 2, 5), (1, 1, 6)]


@pytest.mark.parametrize(
    ("choose", "message"),
    [
        (lambda examples, count, step: examples, "chose 6 prompts at step 1, expected 2 of the 6"),
        (lambda examples, count, step: [], "chose 0 prompts at step 1"),
        (
            lambda examples, count, step: ["a", "b"],
            "chose 2 prompts at step 1, expected 2 of the 6",
        ),
        (lambda examples, count, step: [examples[0]] * 2, "chose a prompt twice at step 1"),
        (lambda examples, count, step: None, "raised TypeError: 'NoneType' object is not iterable"),
        (lambda examples, count, step: [1 / 0], "raised ZeroDivisionError: .*, at step 1"),
        (lambda examples: examples, "raised TypeError: .*, at step 1"),
    ],
)
def test_what_it_may_not_do(choose, message):
    with pytest.raises(CurriculumError, match=f"rollout.curriculum {message}"):
        Curriculum(choose, 3).pick(EXAMPLES, 2, 1)


def test_a_step_has_the_prompts_that_it_chooses(task):  # noqa: F811
    seen = []

    def shortest(examples, count, step):
        seen.append(({example.task for example in examples}, len(examples), count, step))
        return sorted(examples, key=lambda example: (len(example.prompt), example.uid))[:count]

    chosen = dataclasses.replace(task, curriculum=Curriculum(shortest, 4))
    found, _ = gather(chosen)
    policy_step = 4 - tiny_config().warm_start.steps
    assert seen == [({"understand"}, 8, 2, policy_step), ({"generate"}, 8, 2, policy_step)]
    plain, _ = gather(task)
    lengths = [len(example.prompt) for example in found.answers.examples]
    assert sum(lengths) <= sum(len(example.prompt) for example in plain.answers.examples)
    seen.clear()
    constant = {"texts": lambda samples: [1.0] * len(samples)}
    gather(chosen, "rollout.resample_rounds=1", "rewards.truncated=keep", **constant)
    assert seen[2][:3] == ({"understand"}, 8, 2)


def test_a_file_of_ones_own(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text("def first(examples, count, step):\n    return examples[:count]\n")
    hook = Setup(tiny_config(f"rollout.curriculum={path}:first")).curriculum
    assert hook.pick(EXAMPLES, 2, 1) == EXAMPLES[:2]
    assert Setup(tiny_config()).curriculum is None
