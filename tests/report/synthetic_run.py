"""A run directory as the trainer leaves it, made up in a moment: for the tests of its readers."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from lvrpo.data.example import Skill
from lvrpo.runs.environment import write_environment
from lvrpo.runs.files import append_row
from lvrpo.runs.gallery import save_gallery
from lvrpo.runs.log import RunWriter
from lvrpo.trainer.journal import GalleryItem
from lvrpo.trainer.measurement import AS_TRAINED, GREEDY, LOW_NOISE, Measurement

CONFIG = """\
seed = {seed}
shuffle_rewards = {shuffled}

[grpo]
steps = {steps}
prompts = 48
group_size = 8
advantage = "decoupled"
learning_rate = 1e-4
"""
TOTALS = {"understand": {"naming": 256, "counting": 256}, "generate": {"pair": 256, "above": 256}}


def make_run(
    run_dir: Path,
    *,
    seed: int = 0,
    steps: int = 120,
    gain: float = 0.14,
    shuffled: bool = False,
    gallery: int = 6,
    measured: bool = True,
    fooled: float = 0.0,
) -> Path:
    """Write a whole run whose scores rise by about `gain`.

    Without being `measured` it is of a version that had no measurements.jsonl; a share `fooled` of
    what is wrong after is right for the judge that the rewards see.
    """
    random = np.random.default_rng(seed)
    with RunWriter(run_dir) as writer:
        for step in range(1, 41):
            writer.write_metrics(warm_start_row(step, random))
        for step in range(1, steps + 1):
            writer.write_metrics(grpo_row(step, gain * (1 - np.exp(-step / 40)), random))
        writer.write_eval(eval_row(0, "warm start", 0.0))
        writer.write_eval(eval_row(steps // 2, f"step {steps // 2}", gain * 0.8))
        writer.write_eval(eval_row(steps, "after", gain))
    for label, lift, tricked in (("warm start", 0.0, 0.0), ("after", gain, fooled)):
        for each in measurements(label, lift, tricked, seed) if measured else ():
            append_row(run_dir / "measurements.jsonl", each.to_row())
    config = CONFIG.format(seed=seed, shuffled=str(shuffled).lower(), steps=steps)
    (run_dir / "config.toml").write_text(config)
    write_environment(run_dir, seed=seed, judge_accuracy=0.983, judge_total=360)
    for label, share in (("warm start", 0.3), ("after", 0.7)):
        save_gallery(run_dir, label, gallery_items(gallery, share, seed))
    return run_dir


WAYS: dict[Skill, dict[str, dict[str, float | str]]] = {
    "understand": {
        GREEDY: {"temperature": 0.0},
        "temperature 0.5": {"temperature": 0.5},
        AS_TRAINED: {"temperature": 1.0},
    },
    "generate": {
        LOW_NOISE: {"dynamics": "ode", "start_noise": 0.0},
        "ode noise 0.5": {"dynamics": "ode", "start_noise": 0.5},
        "ode": {"dynamics": "ode", "start_noise": 1.0},
        AS_TRAINED: {"dynamics": "sde", "start_noise": 1.0},
    },
}


def measurements(label: str, gain: float, fooled: float, seed: int) -> list[Measurement]:
    """Modes and samples once of all 512 prompts, a frontier of 8 samples of 64 of them.

    Accuracy falls by a fifth, and diversity rises, from the mode to the samples as trained.
    """
    random = np.random.default_rng((seed, round(1000 * (1 + gain)), round(1000 * fooled)))
    found = []
    for skill, ways in WAYS.items():
        for place, (sampling, settings) in enumerate(ways.items()):
            softness = place / (len(ways) - 1)
            rate = 0.4 + gain + 0.2 * (1 - softness)
            sizes = [] if sampling in (GREEDY, LOW_NOISE) else [(64, 8)]
            sizes += [(512, 1)] if sampling in (GREEDY, LOW_NOISE, AS_TRAINED) else []
            for prompts, group in sizes:
                gold = (random.random(prompts * group) < rate).astype(float)
                right = np.maximum(gold, random.random(len(gold)) < fooled)
                found.append(
                    Measurement(
                        step=0 if label == "warm start" else 120,
                        label=label,
                        skill=skill,
                        sampling=sampling,
                        settings=settings,
                        group_size=group,
                        uids=[f"{skill}-{i}" for i in range(prompts)],
                        clusters=[f"{i // 2}" for i in range(prompts)],
                        kinds=[list(TOTALS[skill])[i % 2] for i in range(prompts)],
                        scores={
                            "right": right.tolist(),
                            **({"gold": gold.tolist()} if skill == "generate" else {}),
                            "reward": (right + 0.1 * random.random(len(right))).tolist(),
                        },
                        diversity=[softness * (0.5 - gain)] * prompts if group > 1 else [],
                    )
                )
    return found


def warm_start_row(step: int, random: np.random.Generator) -> dict[str, object]:
    fall = np.exp(-step / 12)
    noise = 1 + random.normal(0, 0.03, 2)
    text, image = float((0.4 + 2.2 * fall) * noise[0]), float((0.2 + 0.8 * fall) * noise[1])
    return {
        "step": step,
        "phase": "warm_start",
        "loss/text": text,
        "loss/image": image,
        "loss/total": text + image,
        "time/total": 0.12,
    }


def grpo_row(step: int, lift: float, random: np.random.Generator) -> dict[str, object]:
    def near(value: float, spread: float) -> float:
        return float(np.clip(value + random.normal(0, spread), 0, 1))

    share = near(0.62 - lift, 0.05)
    return {
        "step": step,
        "phase": "grpo",
        "reward/understand/r_ins": near(0.45 + lift / 2, 0.03),
        "reward/generate/r_ins": near(0.55 + lift, 0.02),
        "reward/generate/r_sem": near(0.71 + lift / 4, 0.008),
        "reward/generate/r_kn": near(0.40 + lift, 0.03),
        "strict/understand": near(0.45 + lift / 2, 0.03),
        "strict/generate": near(0.28 + lift, 0.03),
        "partial/generate": near(0.60 + lift, 0.02),
        "gold/generate": near(0.26 + lift, 0.03),
        "share/understand/r_ins": 1.0,
        "share/generate/r_ins": share,
        "share/generate/r_sem": (1 - share) * 0.3,
        "share/generate/r_kn": (1 - share) * 0.7,
        "constant_groups/understand": near(0.35 + lift, 0.05),
        "constant_groups/generate": near(0.02 + lift / 3, 0.01),
        "kl/text": near(0.03 * lift, 4e-4),
        "kl/image": near(3e-5 * lift, 2e-7),
        "ratio/text/max": 1.0 + near(0.15, 0.05),
        "ratio/image/max": 1.0 + near(2e-4, 5e-5),
        "clip/text": near(0.02, 0.01),
        "clip/image": near(0.08, 0.02),
        "grad_norm": near(0.6 - lift, 0.06),
        "lr": 1e-4 * (1 - step / 400),
        "time/rollout": near(0.41, 0.01),
        "time/rewards": near(0.06, 0.005),
        "time/advantages": 0.0004,
        "time/pack": near(0.012, 0.001),
        "time/update": near(0.31, 0.01),
        "time/total": 0.81,
    }


def eval_row(step: int, label: str, gain: float) -> dict[str, object]:
    row: dict[str, object] = {"step": step, "label": label}
    for task, kinds in TOTALS.items():
        rates = {"correct": 0.45 + 0.6 * gain}
        if task == "generate":
            rates = {"strict": 0.28 + gain, "gold": 0.27 + gain}
            row["generate/partial"] = 0.60 + 0.8 * gain
        row[f"{task}/total"] = sum(kinds.values())
        for measure, rate in rates.items():
            for kind, total in kinds.items():
                row[f"{task}/{kind}/{measure}"] = round(rate * total)
                row[f"{task}/{kind}/total"] = total
            row[f"{task}/{measure}"] = sum(round(rate * total) for total in kinds.values())
    return row


def gallery_items(count: int, share: float, seed: int) -> list[GalleryItem]:
    """Half drawings of blocks, half questions about them, `share` of them right."""
    random = np.random.default_rng(seed)
    items = []
    for number in range(count):
        image = np.zeros((1, 16, 16), dtype=np.float32)
        row, column = divmod(number % 4, 2)
        image[0, 8 * row + 1 : 8 * row + 7, 8 * column + 1 : 8 * column + 7] = 0.9
        right = bool(random.random() < share)
        if number % 2:
            answer = "3" if right else "8"
            prompt = "Which digit is at the top-left?"
            item = GalleryItem("understand", f"q{number}", prompt, 7, image, answer, "3", right)
        else:
            image += random.random(image.shape, dtype=np.float32) * (1 - share)
            prompt = "a 3 at the top-left and a 7 at the bottom-right"
            item = GalleryItem("generate", f"g{number}", prompt, 7, image, None, None, right)
        items.append(item)
    return items
