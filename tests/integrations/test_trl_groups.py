"""With `share_prompts` equal prompts stand once, and the update is that of separate sequences."""

from __future__ import annotations

import random
import re
import types
from pathlib import Path

import pytest
import torch

pytest.importorskip("trl", reason="pip install 'lvrpo[trl]'")
import transformers
import trl
from integrations.test_trl_trainer import same_steps
from integrations.trl_runs import SIZES, run, tiny_model, trainer

from lvrpo.integrations.prompt_groups import (
    ATTENTION_DROPOUT,
    SEE_AHEAD,
    check_model,
    group_prompts,
    grouped_inputs,
)
from lvrpo.integrations.transformers import completion_states, set_attention
from lvrpo.integrations.trl import GRPOTrainer


def batch(seed: int, groups: int, members: int) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Prompts of several lengths, padded on the left, and completions, some of them empty."""
    draw = random.Random(seed)
    length, longest = 6, 5
    prompts = [
        [draw.randrange(3, 14) for _ in range(draw.randrange(1, length + 1))] for _ in range(groups)
    ]
    rows = [prompt for prompt in prompts for _ in range(members)]
    draw.shuffle(rows)
    ids = torch.zeros(len(rows), length + longest, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(rows):
        count = draw.randrange(longest + 1)
        start, end = length - len(prompt), length + count
        ids[row, start:length] = torch.tensor(prompt)
        ids[row, length:end] = torch.randint(3, 14, (count,))
        mask[row, start:end] = 1
    return ids, mask, longest


@pytest.mark.parametrize("seed", range(8))
def test_every_row_sees_its_own_sequence_and_no_other(seed):
    ids, mask, longest = batch(seed, groups=seed % 4 + 1, members=seed % 3 + 1)
    groups = group_prompts(ids, mask, longest)
    seen, held = groups.mask.to_dense(), ids.flatten()[groups.tokens]
    prompt_length = ids.shape[1] - longest
    for sequence in range(len(ids)):
        for token in range(longest):
            if not mask[sequence, prompt_length + token]:
                continue
            before = mask[sequence].bool().clone()
            before[prompt_length + token :] = False
            row = groups.row_index[sequence, token]
            assert held[seen[row]].tolist() == ids[sequence][before].tolist()
    prompts = {tuple(row[:prompt_length].tolist()) for row in ids}
    assert len(groups.owners) == len(prompts)
    laid_out = sum(sum(token > 0 for token in prompt) for prompt in prompts)
    assert len(groups.tokens) == laid_out + int(mask[:, prompt_length:].sum())


def test_prompts_of_other_images_are_other_prompts():
    ids, mask, longest = batch(0, groups=1, members=4)
    assert len(group_prompts(ids, mask, longest, ["cat", "dog", "cat", "dog"]).owners) == 2


def test_a_sequence_without_a_prompt_is_refused():
    ids, mask, longest = batch(0, groups=1, members=2)
    mask[1] = 0
    with pytest.raises(ValueError, match="sequence 1 has no prompt"):
        group_prompts(ids, mask, longest)


@pytest.mark.parametrize(
    "options",
    [
        {"num_iterations": 2},
        pytest.param(
            {
                "family": "Qwen3",
                "loss_type": "grpo",
                "importance_sampling_level": "sequence",
                "mask_truncated_completions": True,
                "gradient_accumulation_steps": 2,
            },
            marks=pytest.mark.slow,
        ),
    ],
)
def test_ten_steps_with_shared_prompts_are_those_of_trl(options, tmp_path):
    sizes = {"per_device_train_batch_size": 8, **options}
    theirs = run(trl.GRPOTrainer, tmp_path, **sizes)
    same_steps(run(GRPOTrainer, tmp_path, given={"share_prompts": True}, **sizes), theirs)


def test_a_model_with_positions_in_three_directions():
    """Qwen2-VL: two pictures of other shapes, each laid out and encoded once for two answers."""
    torch.manual_seed(0)
    model = transformers.Qwen2VLForConditionalGeneration(
        transformers.Qwen2VLConfig(
            text_config={
                **{name: size for name, size in SIZES.items() if name != "head_dim"},
                "hidden_size": 32,
                "rope_parameters": {
                    "rope_type": "default",
                    "rope_theta": 1e4,
                    "mrope_section": [2, 3, 3],
                },
            },
            vision_config={
                "depth": 1,
                "embed_dim": 16,
                "hidden_size": 32,
                "num_heads": 2,
                "patch_size": 4,
                "spatial_merge_size": 2,
            },
            image_token_id=5,
            video_token_id=6,
            vision_start_token_id=3,
            vision_end_token_id=4,
        )
    )
    rows, longest = [], 3
    for answer in range(4):
        grid = torch.tensor([[1, 4, 4 + 4 * (answer % 2)]])
        patches = torch.sin(torch.arange(grid.prod() * 96).view(-1, 96) * (answer % 2 + 1.0))
        image = [5] * int(grid.prod() // 4)
        prompt = [3, *image, 4, 7, 8][-11:]
        ids = torch.tensor([[0] * (11 - len(prompt)) + prompt + [9 + answer, 10, 11]])
        rows.append(
            {
                "input_ids": ids,
                "attention_mask": (ids > 0).long(),
                "pixel_values": patches,
                "image_grid_thw": grid,
                "mm_token_type_ids": (ids == 5).long(),
            }
        )
    separate = [completion_states(model, row, longest).hidden[0] for row in rows]

    set_attention(model)
    encoded = []
    model.model.visual.register_forward_pre_hook(
        lambda tower, args, kwargs: encoded.append(kwargs.get("grid_thw", args[-1])),
        with_kwargs=True,
    )
    inputs, row_index = grouped_inputs(model, rows, longest)
    hidden = completion_states(model, inputs).hidden[0]
    assert inputs["input_ids"].shape[1] < sum(int(row["attention_mask"].sum()) for row in rows)
    assert [len(grids) for grids in encoded] == [2]
    for sequence, expected in enumerate(separate):
        assert (hidden[row_index[sequence]] - expected).abs().max() < 1e-5


def test_models_whose_prompts_are_not_causal_are_known():
    folders = Path(transformers.__file__).parent / "models"
    ahead = re.compile(r"block_sequence_ids|blockwise_overlay|or_mask_function=")
    found = {
        path.parent.name
        for path in folders.glob("*/modeling_*.py")
        if ahead.search(path.read_text(encoding="utf-8"))
    }
    assert found == SEE_AHEAD


def model_of(config, adapter=None):
    return types.SimpleNamespace(config=config, active_peft_config=adapter)


@pytest.mark.parametrize("name", ATTENTION_DROPOUT)
@pytest.mark.parametrize("part", ["text_config", "vision_config"])
def test_dropout_of_attention_is_refused_in_every_part(name, part):
    config = transformers.LlavaConfig()
    check_model(model_of(config))
    setattr(getattr(config, part), name, 0.1)
    with pytest.raises(ValueError, match=rf"{name} is 0.1, .*expected 0$"):
        check_model(model_of(config))


@pytest.mark.parametrize(
    "config",
    [
        transformers.Lfm2Config(num_hidden_layers=2, layer_types=["conv", "full_attention"]),
        transformers.Qwen3NextConfig(),
        transformers.Llama4TextConfig(),
    ],
    ids=lambda config: config.model_type,
)
def test_layers_that_no_mask_is_for_are_refused(config):
    with pytest.raises(ValueError, match=r"share_prompts is True, .* has layers that"):
        check_model(model_of(config))


@pytest.mark.parametrize("kind", ["PromptTuning", "PrefixTuning", "PromptEncoder"])
def test_an_adapter_that_lengthens_prompts_is_refused(kind, tmp_path):
    peft = pytest.importorskip("peft", reason="pip install peft")
    config = getattr(peft, f"{kind}Config")
    adapter = config(num_virtual_tokens=2, task_type="CAUSAL_LM")
    given = {"share_prompts": True, "peft_config": adapter}
    with pytest.raises(ValueError, match=r"share_prompts is True, but the adapter"):
        trainer(GRPOTrainer, tiny_model("Qwen3"), tmp_path, given=given)


def test_noise_that_depends_on_the_length_of_a_sequence_is_refused(tmp_path):
    given = {"share_prompts": True}
    with pytest.raises(ValueError, match=r"neftune_noise_alpha is 5.0, .*expected None"):
        trainer(GRPOTrainer, tiny_model(), tmp_path, neftune_noise_alpha=5.0, given=given)


def test_a_mean_over_the_tokens_of_experts_is_refused(tmp_path):
    model = tiny_model("Qwen2Moe", num_experts=4, moe_intermediate_size=16, decoder_sparse_step=1)
    with pytest.raises(ValueError, match=r"router_aux_loss_coef is .*expected 0"):
        trainer(GRPOTrainer, model, tmp_path, given={"share_prompts": True})
