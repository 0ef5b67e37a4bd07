"""A run of a folder's model in two processes is that of one: samples, metrics and weights."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import shared_directories
import shared_families
import torch
from distributed.test_runs import apart, assert_near, assert_same
from integrations import test_bagel_run, test_huggingface_run
from integrations.test_bagel_run import lvrpo
from rank_pool import Ranks, ranks

from lvrpo.models.bagel import load_bagel
from lvrpo.runs.checkpoint import checkpoints, load_checkpoint, load_newest

pytest.importorskip("transformers")

SHARD = "run.shard=true"
CASES = {
    "bagel": ("bagel", ()),
    "bagel, guided edits": (
        "bagel",
        ("model.frozen=[]", "rollout.guidance=4.0", "rollout.guidance_image=1.5"),
    ),
    "bagel, unequal packs": (
        "bagel",
        ("optimizer.max_rows=60", "model.gradient_checkpointing=false"),
    ),
    "answers": ("llama", ()),
    "answers, adapters": ("llama", ("model.lora_rank=2",)),
    "a tied head": ("smollm3", ()),
    "a frozen tower": (
        "llava",
        ('model.frozen=["model.vision_tower"]', "model.gradient_checkpointing=true"),
    ),
    "unequal packs": ("smolvlm", ("optimizer.max_rows=20", "optimizer.minibatches=2")),
}


@pytest.fixture(scope="module")
def group() -> Iterator[Ranks]:
    with ranks(2) as two:
        yield two


def write(folder: Path, family: str) -> tuple[Path, str]:
    """A configuration, whose data has pictures in one half alone, and a reward that varies."""
    of_bagel = family == "bagel"
    config = (test_bagel_run if of_bagel else test_huggingface_run).write(
        folder, *([] if of_bagel else [family])
    )
    for split in ("train", "test"):
        path = folder / f"{split}.jsonl"
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        images = [line.pop("image") for line in lines if "image" in line]
        for line, image in zip(lines, images, strict=False):
            line["image"] = image
        path.write_text("\n".join(map(json.dumps, lines)))
    (folder / "lengths.py").write_text(
        "def length(samples):\n    return [float(len(text)) for text in samples.texts]\n"
    )
    return config, f"rewards.understand={{ '{folder}/lengths.py:length' = 1.0 }}"


@pytest.mark.parametrize("name", CASES)
def test_shards_of_two_are_the_weights_of_one(group, tmp_path, name):
    family, settings = CASES[name]
    config, reward = write(tmp_path, family)
    alone = shared_families.run(config, (*settings, reward), torch.float64)
    assert not alone.error
    assert alone.rows[-1]["constant_groups/understand"] < 1
    shared = (*settings, reward, SHARD)
    for told in group.run(shared_families.run, config, shared, torch.float64):
        assert_same(told, alone)


@pytest.mark.parametrize("name", ["bagel", "answers", "answers, adapters"])
def test_checkpoints_of_shards_are_read_by_one(group, tmp_path, name):
    """And by two again: the run is evaluated, exported, and goes on."""
    family, settings = CASES[name]
    config, reward = write(tmp_path, family)
    rate = "optimizer.final_lr_fraction=1.0", "optimizer.warmup_steps=0"
    settings = (*settings, reward, *rate, "run.eval_items=1")
    whole, shared, exported = (tmp_path / name for name in ("whole", "shared", "exported"))
    shared_directories.run_of(whole, config, *settings)
    group.run(shared_directories.run_of, shared, config, *settings, "run.steps=1", SHARD)
    newest = load_newest(shared / "checkpoints")
    assert len([*newest.path.glob("*.distcp")]) == 2
    lvrpo("eval", shared)
    lvrpo("export", shared, exported)
    if family == "bagel":
        for name, tensor in load_bagel(exported).model.state_dict().items():
            assert torch.equal(tensor, newest.tensors[f"model.{name}"].to(tensor.dtype)), name
    shared_directories.run_of(shared, None, "run.steps=2", "run.shard=false")
    ours, theirs = (load_newest(each / "checkpoints") for each in (shared, whole))
    begun = load_checkpoint(checkpoints(whole / "checkpoints")[0]).tensors
    assert (ours.step, ours.tensors.keys()) == (theirs.step, theirs.tensors.keys())
    assert not [*ours.path.glob("*.distcp")]
    assert apart(ours.tensors, theirs.tensors) < 0.1 * apart(begun, theirs.tensors)
    group.run(shared_directories.run_of, shared, None, "run.steps=3", SHARD)
    assert load_newest(shared / "checkpoints").step == theirs.step + 1


@pytest.mark.parametrize("family", ["bagel", "llama"])
def test_two_processes_in_bf16(group, tmp_path, family):
    config, reward = write(tmp_path, family)
    settings = (reward, "run.precision=bf16", "run.steps=1")
    alone = shared_families.run(config, settings, torch.float32)
    told = group.run(shared_families.run, config, settings, torch.float32)
    sharded = group.run(shared_families.run, config, (*settings, SHARD), torch.float32)
    assert_near(told, sharded, alone)


@pytest.mark.parametrize("name", ["bagel", "answers, adapters", "a frozen tower"])
def test_a_process_keeps_parts_alone(group, tmp_path, name):
    """Of what is trained, and of what is frozen, nothing is kept whole beside them."""
    family, settings = CASES[name]
    config, _ = write(tmp_path, family)
    for had, kept in group.run(shared_families.whole_parameters, config, (*settings, SHARD)):
        assert had > 0 == kept
