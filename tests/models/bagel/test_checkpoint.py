"""The published folder: read whole or not at all, and written back bit for bit."""

from __future__ import annotations

import pytest
import torch
from models.bagel.folder import AUTOENCODER, LLM, VIT, write_folder, write_json
from models.bagel.tiny import CONFIG, tiny_bagel
from safetensors.torch import load_file, save_file

from lvrpo.models.bagel import load_bagel, save_bagel


@pytest.fixture
def folder(tmp_path):
    write_folder(tmp_path / "bagel")
    return tmp_path / "bagel"


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("dtype", [None, torch.float32], ids=str)
@pytest.mark.parametrize("shards", [1, 3])
def test_a_folder_is_written_back_bit_for_bit(tmp_path, shards, dtype):
    write_folder(tmp_path / "read", shards)
    save_bagel(load_bagel(tmp_path / "read", dtype=dtype), tmp_path / "written")
    assert contents(tmp_path / "written") == contents(tmp_path / "read")


def test_what_is_read(folder):
    found = load_bagel(folder)
    assert found.model.config == CONFIG
    assert found.autoencoder.config == AUTOENCODER
    for name, tensor in tiny_bagel().state_dict().items():
        read = found.model.state_dict()[name]
        assert torch.equal(read, tensor.to(read.dtype)), name
    assert found.model.head.weight.dtype == torch.bfloat16
    assert found.model.head.weight.requires_grad
    assert not any(p.requires_grad for p in found.autoencoder.parameters())
    wide = load_bagel(folder, dtype=torch.float32)
    assert {p.dtype for p in wide.model.parameters()} == {torch.float32}


def test_what_was_trained_is_written(folder, tmp_path):
    found = load_bagel(folder)
    with torch.no_grad():
        found.model.llm2vae.bias.add_(1)
    save_bagel(found, tmp_path / "written")
    again = load_bagel(tmp_path / "written")
    assert torch.equal(again.model.llm2vae.bias, found.model.llm2vae.bias)


@pytest.mark.parametrize("file", ["ema.safetensors", "ae.safetensors"])
def test_all_wrong_tensors_are_listed(folder, file):
    state = load_file(folder / file)
    missing, shaped, *_ = sorted(state)
    state["a.stranger"] = state.pop(missing)
    state[shaped] = state[shaped][:-1].contiguous()
    save_file(state, folder / file)
    with pytest.raises(
        ValueError, match=r"1 missing: .*; 1 extra: a\.stranger; 1 of another"
    ) as error:
        load_bagel(folder)
    assert missing in str(error.value)
    assert shaped in str(error.value)
    assert "\n" not in str(error.value)


def test_a_tensor_in_two_files_is_refused(tmp_path):
    write_folder(tmp_path / "bagel", shards=2)
    first, second = sorted((tmp_path / "bagel").glob("model-*"))
    state = load_file(second)
    save_file(state | dict(list(load_file(first).items())[:1]), second)
    with pytest.raises(ValueError, match="1 in two files"):
        load_bagel(tmp_path / "bagel")


@pytest.mark.parametrize(
    "file", ["ema.safetensors", "ae.safetensors", "llm_config.json", "vit_config.json"]
)
def test_a_missing_file_is_named(folder, file):
    (folder / file).unlink()
    with pytest.raises(FileNotFoundError, match=file):
        load_bagel(folder)


@pytest.mark.parametrize("file", ["ema.safetensors", "ae.safetensors"])
@pytest.mark.parametrize("content", [b"", b"x" * 99])
def test_a_file_that_is_none_of_tensors_is_named(folder, file, content):
    (folder / file).write_bytes(content)
    with pytest.raises(ValueError, match=f"{file} is no file of tensors"):
        load_bagel(folder)


def test_a_missing_shard_is_named(tmp_path):
    write_folder(tmp_path / "bagel", shards=2)
    (tmp_path / "bagel/model-00002-of-00002.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="model-00002-of-00002"):
        load_bagel(tmp_path / "bagel")


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("llm_config.json", LLM | {"hidden_act": "gelu"}, "hidden_act = 'gelu', expected 'silu'"),
        ("llm_config.json", LLM | {"rope_scaling": {"rope_type": "yarn"}}, "rope_scaling"),
        ("llm_config.json", LLM | {"qk_norm": False}, "qk_norm = False, expected True"),
        ("vit_config.json", VIT | {"rope": True}, "rope = True, expected False"),
        ("vit_config.json", {"hidden_size": 12}, "num_hidden_layers is missing"),
        ("llm_config.json", [], "holds list, expected an object"),
        ("llm_config.json", LLM | {"num_hidden_layers": 3}, "28 missing: language_model.model.la"),
    ],
)
def test_a_folder_of_something_else_is_refused(folder, file, content, message):
    write_json(folder / file, content)
    with pytest.raises(ValueError, match=message):
        load_bagel(folder)


def test_shapes_alone_are_read(folder, tmp_path):
    found = load_bagel(folder, with_weights=False)
    expected = load_bagel(folder)
    for ours, theirs in ((found.model, expected.model), (found.autoencoder, expected.autoencoder)):
        assert {x.device.type for x in ours.state_dict().values()} == {"meta"}
        shapes = [{n: x.shape for n, x in m.state_dict().items()} for m in (ours, theirs)]
        assert shapes[0] == shapes[1]
    with pytest.raises(ValueError, match="read without weights: there is nothing to save"):
        save_bagel(found, tmp_path / "written")


def test_no_folder_is_written_over(folder):
    with pytest.raises(FileExistsError, match="not empty, expected a new folder"):
        save_bagel(load_bagel(folder), folder)
