"""A frozen linear autoencoder: the principal components of patches are what a model draws."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


class LinearAutoencoder(nn.Module):
    """z = (x - mean) V^T w per patch, and back: x = (z / w) V + mean, clipped to [0, 1].

    Tokens are patches, row by row, or equal parts of what a patch has, the largest components
    first. One patch as large as the picture has no seams. Everything is a buffer: it is saved with
    a checkpoint and never trained. An unfitted module is there to load a state dict into.

    Args:
        channels: C of the pictures.
        height: of the pictures, a multiple of `patch`.
        width: of the pictures, a multiple of `patch`.
        patch: side of a square patch.
        dim: numbers per token.
        tokens_per_patch: k, that the numbers of a patch are divided into.
    """

    mean: Tensor  # [C * patch * patch]
    components: Tensor  # [k * dim, C * patch * patch]
    weight: Tensor  # [k * dim]

    def __init__(
        self,
        channels: int,
        height: int,
        width: int,
        *,
        patch: int,
        dim: int,
        tokens_per_patch: int = 1,
    ) -> None:
        super().__init__()
        size = channels * patch * patch
        if patch < 1 or height % patch or width % patch:
            raise ValueError(
                f"LinearAutoencoder: patch {patch} does not tile {height} x {width} pixels"
            )
        numbers = tokens_per_patch * dim
        if min(tokens_per_patch, dim) < 1 or numbers > size:
            raise ValueError(
                f"LinearAutoencoder: tokens_per_patch is {tokens_per_patch} and dim is {dim}, "
                f"expected a product of 1 to {size}"
            )
        self.channels, self.height, self.width = channels, height, width
        self.patch, self.dim, self.tokens_per_patch = patch, dim, tokens_per_patch
        self.register_buffer("mean", torch.zeros(size))
        self.register_buffer("components", torch.eye(size)[:numbers].clone())
        self.register_buffer("weight", torch.ones(numbers))

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of the tokens of one picture; those of a patch lie side by side."""
        return self.height // self.patch, self.width // self.patch * self.tokens_per_patch

    @property
    def tokens(self) -> int:
        """n, of one picture."""
        return math.prod(self.grid)

    @classmethod
    def fit(
        cls,
        images: Tensor,
        patch: int = 8,
        dim: int = 12,
        *,
        tokens_per_patch: int = 1,
        whiten: float = 0.5,
    ) -> LinearAutoencoder:
        """Fit the components on pictures, empty patches included.

        Args:
            images: [N, C, H, W] in [0, 1], of the training split only.
            patch: side of a square patch.
            dim: numbers per token.
            tokens_per_patch: that the numbers of a patch are divided into.
            whiten: 1 gives every component unit variance, 0 keeps their natural spread; between
                the two the strokes that tell digits apart outweigh the fine ones, yet none
                vanishes in the noise. All together always have mean square 1.
        """
        # Needed to fit only: a trained model runs without scikit-learn.
        from sklearn.decomposition import PCA

        if images.dim() != 4:
            raise ValueError(
                f"LinearAutoencoder.fit: images has shape {tuple(images.shape)}, "
                "expected [N, C, H, W]"
            )
        module = cls(*images.shape[1:], patch=patch, dim=dim, tokens_per_patch=tokens_per_patch)
        patches = module._patches(images.double()).flatten(0, 1)
        numbers = len(module.weight)
        if len(patches) < numbers:
            raise ValueError(
                f"LinearAutoencoder.fit: {len(patches)} patches for {numbers} numbers of each"
            )
        pca = PCA(numbers, svd_solver="full").fit(patches.numpy())
        module.mean.copy_(torch.from_numpy(pca.mean_))
        module.components.copy_(torch.from_numpy(pca.components_))
        spread = torch.from_numpy(pca.explained_variance_).clamp_min(1e-12).sqrt()
        weight = spread**-whiten
        rms = (spread * weight).square().mean().sqrt()
        module.weight.copy_(weight / rms)
        return module

    def encode(self, images: Tensor) -> Tensor:
        """[N, C, H, W] pictures to [N, n, dim] latents."""
        expected = (self.channels, self.height, self.width)
        if images.dim() != 4 or tuple(images.shape[1:]) != expected:
            raise ValueError(
                f"LinearAutoencoder.encode: images has shape {tuple(images.shape)}, "
                f"expected [N, {self.channels}, {self.height}, {self.width}]"
            )
        patches = self._patches(images) - self.mean
        numbers = patches @ (self.components * self.weight[:, None]).T
        return numbers.reshape(-1, self.tokens, self.dim)

    def decode(self, latents: Tensor) -> Tensor:
        """[N, n, dim] latents to [N, C, H, W] pictures in [0, 1]."""
        if latents.dim() != 3 or tuple(latents.shape[1:]) != (self.tokens, self.dim):
            raise ValueError(
                f"LinearAutoencoder.decode: latents has shape {tuple(latents.shape)}, "
                f"expected [N, {self.tokens}, {self.dim}]"
            )
        p, rows, cols = self.patch, self.height // self.patch, self.width // self.patch
        numbers = latents.reshape(-1, rows * cols, len(self.weight))
        patches = (numbers / self.weight) @ self.components + self.mean
        grid = patches.clamp(0, 1).reshape(-1, rows, cols, self.channels, p, p)
        return grid.permute(0, 3, 1, 4, 2, 5).reshape(-1, self.channels, self.height, self.width)

    def _patches(self, images: Tensor) -> Tensor:
        p, rows, cols = self.patch, self.height // self.patch, self.width // self.patch
        grid = images.reshape(-1, self.channels, rows, p, cols, p)
        return grid.permute(0, 2, 4, 1, 3, 5).reshape(-1, rows * cols, self.channels * p * p)

    def extra_repr(self) -> str:
        """Shapes, for `print(module)`."""
        sizes = f"{self.channels} x {self.height} x {self.width}, patch={self.patch}"
        return f"{sizes}, dim={self.dim}, tokens_per_patch={self.tokens_per_patch}"
