"""TRL's GRPOTrainer with lvrpo's loss: a language model learns to answer with a word it is told.

python examples/trl_text.py --model Qwen/Qwen3-0.6B --steps 100
python examples/trl_text.py --tiny       (random weights, nothing is downloaded)
"""

from __future__ import annotations

import argparse
from typing import Any

import tiny_models
from datasets import Dataset
from tiny_models import COLOURS
from trl import GRPOConfig

from lvrpo.integrations.trl import GRPOTrainer


def says_the_word(completions: list[Any], word: list[str], **_: Any) -> list[float]:
    """The share of the answer's words that are the one."""
    answers = [completion[0]["content"].split() for completion in completions]
    return [a.count(w) / max(len(a), 1) for a, w in zip(answers, word, strict=True)]


def prompts() -> Dataset:
    words = COLOURS * 8
    asked = [[{"role": "user", "content": f"say this word : {word}"}] for word in words]
    return Dataset.from_dict({"prompt": asked, "word": words})


def main(arguments: list[str] | None = None) -> list[dict[str, float]]:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="Qwen/Qwen3-0.6B")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--share-prompts", action="store_true")
    parser.add_argument("--tiny", action="store_true", help="a model of random weights, on a CPU")
    parser.add_argument("--output", default="trl-text")
    given = parser.parse_args(arguments)
    tiny: dict[str, Any] = {"use_cpu": True, "bf16": False, "learning_rate": 5e-2}
    trainer = GRPOTrainer(
        tiny_models.language_model() if given.tiny else given.model,
        says_the_word,
        GRPOConfig(
            output_dir=given.output,
            max_steps=given.steps,
            max_completion_length=8,
            per_device_train_batch_size=24,
            num_generations=8,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            **(tiny if given.tiny else {}),
        ),
        prompts(),
        processing_class=tiny_models.tokenizer() if given.tiny else None,
        share_prompts=given.share_prompts,
    )
    trainer.train()
    return [entry for entry in trainer.state.log_history if "reward" in entry]


if __name__ == "__main__":
    main()
