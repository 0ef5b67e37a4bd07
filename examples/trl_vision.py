"""TRL's GRPOTrainer with lvrpo's loss: a vision-language model learns to name a colour it sees.

Prompts, with their pictures, stand once in the update for all of their completions.

python examples/trl_vision.py --model HuggingFaceTB/SmolVLM-256M-Instruct --steps 100
python examples/trl_vision.py --tiny       (random weights, nothing is downloaded)
"""

from __future__ import annotations

import argparse
from typing import Any

import tiny_models
from datasets import Dataset
from PIL import Image
from tiny_models import COLOURS
from trl import GRPOConfig

from lvrpo.integrations.trl import GRPOTrainer


def names_the_colour(completions: list[Any], colour: list[str], **_: Any) -> list[float]:
    """The share of the answer's words that are the colour."""
    answers = [completion[0]["content"].lower().split() for completion in completions]
    return [a.count(c) / max(len(a), 1) for a, c in zip(answers, colour, strict=True)]


def pictures(size: int) -> Dataset:
    question = [{"role": "user", "content": "which colour is this ?"}]
    rows = []
    for shade in range(120, 256, 8):
        for at, colour in enumerate(COLOURS):
            pixel = tuple(shade if channel == at else 0 for channel in range(3))
            picture = Image.new("RGB", (size, size), pixel)
            rows.append({"prompt": question, "image": picture, "colour": colour})
    return Dataset.from_list(rows)


def main(arguments: list[str] | None = None) -> list[dict[str, float]]:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="HuggingFaceTB/SmolVLM-256M-Instruct")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--tiny", action="store_true", help="a model of random weights, on a CPU")
    parser.add_argument("--output", default="trl-vision")
    given = parser.parse_args(arguments)
    tiny: dict[str, Any] = {"use_cpu": True, "bf16": False, "learning_rate": 5e-2}
    trainer = GRPOTrainer(
        tiny_models.vision_model() if given.tiny else given.model,
        names_the_colour,
        GRPOConfig(
            output_dir=given.output,
            max_steps=given.steps,
            max_completion_length=8,
            per_device_train_batch_size=16,
            num_generations=8,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            **(tiny if given.tiny else {}),
        ),
        pictures(8 if given.tiny else 64),
        processing_class=tiny_models.processor() if given.tiny else None,
        share_prompts=True,
    )
    trainer.train()
    return [entry for entry in trainer.state.log_history if "reward" in entry]


if __name__ == "__main__":
    main()
