"""Call every reward once before a run, on what the training data itself holds.

A reward that fails, or has nothing to say about this data, would otherwise be met after the whole
warm start.
"""

from __future__ import annotations

from itertools import chain

import torch

from lvrpo.data.example import Example, FinishReason, Skill
from lvrpo.data.sources import Source
from lvrpo.models.unified.latents import LinearAutoencoder
from lvrpo.rewards.registry import reward_label
from lvrpo.rewards.reward import RewardError, Samples
from lvrpo.runs.rewards import imported, used_rewards
from lvrpo.runs.setup import Data, Task
from lvrpo.trainer.config import TrainConfig
from lvrpo.trainer.experience import score_samples

#: Training prompts of each task.
PROMPTS = 4


def probe_rewards(config: TrainConfig, data: Data, autoencoder: LinearAutoencoder) -> None:
    """Score a group of samples, right and wrong ones, for a few training prompts of each task.

    Nothing is fitted for it: an encoder and an answerer that know nothing show what they fail at
    and where they have no score.

    Args:
        config: of the run; its rewards are known to exist.
        data: of the configuration.
        autoencoder: of the model's shape.

    Raises:
        RewardError: as in a step of the run, or no reward has a score for any of the samples.
    """
    used = used_rewards(config)
    names = set(chain.from_iterable(used.values()))
    needs = set().union(*(imported(name).needs for name in names))
    encoder = data.new_encoder() if "encoder" in needs else None
    task = Task(config, data, autoencoder, encoder)
    # A large model that no reward asks anything would take its time.
    with torch.device("cpu" if "answer_probability" in needs else "meta"):
        model = task.new_model().requires_grad_(False)
    rewards = task.rewards(task.policy(model))
    for name in used:
        examples = data.source.examples("train", name, PROMPTS, 0)
        samples = _answers(examples) if name == "understand" else _drawings(examples, data.source)
        table, _ = score_samples(rewards[name], samples, name, config.rewards)
        if bool(table.isnan().all()):
            raise RewardError(_nothing_to_say(name, list(used[name]), examples))


def _answers(examples: list[Example]) -> Samples:
    """The right answer, none at all, and one that was cut."""
    texts: list[str] = []
    reasons: list[FinishReason] = []
    for example in examples:
        right = example.answer or ""
        texts += [right, "", f"{right} {right}"]
        reasons += ["end", "end", "length"]
    return Samples.of_texts([example for example in examples for _ in range(3)], texts, reasons)


def _drawings(examples: list[Example], source: Source) -> Samples:
    """The target, or noise where there is none, and an empty canvas."""
    noise = torch.Generator().manual_seed(0)
    pictures = []
    for example in examples:
        if example.target is None:
            pictures.append(torch.rand(source.picture_shape, generator=noise))
        else:
            pictures.append(torch.from_numpy(example.target))
        pictures.append(torch.zeros(source.picture_shape))
    return Samples.of_images(
        [example for example in examples for _ in range(2)], torch.stack(pictures)
    )


def _nothing_to_say(task: Skill, names: list[str], examples: list[Example]) -> str:
    first = examples[0]
    needs = "; r_ins and r_kn need drawings with a 'rule'" if task == "generate" else ""
    labels = ", ".join(map(reward_label, names))
    return (
        f"rewards.{task}: no reward ({labels}) has a score for any of {len(examples)} training "
        f"prompts, {first.uid!r} ({first.prompt!r}) for one{needs}"
    )
