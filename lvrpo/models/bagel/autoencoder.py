"""The autoencoder of FLUX, whose latents BAGEL draws: convolutions down to an eighth and back.

Modules are named as the tensors of the published `ae.safetensors`.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from dataclasses import dataclass

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from lvrpo.models.bagel.config import Shapes

NORM_GROUPS, NORM_EPS = 32, 1e-6


@dataclass(frozen=True)
class AutoencoderConfig:
    """Shape of a `FluxAutoencoder`; the defaults are the published one's."""

    channels: int = 3
    width: int = 128
    multipliers: tuple[int, ...] = (1, 2, 4, 4)  # of the width, level by level; each but one halves
    blocks: int = 2  # residual blocks of a level; the decoder has one more
    latent_channels: int = 16
    latent_patch: int = 2  # latents along a side of a token
    scale: float = 0.3611  # latents are scale * (z - shift), of about unit variance
    shift: float = 0.1159

    @property
    def reduction(self) -> int:
        """Pixels along a side of a latent."""
        return 1 << (len(self.multipliers) - 1)

    @property
    def token(self) -> int:
        """Pixels along a side of a latent token."""
        return self.reduction * self.latent_patch

    @classmethod
    def from_published(cls, shapes: Shapes) -> AutoencoderConfig:
        """What the shapes of the published tensors say; no file says it.

        Raises:
            ValueError: a tensor that says a size is missing.
        """
        levels = 1 + max(_numbers(r"encoder\.down\.(\d+)\.block\.0\.conv1\.weight", shapes))
        blocks = 1 + max(_numbers(r"encoder\.down\.0\.block\.(\d+)\.conv1\.weight", shapes))
        try:
            width, channels = shapes["encoder.conv_in.weight"][:2]
            out = [shapes[f"encoder.down.{i}.block.0.conv1.weight"][0] for i in range(levels)]
            latent_channels = shapes["decoder.conv_in.weight"][1]
        except KeyError as missing:
            raise ValueError(f"ae.safetensors has no {missing.args[0]}") from None
        return cls(
            channels=channels,
            width=width,
            multipliers=tuple(size // width for size in out),
            blocks=blocks,
            latent_channels=latent_channels,
        )


def _numbers(pattern: str, names: Shapes) -> list[int]:
    found = [int(match[1]) for name in names if (match := re.fullmatch(pattern, name))]
    if not found:
        raise ValueError(f"ae.safetensors has no tensor like {pattern!r}")
    return found


class ResidualBlock(nn.Module):
    """x + conv(act(norm(conv(act(norm(x)))))), x through a 1x1 convolution where widths differ."""

    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.norm1 = _norm(width)
        self.conv1 = nn.Conv2d(width, out, 3, padding=1)
        self.norm2 = _norm(out)
        self.conv2 = nn.Conv2d(out, out, 3, padding=1)
        if width != out:
            self.nin_shortcut = nn.Conv2d(width, out, 1)

    def forward(self, x: Tensor) -> Tensor:
        """[N, width, h, w] -> [N, out, h, w]."""
        inner = self.conv1(F.silu(self.norm1(x)))
        inner = self.conv2(F.silu(self.norm2(inner)))
        return inner + (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x)  # type: ignore[no-any-return]


class PixelAttention(nn.Module):
    """Every place of a picture attends to all of it, with one head."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = _norm(width)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(width, width, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        """[N, width, h, w] -> the same."""
        normed = self.norm(x)
        q, k, v = (rearrange(f(normed), "n c h w -> n (h w) c") for f in (self.q, self.k, self.v))
        attended = F.scaled_dot_product_attention(q, k, v)
        return x + self.proj_out(rearrange(attended, "n (h w) c -> n c h w", h=x.shape[2]))  # type: ignore[no-any-return]


class Downsample(nn.Module):
    """Half the size; the picture is padded below and at the right only."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        """[N, width, h, w] -> [N, width, h / 2, w / 2]."""
        return self.conv(F.pad(x, (0, 1, 0, 1)))  # type: ignore[no-any-return]


class Upsample(nn.Module):
    """Twice the size by repetition, then a convolution."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """[N, width, h, w] -> [N, width, 2 h, 2 w]."""
        return self.conv(F.interpolate(x, scale_factor=2, mode="nearest"))  # type: ignore[no-any-return]


class Encoder(nn.Module):
    """Pictures to the mean and the log-variance of their latents."""

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        widths = [config.width * multiplier for multiplier in config.multipliers]
        self.conv_in = nn.Conv2d(config.channels, config.width, 3, padding=1)
        inner = config.width
        levels = []
        for level, width in enumerate(widths):
            parts: dict[str, nn.Module] = {"block": _blocks(inner, width, config.blocks)}
            if level + 1 < len(widths):
                parts["downsample"] = Downsample(width)
            levels.append(nn.Sequential(OrderedDict(parts)))
            inner = width
        self.down = nn.Sequential(*levels)
        self.mid = _middle(inner)
        self.norm_out = _norm(inner)
        self.conv_out = nn.Conv2d(inner, 2 * config.latent_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """[N, channels, H, W] in [-1, 1] -> [N, 2 * latent_channels, H / 8, W / 8]."""
        x = self.mid(self.down(self.conv_in(x)))
        return self.conv_out(F.silu(self.norm_out(x)))  # type: ignore[no-any-return]


class Decoder(nn.Module):
    """Latents to pictures; its levels are numbered as the encoder's, from the largest pictures."""

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        widths = [config.width * multiplier for multiplier in config.multipliers]
        inner = widths[-1]
        self.conv_in = nn.Conv2d(config.latent_channels, inner, 3, padding=1)
        self.mid = _middle(inner)
        levels = []
        for level, width in reversed(list(enumerate(widths))):
            parts: dict[str, nn.Module] = {"block": _blocks(inner, width, config.blocks + 1)}
            if level:
                parts["upsample"] = Upsample(width)
            levels.append(nn.Sequential(OrderedDict(parts)))
            inner = width
        self.up = nn.ModuleList(reversed(levels))
        self.norm_out = _norm(inner)
        self.conv_out = nn.Conv2d(inner, config.channels, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        """[N, latent_channels, h, w] -> [N, channels, 8 h, 8 w], about [-1, 1]."""
        x = self.mid(self.conv_in(z))
        for level in reversed(self.up):
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(x)))  # type: ignore[no-any-return]


class FluxAutoencoder(nn.Module):
    """Pictures to latent tokens and back; frozen where BAGEL is trained.

    A token is a square of `latent_patch` x `latent_patch` latents, row by row, its numbers in the
    order of row, column, channel; tokens are row by row.
    """

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)

    def encode(self, images: Tensor, noise: Tensor | None = None) -> Tensor:
        """Latent tokens of pictures.

        Args:
            images: [N, C, H, W] in [0, 1]; H and W are multiples of `config.token`.
            noise: [N, latent_channels, H / 8, W / 8], standard normal: a sample of the latents'
                distribution, as the published code takes; None for their mean.

        Returns:
            [N, tokens, numbers per token].
        """
        config = self.config
        sides = images.shape[2:]
        if (
            images.dim() != 4
            or images.shape[1] != config.channels
            or any(side % config.token for side in sides)
        ):
            raise ValueError(
                f"FluxAutoencoder.encode: images have shape {tuple(images.shape)}, expected "
                f"[N, {config.channels}, H, W] with H and W multiples of {config.token}"
            )
        weight = self.encoder.conv_in.weight
        mean, log_variance = self.encoder(2 * images.to(weight) - 1).chunk(2, dim=1)
        z = mean if noise is None else mean + (0.5 * log_variance).exp() * noise.to(mean)
        z = config.scale * (z - config.shift)
        p = config.latent_patch
        tokens: Tensor = rearrange(z, "n c (h p) (w q) -> n (h w) (p q c)", p=p, q=p)
        return tokens

    def decode(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        """Pictures of latent tokens.

        Args:
            tokens: [N, height * width, numbers per token].
            grid: (height, width) in tokens.

        Returns:
            [N, C, H, W] in [0, 1].
        """
        config = self.config
        p = config.latent_patch
        expected = grid[0] * grid[1], config.latent_channels * p**2
        if tuple(tokens.shape[1:]) != expected:
            raise ValueError(
                f"FluxAutoencoder.decode: tokens have shape {tuple(tokens.shape)}, expected "
                f"[N, {expected[0]}, {expected[1]}]"
            )
        z = rearrange(tokens, "n (h w) (p q c) -> n c (h p) (w q)", h=grid[0], p=p, q=p)
        z = z.to(self.decoder.conv_in.weight) / config.scale + config.shift
        return (self.decoder(z) * 0.5 + 0.5).clamp(0, 1)  # type: ignore[no-any-return]


def _norm(width: int) -> nn.GroupNorm:
    return nn.GroupNorm(NORM_GROUPS, width, eps=NORM_EPS)


def _blocks(width: int, out: int, count: int) -> nn.Sequential:
    return nn.Sequential(*(ResidualBlock(width if i == 0 else out, out) for i in range(count)))


def _middle(width: int) -> nn.Sequential:
    return nn.Sequential(
        OrderedDict(
            block_1=ResidualBlock(width, width),
            attn_1=PixelAttention(width),
            block_2=ResidualBlock(width, width),
        )
    )
