"""`lvrpo plan` of a folder of transformers: counted from its configuration, held against a run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from integrations.test_huggingface_run import lvrpo, write
from integrations.tiny_models import FAMILIES, transformers
from torch.utils.flop_counter import FlopCounterMode

from lvrpo.models.huggingface.shape import transformer
from lvrpo.planning import flops
from lvrpo.planning.memory import Numerics
from lvrpo.planning.rows import Rows
from lvrpo.runs.config_file import load_config
from lvrpo.runs.plan import plan_run

BMM = torch.ops.aten.bmm


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma2", "llava", "qwen2_5_vl"])
def test_operations_are_those_of_the_text_model(name):
    model = FAMILIES[name].model().eval()
    model.set_attn_implementation("eager")
    count = 7
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(input_ids=torch.arange(20, 20 + count)[None], use_cache=False)
    found = dict(counter.get_flop_counts()["Global"])
    shape = transformer(model)
    rows = Rows(text=count, predictors=count, pairs=count * count)
    attention = found.pop(BMM, 0)
    # Frequencies times positions are a product of matrices, too.
    assert attention - flops.attentions(shape, rows) in (0, 2 * count * 4, 3 * 2 * count * 4)
    assert sum(found.values()) == flops.forward(shape, rows) - flops.attentions(shape, rows)


def planned(config: Path, *overrides: str) -> dict[str, Any]:
    found: dict[str, Any] = plan_run(load_config(config, overrides), Numerics()).to_dict()
    return found


def test_the_configuration_is_enough(tmp_path):
    config = write(tmp_path, warm=0)
    (tmp_path / "model" / "model.safetensors").unlink()
    found = planned(config)
    count = sum(p.numel() for p in FAMILIES["llama"].model().parameters())
    assert found["parameters"]["trained"] == count
    assert found["state"]["weights"] == found["state"]["reference"] == 4 * count
    assert not found["notes"]
    assert "trained parameters" in lvrpo("plan", "--config", config)
    assert json.loads(lvrpo("plan", "--config", config, "--json")) == found


def test_what_is_frozen_is_there_once(tmp_path):
    pytest.importorskip("peft", reason="pip install peft")
    found = planned(write(tmp_path, warm=0), "model.lora_rank=2")
    parameters, state = found["parameters"], found["state"]
    count = sum(p.numel() for p in FAMILIES["llama"].model().parameters())
    assert parameters["frozen"] == count
    assert 0 < parameters["trained"] < count
    assert state["weights"] == 4 * (parameters["trained"] + count)
    assert state["reference"] == state["gradients"] == 4 * parameters["trained"]


def test_what_is_not_counted_is_said(tmp_path):
    (note,) = planned(write(tmp_path, "llava", warm=0))["notes"]
    assert "vision tower are not counted" in note
    with pytest.raises(ValueError, match=r"layer \d of GptOssForCausalLM has matrices of .*plan"):
        transformer(FAMILIES["gpt_oss"].model())


@pytest.mark.slow
def test_the_peak_is_forecast_within_15_percent(tmp_path):
    write(tmp_path)
    torch.manual_seed(0)
    sizes = {"hidden_size": 256, "intermediate_size": 640, "num_hidden_layers": 6}
    heads = {"num_attention_heads": 8, "num_key_value_heads": 4}
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    made = transformers.LlamaConfig(vocab_size=64, **sizes, **heads, **ids)
    transformers.LlamaForCausalLM(made).save_pretrained(tmp_path / "model")
    overrides = [
        "model.family=huggingface",
        f"model.path={tmp_path / 'model'}",
        f"data.source={tmp_path / 'train.jsonl'}",
        f"data.eval_source={tmp_path / 'test.jsonl'}",
        "run.steps=2",
        "run.eval_items=4",
        "run.frontier_items=0",
        "warm_start.steps=0",
        "warm_start.generate_batch=0",
        "rollout.understand_prompts=4",
        "rollout.generate_prompts=0",
        "rollout.max_answer_tokens=32",
        "rewards.understand={ exact = 1.0 }",
        "rewards.truncated=keep",
        "optimizer.minibatches=1",
    ]
    script = Path(__file__).parents[1] / "planning" / "measured_peak.py"
    done = subprocess.run(
        [sys.executable, str(script), *overrides],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    measured = int(done.stdout)
    found = plan_run(load_config(overrides=overrides), Numerics()).to_dict()
    forecast = max(found["peak"].values())
    print(f"forecast {forecast / 1e6:.1f} MB, measured {measured / 1e6:.1f} MB")
    assert abs(forecast - measured) <= 0.15 * measured
