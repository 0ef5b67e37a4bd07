"""What a folder becomes: what is trained of it, and what is refused by name."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from integrations.tiny_folders import processor, tokenizer
from integrations.tiny_models import FAMILIES, IMAGE, transformers

from lvrpo.data.example import Example
from lvrpo.models.huggingface.loading import Lora, check_weights, from_pretrained, make_policy
from lvrpo.models.huggingface.prompts import as_image
from lvrpo.models.sampling import Sampling
from lvrpo.testing import check_against_plain

QUESTION = Example("understand", "q", "w20 w21", answer="w30")
GROUPS = [(QUESTION, [[20, 21, 22], [23, 2], [24]])]
TOWER = {
    "qwen2_5_vl": "model.visual",
    "qwen3_vl": "model.visual",
    "smolvlm": "model.vision_model",
    "gemma3": "model.vision_tower",
    "llava": "model.vision_tower",
    "fast_vlm": "model.vision_tower",
}


def model_of(name: str) -> Any:
    torch.manual_seed(0)
    return FAMILIES[name].model()


def picture(height: int = 16, width: int = 16) -> np.ndarray:
    return np.random.default_rng(0).random((3, height, width), dtype=np.float32)


def asked(name: str) -> list[tuple[Example, list[list[int]]]]:
    image = picture() if FAMILIES[name].image_tokens else None
    example = Example("understand", "q", "w20 w21", image=image, answer="w30")
    return [(example, [[20, 21, 22], [23, 2], [24]])]


def gradients(policy: Any, name: str = "llama") -> dict[str, torch.Tensor]:
    policy.model.zero_grad()
    (pack,) = policy.packs(asked(name))
    policy.forward(pack).logprobs(pack).sum().backward()
    return {n: p.grad for n, p in policy.model.named_parameters() if p.grad is not None}


def test_a_folder_is_read_as_it_was_saved(tmp_path):
    model = model_of("llama")
    for part in (model, tokenizer()):
        part.save_pretrained(tmp_path)
    policy, made = from_pretrained(tmp_path), make_policy(model, tokenizer())
    (ours,), (theirs,) = policy.packs(GROUPS), made.packs(GROUPS)
    with torch.no_grad():
        found, expected = (p.forward(x).logprobs(x) for p, x in ((policy, ours), (made, theirs)))
    assert torch.equal(found, expected)


@pytest.mark.parametrize("name", TOWER)
def test_a_frozen_tower_is_not_trained_and_changes_nothing_else(name):
    model = model_of(name)
    whole = make_policy(copy.deepcopy(model), processor(name))
    frozen = make_policy(model, processor(name), frozen=[TOWER[name]])
    of_tower = {n for n in dict(whole.module.named_parameters()) if n.startswith(TOWER[name])}
    assert of_tower
    trained = dict(frozen.module.named_parameters())
    assert trained.keys() == dict(whole.module.named_parameters()).keys() - of_tower
    expected, found = gradients(whole, name), gradients(frozen, name)
    assert found.keys() == expected.keys() - of_tower
    assert all(torch.equal(found[n], expected[n]) for n in found)
    for parameter in trained.values():
        parameter.data += 1  # what is trained is what the model computes with
    assert all(torch.equal(p, trained[n]) for n, p in model.named_parameters() if n in trained)


@pytest.mark.parametrize("name", ["llama", "gemma2", *TOWER])
def test_checkpointed_layers_have_the_same_gradients(name):
    model = model_of(name)
    plain = gradients(make_policy(copy.deepcopy(model), processor(name)), name)
    policy = make_policy(model, processor(name), gradient_checkpointing=True)
    assert any(module.training for module in policy.model.modules())
    found = gradients(policy, name)
    assert found.keys() == plain.keys()
    assert all(torch.equal(found[n], plain[n]) for n in found)


@pytest.mark.parametrize("name", ["llama", "qwen2_5_vl", "smolvlm"])
def test_a_lora_begins_as_the_model_and_trains_its_matrices_alone(name):
    pytest.importorskip("peft", reason="pip install peft")
    model = model_of(name)
    plain = make_policy(copy.deepcopy(model), processor(name))
    policy = make_policy(model, processor(name), lora=Lora(rank=2))
    names = dict(policy.module.named_parameters())
    assert names
    assert all("lora_" in n for n in names)
    assert not any("vis" in n for n in names)
    example, _ = asked(name)[0]
    sampling = Sampling(max_tokens=5)
    ours, theirs = (
        p.sample_texts([example], 3, sampling=sampling, seed=0, step=0) for p in (policy, plain)
    )
    assert ours.token_ids == theirs.token_ids
    assert torch.equal(ours.logprobs, theirs.logprobs)
    assert gradients(policy, name).keys() == names.keys()
    for n, parameter in names.items():
        if "lora_B" in n:
            parameter.data += 0.3
    (pack,) = policy.packs(asked(name))
    with torch.no_grad():
        trained = policy.forward(pack).logprobs(pack)
        with policy.model.disable_adapter():
            reference = policy.forward(pack).logprobs(pack)
        (of_plain,) = plain.packs(asked(name))
        expected = plain.forward(of_plain).logprobs(of_plain)
    assert torch.equal(reference, expected)
    assert not torch.allclose(trained, expected)


def changed(name: str, **config: Any) -> tuple[Any, Any]:
    model = model_of(name)
    for key, value in config.items():
        setattr(model.config, key, value)
        if hasattr(model.generation_config, key):
            setattr(model.generation_config, key, value)
    return model, processor(name)


def small() -> tuple[Any, Any]:
    """A vocabulary that the tokenizer goes beyond."""
    model = model_of("llama")
    model.resize_token_embeddings(40)
    return model, tokenizer()


def without_template() -> tuple[Any, Any]:
    made = tokenizer()
    made.chat_template = None
    return model_of("llama"), made


def without_end() -> tuple[Any, Any]:
    model, made = changed("llama", eos_token_id=None)
    made.eos_token = None
    return model, made


def of_template(template: str, name: str = "llama") -> tuple[Any, Any]:
    made = processor(name)
    made.chat_template = template
    return model_of(name), made


def encoder() -> tuple[Any, Any]:
    """A model whose tokens see later ones."""
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.BertConfig(vocab_size=64, intermediate_size=16, **sizes)
    return transformers.AutoModelForCausalLM.from_config(config), tokenizer()


def hybrid() -> tuple[Any, Any]:
    config = transformers.Qwen3NextConfig(
        vocab_size=64,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        layer_types=["linear_attention", "full_attention"],
        num_experts=2,
        num_experts_per_tok=1,
        moe_intermediate_size=16,
    )
    return transformers.AutoModelForCausalLM.from_config(config), tokenizer()


@pytest.mark.parametrize(
    ("parts", "match"),
    [
        (small, "tokens up to 63 and the model embeddings for 40, expected a tokenizer of this"),
        (lambda: changed("llama", eos_token_id=7), "eos_token_id is 7 .* is 2 .'<eos>'"),
        (lambda: changed("llama", bos_token_id=9), "bos_token_id is 9 .* is 1 .'<bos>'"),
        (lambda: changed("llava", image_token_id=9), "image_token_id is 9 .* is 60 .'<image>'"),
        (without_template, "no chat template, expected one in the folder .* chat=False"),
        (lambda: of_template("{% for %}"), "chat template refuses a user's turn: TemplateSyntaxE"),
        (lambda: of_template("{{ raise_exception('no') }}"), "refuses a user's turn: .*: no"),
        (lambda: of_template("{{ messages[0].content | int / 0 }}"), "turn: ZeroDivisionError"),
        (
            lambda: of_template("{{ 'w9 ' + messages[0].content }}", "llava"),
            "turn: TypeError: .*; expected one that takes a list of parts as content .* chat=False",
        ),
        (lambda: of_template("w10 "), "chat template makes 'w10 ' of .*, expected these words"),
        (without_end, "has an end token"),
        (encoder, "BertLMHeadModel cannot be a policy: tokens of bert see later ones"),
        (hybrid, "Qwen3NextForCausalLM cannot be a policy: .*linear_attention"),
    ],
)
def test_parts_that_disagree_are_refused(parts, match):
    with pytest.raises(ValueError, match=match):
        make_policy(*parts())


@pytest.mark.parametrize(
    ("frozen", "match"),
    [
        (["model.visual"], "no parameter of LlamaForCausalLM is in 'model.visual', expected one"),
        (["model", "lm_head"], "nothing is left to train"),
    ],
)
def test_what_is_frozen_is_something_and_not_all(frozen, match):
    with pytest.raises(ValueError, match=match):
        make_policy(model_of("llama"), tokenizer(), frozen=frozen)


def test_a_lora_is_of_layers_that_there_are():
    pytest.importorskip("peft", reason="pip install peft")
    with pytest.raises(ValueError, match=r"lora targets \['eye'\]: .*has .*down_proj, .*q_proj"):
        make_policy(model_of("llama"), tokenizer(), lora=Lora(2, targets=("eye",)))


def test_a_folder_that_is_none(tmp_path):
    with pytest.raises(ValueError, match=r"there is no config.json, expected a folder"):
        from_pretrained(tmp_path)
    model_of("llama").save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=f"{tmp_path}: .*no file named.*safetensors"):
        from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "of tomorrow"}))
    with pytest.raises(ValueError, match="of tomorrow"):
        from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "name",
    ["config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"],
)
def test_a_damaged_file_of_a_folder_is_named(tmp_path, name):
    for part in (model_of("llama"), tokenizer()):
        part.save_pretrained(tmp_path)
    (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:-9])
    with pytest.raises(ValueError, match=f"^{tmp_path / name}: "):
        from_pretrained(tmp_path)


def resized(folder: Path, **sizes: int) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | sizes))


def cut_generation_config(folder: Path) -> None:
    """Its end tokens are those of answers; transformers would take others."""
    file = folder / "generation_config.json"
    file.write_bytes(file.read_bytes()[:-9])


def shard_is_gone(folder: Path) -> None:
    index = {"metadata": {}, "weight_map": {"lm_head.weight": "a.safetensors"}}
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("damage", "match"),
    [
        (lambda folder: (folder / "model.safetensors").unlink(), r"no .*model\.safetensors"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b""), "header"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"x" * 99), "header"),
        (shard_is_gone, r"a\.safetensors"),
        (lambda folder: resized(folder, num_hidden_layers=5), r"27 missing: model\.layers\.2.*,"),
        (lambda folder: resized(folder, num_hidden_layers=1), r"9 extra: model\.layers\.1\..*,"),
        (lambda folder: resized(folder, hidden_size=16), r"of another shape: lm_head\.weight .64,"),
        (lambda folder: resized(folder, model_type="t5"), "model_type is 't5', expected"),
        (cut_generation_config, r"generation_config\.json' is not a valid JSON file"),
    ],
)
def test_weights_are_those_of_the_model_or_refused(tmp_path, capfd, damage, match):
    """None is left as it was initialised or left out; headers are enough to know."""
    for part in (model_of("llama"), tokenizer()):
        part.save_pretrained(tmp_path)
    check_weights(tmp_path)
    damage(tmp_path)
    capfd.readouterr()
    for read in (from_pretrained, check_weights):
        with pytest.raises(ValueError, match=f"^{tmp_path}[:/].*{match}"):
            read(tmp_path)
    assert capfd.readouterr() == ("", "")  # transformers' own reports


def test_pictures_are_read_whole_or_refused():
    name, image = "llava", picture(16, 24)
    example = Example("understand", "wide", "w20", image=image, answer="w30")
    crops = processor(name)
    crops.image_processor.do_center_crop = True
    crops.image_processor.size = {"shortest_edge": 16}
    crops.image_processor.crop_size = {"height": 16, "width": 16}
    policy = make_policy(model_of(name), crops)
    with pytest.raises(ValueError, match="wide: the processor crops a picture of 16 x 24 to 16 x"):
        policy.reader.read(example)
    square = Example("understand", "square", "w20", image=picture(32, 32), answer="w30")
    assert policy.reader.read(square).token_ids.count(IMAGE) == 16
    text = make_policy(model_of("llama"), tokenizer())
    with pytest.raises(ValueError, match="wide: the question has a picture, and a llama reads"):
        text.reader.read(example)
    with pytest.raises(ValueError, match="2 <image> in the prompt and 1 pictures"):
        policy.reader.read(
            Example("understand", "two", "<image> w20 <image>", image=picture(), answer="w30")
        )
    left_out = processor(name)
    left_out.chat_template = tokenizer("").chat_template
    forgets = make_policy(model_of(name), left_out)
    with pytest.raises(ValueError, match="square: "):
        forgets.reader.read(square)


def test_several_pictures_stand_where_they_are_marked():
    policy = make_policy(model_of("gemma3"), processor("gemma3"))
    shown = [{"type": "image", "image": as_image(picture())} for _ in range(2)]
    words = [{"type": "text", "text": f"w{n}"} for n in (20, 21)]
    prompt = policy.reader.encode([shown[0], words[0], shown[1], words[1]])
    assert [mode for _, mode in prompt.spans] == ["causal", "full"] * 2 + ["causal"]
    assert [n for n, mode in prompt.spans if mode == "full"] == [4, 4]
    assert prompt.pictures["pixel_values"].shape[0] == 2
    mark = [prompt.token_ids.index(20), prompt.token_ids.index(21)]
    assert [prompt.token_ids[: mark[0]].count(IMAGE), prompt.token_ids[mark[1] :].count(IMAGE)] == [
        4,
        0,
    ]


def test_a_text_as_it_is_written():
    policy = make_policy(model_of("llama"), tokenizer(), chat=False)
    assert policy.reader.read(QUESTION).token_ids == [20, 21]


@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen3_vl"])
def test_videos_are_numbered_as_the_model_numbers_them(name):
    """A video's tokens and those after it: log-probs of the model's own positions."""
    model = model_of(name)
    grid, tokens = torch.tensor([[2, 4, 4]]), 8
    patches = torch.randn(int(grid.prod()), 3 * 2 * 4 * 4)
    video = model.config.video_token_id = 61
    is_qwen3 = name == "qwen3_vl"  # whose frames stand apart, between the seconds they are of
    between = [video] * 4 + [25] + [video] * 4 if is_qwen3 else [video] * tokens
    ids = torch.tensor([[20, 21, *between, 22]])
    inputs = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "mm_token_type_ids": torch.where(ids == video, 2, 0),
        "pixel_values_videos": patches,
        "video_grid_thw": grid,
    }
    seconds = {} if is_qwen3 else {"second_per_grid_ts": torch.tensor([2.0])}
    completion = [30, 31, 32, 2]
    longer = dict(inputs)
    for key, value in (("input_ids", None), ("attention_mask", 1), ("mm_token_type_ids", 0)):
        more = torch.tensor([completion]) if value is None else torch.full((1, 4), value)
        longer[key] = torch.cat([inputs[key], more], dim=1)
    with torch.no_grad():
        logits = model(**longer, **seconds, use_cache=False).logits[0, ids.shape[1] - 1 : -1]
        expected = logits.log_softmax(-1).gather(1, torch.tensor(completion)[:, None])[:, 0]
        policy = make_policy(model, processor(name))
        prompt = policy.reader.of_inputs({**inputs, **seconds})
        policy.reader.read = lambda example: prompt  # examples have no videos yet
        (pack,) = policy.packs([(QUESTION, [completion, completion])])
        found = policy.forward(pack).logprobs(pack)
    if not is_qwen3:
        assert int(prompt.position_ids[0].max()) > prompt.next_position  # seconds count
    plain = expected.repeat(2)
    check_against_plain(found, plain.double(), plain, scale=20.0)
