"""SmolLM2-135M in TRL with and without lvrpo: the same losses in fp32, and rewards that rise."""

from __future__ import annotations

import random
import re
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("trl", reason="pip install 'lvrpo[trl]'")
import transformers
import trl
from datasets import Dataset
from integrations.trl_runs import config_of

from lvrpo.integrations.trl import GRPOTrainer
from lvrpo.real.smollm2 import load, why_not

pytestmark = pytest.mark.slow
#: A sum to finish, which the model gets right every second time.
PROMPT = "<|im_start|>user\n{a} + {b} =<|im_end|>\n<|im_start|>assistant\n{a} + {b} ="


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model as transformers saves one; 135 million parameters, in fp32."""
    if reason := why_not():
        pytest.skip(reason)
    out = tmp_path_factory.mktemp("smollm2")
    for part in load():
        part.save_pretrained(out)
    return out


def is_right(completions: list[str], answer: list[int], **_: Any) -> list[float]:
    said = [re.match(r"\s*(\d+)(?!\d)", text) for text in completions]
    return [float(x is not None and int(x[1]) == y) for x, y in zip(said, answer, strict=True)]


def train(
    kind: type, model: Path, folder: Path, steps: int, prompts: int, **given: Any
) -> list[dict[str, float]]:
    draw = random.Random(0)
    sums = [(draw.randint(1, 9), draw.randint(1, 9)) for _ in range(64)]
    rows = {
        "prompt": [PROMPT.format(a=a, b=b) for a, b in sums],
        "answer": [a + b for a, b in sums],
    }
    options = config_of(
        folder,
        max_steps=steps,
        per_device_train_batch_size=8 * prompts,
        num_generations=8,
        max_completion_length=4,
        optim="adamw_torch",
        learning_rate=1e-5,
    )
    made = kind(
        model=str(model),
        reward_funcs=is_right,
        args=options,
        train_dataset=Dataset.from_dict(rows),
        processing_class=transformers.AutoTokenizer.from_pretrained(model, padding_side="left"),
        **given,
    )
    made.train()
    return [entry for entry in made.state.log_history if "loss" in entry]


def test_the_losses_are_those_of_trl(smollm2, tmp_path):
    theirs = train(trl.GRPOTrainer, smollm2, tmp_path, steps=2, prompts=1)
    assert any(float(entry["grad_norm"]) > 0.1 for entry in theirs)
    for given in ({}, {"share_prompts": True}):
        ours = train(GRPOTrainer, smollm2, tmp_path, steps=2, prompts=1, **given)
        for x, y in zip(ours, theirs, strict=True):
            assert abs(float(x["loss"]) - float(y["loss"])) < 1e-5
            norms = float(x["grad_norm"]), float(y["grad_norm"])
            assert abs(norms[0] - norms[1]) < 1e-3 * norms[1]


def test_rewards_rise(smollm2, tmp_path):
    logged = train(GRPOTrainer, smollm2, tmp_path, steps=8, prompts=4, share_prompts=True)
    rewards = [float(entry["reward"]) for entry in logged]
    assert sum(rewards[-3:]) > sum(rewards[:3]) + 0.3
