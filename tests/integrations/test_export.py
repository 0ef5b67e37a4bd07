"""`lvrpo export` of folders: what transformers, PEFT and BAGEL's reader make of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from integrations import test_bagel_run as bagel
from integrations.test_huggingface_run import lvrpo, write
from integrations.tiny_models import transformers

from lvrpo.models.bagel import load_bagel
from lvrpo.models.huggingface.loading import from_pretrained
from lvrpo.runs.inference import load_policy

TOKENS = torch.tensor([[1, 20, 7, 11, 33]])


def logits(model: Any) -> torch.Tensor:
    model.eval().set_attn_implementation("eager")
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=TOKENS).logits
    return found


def train(folder: Path, name: str, model: str, *, warm: int = 2) -> Path:
    """What moves the weights is the warm start: random answers have no reward."""
    config = write(folder, name, model, warm=warm)
    lvrpo("train", folder / "run", "--config", config, "--set", "warm_start.lr=0.05")
    return folder / "run"


@pytest.mark.parametrize(
    ("name", "model"),
    [("llama", ""), ("llama", "gradient_checkpointing = true"), ("llava", ""), ("gemma3", "")],
)
def test_transformers_reads_what_was_trained(tmp_path, name, model):
    """The same logits bit for bit, and the same tokens of a prompt."""
    run, out = train(tmp_path, name, model), tmp_path / "out"
    lvrpo("export", run, out)
    kind = transformers.AutoModelForImageTextToText
    if name == "llama":
        kind = transformers.AutoModelForCausalLM
    found, reported = kind.from_pretrained(out, output_loading_info=True)
    assert not any(reported.values())
    setup, _, policy = load_policy(run)
    expected = logits(policy.model)
    assert torch.equal(logits(found), expected)
    assert not torch.equal(logits(kind.from_pretrained(tmp_path / "model")), expected)
    (question,) = setup.data.source.examples("test", "understand", 1, 0)
    again = from_pretrained(out).reader.read(question)
    assert again.token_ids == policy.reader.read(question).token_ids


def test_the_warm_start_is_the_folder_where_there_was_none(tmp_path):
    run, out = train(tmp_path, "llama", "", warm=0), tmp_path / "out"
    lvrpo("export", run, out, "--reference")
    kind = transformers.AutoModelForCausalLM
    first = logits(kind.from_pretrained(tmp_path / "model"))
    assert torch.equal(logits(kind.from_pretrained(out)), first)


def test_a_lora_is_merged_or_alone(tmp_path):
    peft = pytest.importorskip("peft", reason="pip install peft")
    run = train(tmp_path, "llama", "lora_rank = 2")
    lvrpo("export", run, tmp_path / "adapter", "--adapter")
    lvrpo("export", run, tmp_path / "merged")
    _, _, policy = load_policy(run)
    expected = logits(policy.model)
    kind = transformers.AutoModelForCausalLM
    base = kind.from_pretrained(tmp_path / "model")
    first = logits(base)
    adapted = peft.PeftModel.from_pretrained(base, tmp_path / "adapter")
    assert torch.equal(logits(adapted), expected)
    merged = logits(kind.from_pretrained(tmp_path / "merged"))
    torch.testing.assert_close(merged, expected)
    assert (expected - first).abs().max() > 100 * (merged - expected).abs().max()
    assert not (tmp_path / "adapter" / "model.safetensors").exists()
    assert not (tmp_path / "merged" / "adapter_config.json").exists()


def test_bagel_is_written_as_it_is_published(tmp_path):
    run, out = tmp_path / "run", tmp_path / "out"
    lvrpo("train", run, "--config", bagel.write(tmp_path))
    lvrpo("export", run, out)
    read = load_bagel(tmp_path / "bagel")
    assert sorted(p.name for p in out.iterdir()) == sorted(
        p.name for p in (tmp_path / "bagel").iterdir()
    )
    found = load_bagel(out).model.state_dict()
    _, _, policy = load_policy(run)
    trained = policy.module.state_dict()
    for name, tensor in read.model.state_dict().items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], trained[name].to(tensor.dtype))
    assert any(not torch.equal(found[n], x) for n, x in read.model.state_dict().items())
