"""completion_states: what linear ops make of it equals log_softmax of the model's own logits."""

from __future__ import annotations

import copy
import itertools
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import lvrpo
from lvrpo.integrations import versions
from lvrpo.testing import check_against_plain

pytest.importorskip("transformers", reason="pip install 'lvrpo[transformers]'")
import transformers

from lvrpo.integrations.transformers import completion_states, register, set_attention

SIZES = {
    "vocab_size": 48,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
#: Models whose logits are scaled or capped, each by options of another name.
HEADS: dict[str, dict[str, Any]] = {
    "Llama": {},
    "Gemma2": {"head_dim": 8, "final_logit_softcapping": 3.0},
    "Cohere": {"logit_scale": 0.25},
    "Granite": {"logits_scaling": 3.0},
    "HyperCLOVAX": {"logits_scaling": 0.3},
    "NanoChat": {},  # a cap that is no option
    "Phi": {},  # a bias
}
C, TEMPERATURE = 4, 0.7


def tiny(family: str, **options: Any) -> torch.nn.Module:
    config = getattr(transformers, f"{family}Config")(**SIZES, **HEADS.get(family, {}), **options)
    model = transformers.AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():  # biases of 0 would show nothing
        parameter.data += 0.02 * torch.randn_like(parameter)
    return model


def batch() -> dict[str, Tensor]:
    ids = torch.randint(3, 48, (2, 9))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def own_logprobs(model: torch.nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    logits = model(**inputs).logits[:, -C - 1 : -1]
    logprobs = torch.log_softmax(logits.to(torch.float64) / TEMPERATURE, dim=-1)
    return logprobs.gather(-1, inputs["input_ids"][:, -C:, None])[..., 0]


def our_logprobs(model: torch.nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    states = completion_states(model, inputs, C)
    assert states.hidden.shape[:2] == (2, C)
    return lvrpo.linear_logprobs(**states.head(TEMPERATURE), token_ids=inputs["input_ids"][:, -C:])


def gradients(logprobs: Tensor, model: torch.nn.Module) -> dict[str, Tensor]:
    model.zero_grad()
    logprobs.mean().backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {
        name: (gradient.full_tensor() if isinstance(gradient, DTensor) else gradient).clone()
        for name, gradient in found.items()
    }


def compare(model: torch.nn.Module, plain_model: torch.nn.Module) -> None:
    """`model` against the same weights without what wraps it, in fp64 and in fp32."""
    inputs = batch()
    gold_model = copy.deepcopy(plain_model).double()
    ours, plain = our_logprobs(model, inputs), own_logprobs(plain_model, inputs).float()
    gold = own_logprobs(gold_model, inputs)
    check_against_plain(ours.detach(), gold.detach(), plain.detach(), scale=10.0)
    of_ours = list(gradients(ours, model).values())
    of_gold, of_plain = gradients(gold, gold_model), gradients(plain, plain_model)
    assert len(of_ours) == len(of_gold)
    for (name, expected), gradient in zip(of_gold.items(), of_ours, strict=True):
        scale = float(expected.abs().max())
        check_against_plain(gradient, expected, of_plain[name], scale=scale, ulps=32, name=name)


@pytest.mark.parametrize("family", HEADS)
def test_equals_the_models_own_logits(family):
    model = tiny(family)
    compare(model, model)


@pytest.mark.parametrize("attention", ["eager", "lvrpo"])
@pytest.mark.parametrize("kind", ["lora", "prompts", "prefixes"])
def test_adapters_act(kind, attention):
    """Also those that put tokens, or keys and values, before the sequence."""
    peft = pytest.importorskip("peft", reason="pip install peft")
    virtual = {"num_virtual_tokens": 3, "task_type": "CAUSAL_LM"}
    configs = {
        "lora": lambda: peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False),
        "prompts": lambda: peft.PromptTuningConfig(**virtual),
        "prefixes": lambda: peft.PrefixTuningConfig(**virtual),
    }
    adapted = peft.get_peft_model(tiny("Llama"), configs[kind]())
    inputs = batch()
    inputs["attention_mask"][0, :3] = 0
    with torch.no_grad():
        own = own_logprobs(adapted, inputs)
        register()
        adapted.set_attn_implementation(attention)
        ours = our_logprobs(adapted, inputs)
    check_against_plain(ours, own, own.float(), scale=10.0)


def test_a_head_that_is_trained_beside_an_adapter_is_read():
    peft = pytest.importorskip("peft", reason="pip install peft")
    model = tiny("Llama", tie_word_embeddings=False)
    lora = peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"])
    adapted = peft.get_peft_model(copy.deepcopy(model), lora)
    inputs = batch()
    with torch.no_grad():
        adapted.base_model.model.lm_head.modules_to_save["default"].weight.mul_(2)
        ours, own = our_logprobs(adapted, inputs), own_logprobs(adapted, inputs)
        assert not torch.allclose(own, own_logprobs(model, inputs))
    assert torch.allclose(ours.double(), own)
    weight = completion_states(adapted, inputs, C).weight
    assert weight is adapted.base_model.model.lm_head.modules_to_save["default"].weight


@pytest.mark.parametrize("kind", ["PromptTuning", "PrefixTuning", "PromptEncoder"])
def test_an_adapter_with_tokens_that_a_span_mask_has_not_is_refused(kind):
    peft = pytest.importorskip("peft", reason="pip install peft")
    config = getattr(peft, f"{kind}Config")(num_virtual_tokens=2, task_type="CAUSAL_LM")
    adapted = peft.get_peft_model(tiny("Llama"), config)
    set_attention(adapted.get_base_model())
    inputs = {"input_ids": torch.ones(1, 4, dtype=torch.long)}
    inputs["span_mask"] = lvrpo.SpanMask.from_cu_seqlens(torch.tensor([0, 4]))
    with pytest.raises(ValueError, match="span_mask, but the adapter adds tokens"):
        completion_states(adapted, inputs)


def test_an_adapter_of_the_head_is_refused():
    peft = pytest.importorskip("peft", reason="pip install peft")
    adapted = peft.get_peft_model(tiny("Llama"), peft.LoraConfig(target_modules=["lm_head"]))
    with pytest.raises(ValueError, match="merge its adapter"):
        completion_states(adapted, batch(), C)
    with adapted.disable_adapter():
        assert our_logprobs(adapted, batch()).shape == (2, C)


@pytest.fixture
def one_process():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def fsdp2(model: torch.nn.Module, *, layers: bool) -> torch.nn.Module:
    for layer in model.model.layers if layers else ():
        fully_shard(layer)
    return fully_shard(model)


#: The first version of FSDP waits for the backward where the model's output is.
WRAPPERS = {
    "ddp": DistributedDataParallel,
    "ddp, unused parameters": lambda m: DistributedDataParallel(m, find_unused_parameters=True),
    "fsdp": lambda m: FullyShardedDataParallel(
        m, use_orig_params=True, device_id=torch.device("cpu")
    ),
    "fsdp2, the root": lambda m: fsdp2(m, layers=False),
    "fsdp2, layers and root": lambda m: fsdp2(m, layers=True),
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_wrappers_act_as_in_a_forward_of_their_own(wrapper, one_process):
    model = tiny("Gemma2", tie_word_embeddings=False)
    compare(WRAPPERS[wrapper](copy.deepcopy(model)), model)


def test_a_head_that_is_sharded_before_the_loss_is_refused(one_process):
    model = tiny("Llama", tie_word_embeddings=False)
    fully_shard(model.lm_head)
    with pytest.raises(ValueError, match="sharded again after the forward"):
        completion_states(fsdp2(model, layers=True), batch(), C)


def test_autocast_gives_what_its_head_would_read():
    model, inputs = tiny("Llama"), batch()
    with torch.autocast("cpu", torch.bfloat16):
        states = completion_states(model, inputs, C)
    assert states.hidden.dtype == states.weight.dtype == torch.bfloat16
    ours = lvrpo.linear_logprobs(**states.head(), token_ids=inputs["input_ids"][:, -C:])
    gradients(ours, model)
    assert all(p.grad.dtype == torch.float32 for p in model.parameters())


def test_aux_loss_is_handed_out():
    options = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    model, inputs = tiny("Qwen3Moe", **options), batch()
    asked = {**inputs, "output_router_logits": True}
    assert torch.equal(completion_states(model, asked, C).aux_loss, model(**asked).aux_loss)
    assert completion_states(model, inputs, C).aux_loss is None


def test_the_hooks_are_gone_whatever_happens():
    model = tiny("Llama")
    completion_states(model, batch(), C)
    with pytest.raises(ValueError, match="completion_length is 9, expected 1 to 8"):
        completion_states(model, batch(), 9)
    head = model.get_output_embeddings()
    assert not head._forward_hooks
    assert not head._forward_pre_hooks
    assert model(**batch()).logits.shape == (2, 9, 48)


class Behind(torch.nn.Module):
    """A model that does something else to its logits."""

    def __init__(self, change):
        super().__init__()
        self.model, self.change = tiny("Llama"), change

    def forward(self, **inputs):
        outputs = self.model(**inputs)
        outputs.logits = self.change(outputs.logits)
        return outputs


@pytest.mark.parametrize(
    "change",
    [
        lambda z: z + torch.arange(48.0),
        lambda z: z[..., :40],
        lambda z: z.masked_fill(torch.arange(48) == 7, -1e30),
        lambda z: z * torch.linspace(1, 1.1, 48),
        lambda z: -z,
        lambda z: z.clamp(-30, 30),
    ],
    ids=["bias", "cut", "mask", "scale per token", "sign", "clamp"],
)
def test_logits_that_no_linear_op_gives_are_refused(change):
    with pytest.raises(ValueError, match="no scale and soft-cap"):
        completion_states(Behind(change), batch(), C)
    assert completion_states(Behind(lambda z: z), batch(), C).logit_scale == 1


@pytest.mark.parametrize(("name", "value"), [("labels", None), ("logits_to_keep", 1)])
def test_inputs_about_logits_are_refused(name, value):
    with pytest.raises(ValueError, match=name):
        completion_states(tiny("Llama"), {**batch(), name: value}, C)


def test_a_model_without_a_head_is_refused():
    with pytest.raises(ValueError, match="has no head"):
        completion_states(tiny("Llama").model, batch(), C)


def test_outputs_in_16_bits_hide_the_scale(one_process):
    model = tiny("Cohere")
    fully_shard(model, mp_policy=MixedPrecisionPolicy(output_dtype=torch.bfloat16))
    with pytest.raises(ValueError, match="outputs are cast to"):
        completion_states(model, batch(), C)


def test_old_logprobs_need_no_graph():
    with torch.no_grad():
        states = completion_states(tiny("Gemma2"), batch(), C)
    assert not states.hidden.requires_grad
    assert states.softcap == 3


def test_a_release_outside_the_range_is_refused(monkeypatch):
    doors = (lambda: completion_states(tiny("Llama"), batch(), C), register)
    for found, door in itertools.product(("5.23.9", "5.25.0", "6.0"), doors):
        monkeypatch.setattr(versions.importlib.metadata, "version", lambda name, is_=found: is_)
        with pytest.raises(ImportError, match=rf"transformers is {found}.*>=5.24,<5.25"):
            door()
    for found, door in itertools.product(("5.24", "5.24.0rc1", "5.24.3+cu130"), doors):
        monkeypatch.setattr(versions.importlib.metadata, "version", lambda name, is_=found: is_)
        door()


def test_the_range_is_that_of_the_extra():
    pyproject = Path(__file__).parents[2] / "pyproject.toml"
    assert 'transformers = ["transformers>=5.24,<5.25",' in pyproject.read_text()


def test_it_is_imported_where_it_is_used():
    code = """
import importlib.metadata, sys
import lvrpo.integrations.transformers as ours
assert "transformers" not in sys.modules
def missing(name): raise importlib.metadata.PackageNotFoundError(name)
importlib.metadata.version = missing
try: ours.register()
except ModuleNotFoundError as error: print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "not installed: transformers; pip install 'lvrpo[transformers]'\n"
