"""Sums that SmolLM2 half knows: questions with one right answer, some of them held out."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Iterator
from pathlib import Path

#: The second turn of the chat begins as the first one ended, and the model goes on.
PROMPT = "<|im_start|>user\n{a} + {b} =<|im_end|>\n<|im_start|>assistant\n{a} + {b} ="
LARGEST = 20
#: Shares of the unordered pairs of terms; the rest is trained on.
HELD_OUT = {"test": 0.3, "validation": 0.1}

CONFIG = r"""# SmolLM2-135M-Instruct learns sums by being told whether it is right.
# docs/recipes/smollm2.md has what comes of it.

[run]
steps = 24
checkpoint_every = 12
keep_checkpoints = 1
eval_items = 256
frontier_items = 0

[data]
source = "train.jsonl"
eval_source = "test.jsonl"
validation_source = "validation.jsonl"

[model]
family = "huggingface"
path = "smollm2"
chat = false  # a prompt is the beginning of a text, and has the turns of the chat in it

[warm_start]
steps = 0
understand_batch = 16  # of a supervised step, in the baseline
generate_batch = 0

[rollout]
group_size = 8
understand_prompts = 8
generate_prompts = 0
max_answer_tokens = 4

[rewards]
understand = { number = 1.0 }
right = { understand = "number" }
truncated = "keep"  # the model goes on after the number, and is cut there

[rewards.arguments.number]
format = 'regex:(-?\d+)(?!\d).*'  # the number that the text begins with

[loss]
text_kl = 0.15
text_clip_low = 0.2
text_clip_high = 0.2

[optimizer]
lr = 1e-5
warmup_steps = 0
minibatches = 1
"""


def pairs() -> dict[str, list[tuple[int, int]]]:
    """Terms from 1 to LARGEST by split; a sum is in one split with that of its terms turned."""
    all_pairs = [(a, b) for a in range(1, LARGEST + 1) for b in range(a, LARGEST + 1)]
    random.Random(0).shuffle(all_pairs)
    found, first = {}, 0
    for split, share in HELD_OUT.items():
        last = first + round(share * len(all_pairs))
        found[split] = all_pairs[first:last]
        first = last
    found["train"] = all_pairs[first:]
    return {
        split: sorted({*chosen, *((b, a) for a, b in chosen)}) for split, chosen in found.items()
    }


def write(folder: Path) -> None:
    """`train.jsonl`, `test.jsonl`, `validation.jsonl` and `sums.toml`, which names them.

    Args:
        folder: with the model in its folder `smollm2`.
    """
    for split, chosen in pairs().items():
        (folder / f"{split}.jsonl").write_text("".join(_lines(chosen)))
    (folder / "sums.toml").write_text(CONFIG)


def _lines(chosen: Iterable[tuple[int, int]]) -> Iterator[str]:
    for a, b in chosen:
        row = {"task": "understand", "prompt": PROMPT.format(a=a, b=b), "answer": str(a + b)}
        yield json.dumps({**row, "id": f"{a}+{b}"}) + "\n"
