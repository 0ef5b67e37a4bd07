"""`lvrpo export`: a folder with the weights of a run, whole or not at all."""

from __future__ import annotations

import errno
import json
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from runs.test_bad_input import refused
from runs.tiny import command
from safetensors import SafetensorError

from lvrpo.models.unified.folder import load_unified, save_unified
from lvrpo.models.unified.latents import LinearAutoencoder
from lvrpo.models.unified.model import UnifiedConfig, UnifiedModel
from lvrpo.models.unified.policy import UnifiedPolicy
from lvrpo.models.unified.tokenizer import Tokenizer
from lvrpo.runs.checkpoint import checkpoints, load_checkpoint
from lvrpo.runs.inference import load_policy, load_reference, read_run
from lvrpo.trainer.sampling import answer_sampling


def exported(run: Path, folder: Path, *options: object) -> dict[str, torch.Tensor]:
    result = command("export", run, folder, *options)
    assert result.exit_code == 0, result.output
    return dict(load_unified(folder).module.state_dict())


def same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(ours[n], theirs[n]) for n in ours)


def test_the_folder_is_the_policy_that_the_run_samples(trained, tmp_path):
    found = exported(trained, tmp_path / "model")
    setup, parts, policy = load_policy(trained)
    assert same(found, dict(policy.module.state_dict()))
    again = load_unified(tmp_path / "model")
    assert again.answer_range == policy.answer_range
    assert again.latent_grid == policy.latent_grid
    questions = setup.data.source.examples("test", "understand", 4, 0)
    how = {"sampling": answer_sampling(setup.config.rollout), "seed": 1, "step": 0}
    ours, theirs = (each.sample_texts(questions, 2, **how) for each in (policy, again))
    assert ours.token_ids == theirs.token_ids
    assert ours.texts == theirs.texts
    assert torch.equal(ours.logprobs, theirs.logprobs)
    latents = torch.randn(2, *policy.latent_shape)
    assert torch.equal(policy.draw(latents), again.draw(latents))
    assert parts.family.words == again.tokenizer.words


def test_a_step_and_the_reference_can_be_chosen(trained, tmp_path):
    setup, parts = read_run(trained)
    reference = load_reference(trained, setup, parts)
    assert same(
        exported(trained, tmp_path / "reference", "--reference"),
        dict(reference.module.state_dict()),
    )
    kept = [load_checkpoint(path) for path in checkpoints(trained / "checkpoints")]
    assert len(kept) > 1
    for each in kept:
        found = exported(trained, tmp_path / f"{each.step}", "--step", each.step)
        assert same(found, {n: each.tensors[f"model.{n}"] for n in found})


def test_nothing_is_replaced_and_nothing_is_left_half(trained, tmp_path, monkeypatch):
    there = tmp_path / "there"
    there.mkdir()
    assert "is there already" in refused("export", trained, there)
    assert "no folder" in refused("export", trained, tmp_path / "a" / "b")
    assert "there are" in refused("export", trained, tmp_path / "new", "--step", 99)
    assert "model.lora_rank is 0" in refused("export", trained, tmp_path / "new", "--adapter")
    both = refused("export", trained, tmp_path / "new", "--reference", "--step", 3)
    assert "expected one of them" in both
    assert "is not a run" in refused("export", tmp_path, tmp_path / "new")

    for error in (
        OSError(errno.ENOSPC, "No space left on device", "model.safetensors"),
        SafetensorError("I/O error: No space left on device (os error 28)"),
    ):
        monkeypatch.setattr("lvrpo.models.unified.folder.save_model", Mock(side_effect=error))
        said = refused("export", trained, tmp_path / "new")
        assert f"{tmp_path / 'new'}: no space left on the disk" in said
    assert [path.name for path in tmp_path.iterdir()] == ["there"]


def test_every_size_is_written(tmp_path):
    """Of a policy whose sizes are all other than the defaults."""
    sizes = {"hidden": 20, "layers": 2, "heads": 2, "kv_heads": 1, "head_dim": 6, "mlp": 24}
    sizes |= {"vision_layers": 1, "vision_hidden": 12, "vision_heads": 2, "vision_mlp": 20}
    sizes |= {"image_channels": 2, "image_patch": 4, "latent_dim": 3, "timestep_dim": 10}
    config = UnifiedConfig(vocab_size=265, max_grid=9, tie_embeddings=True, **sizes)
    codec = LinearAutoencoder(2, 8, 16, patch=8, dim=3, tokens_per_patch=5)
    tokenizer = Tokenizer(["boat", "red"])
    policy = UnifiedPolicy(UnifiedModel(config), tokenizer, codec, codec.grid, (6, 263))
    save_unified(policy, tmp_path / "model")
    again = load_unified(tmp_path / "model")
    assert again.module.config == config
    assert same(dict(again.module.state_dict()), dict(policy.module.state_dict()))
    assert (again.latent_grid, again.answer_range) == (codec.grid, (6, 263))
    assert again.latent_shape == policy.latent_shape
    assert again.tokenizer.words == tokenizer.words
    with pytest.raises(FileExistsError, match="is not empty, expected a new folder"):
        save_unified(policy, tmp_path / "model")


def test_a_folder_that_is_none_is_refused(trained, tmp_path):
    folder = tmp_path / "model"
    exported(trained, folder)
    described = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(described | {"format": "other"}))
    with pytest.raises(ValueError, match="the format 'other', expected 'lvrpo-unified-1'"):
        load_unified(folder)
    (folder / "config.json").write_text(
        json.dumps(described | {"model": described["model"] | {"layers": 2}})
    )
    with pytest.raises(ValueError, match=r"model.safetensors: .*layers.1"):
        load_unified(folder)
    (folder / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"has no config\.json"):
        load_unified(folder)
