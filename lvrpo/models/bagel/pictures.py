"""Pictures of any size to sides that patches tile, as BAGEL resizes them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from lvrpo.models.bagel.config import BagelConfig


@dataclass(frozen=True)
class PictureSides:
    """What sides a picture may have; the defaults are BAGEL's for pictures to be read.

    Its bound on the number of pixels, 9,216 patches, is above 980 x 980 and never reached.
    """

    stride: int = 14  # pixels; both sides are multiples of it
    shortest: int = 224
    longest: int = 980

    @classmethod
    def of(cls, config: BagelConfig) -> PictureSides:
        """Those of a model: at least 16 patches along a side, at most its grid."""
        patch, most = config.image_patch, config.vision_grid
        return cls(patch, patch * min(16, most), patch * most)

    @classmethod
    def of_latents(cls, config: BagelConfig, token: int) -> PictureSides:
        """Those of pictures to be edited, whose latents a model reads: BAGEL's are 512 to 1024.

        Args:
            config: of the model.
            token: pixels along a side of a latent token.
        """
        return cls(token, token * (config.latent_grid // 2), token * config.latent_grid)

    def fit(self, height: int, width: int) -> tuple[int, int]:
        """(height, width) that a picture is resized to; its proportions are kept to a stride.

        A picture within the bounds whose sides are multiples of the stride stays as it is.
        """
        scale = min(self.longest / max(height, width), 1.0)
        scale = max(scale, self.shortest / min(height, width))
        sides = self._scaled(height, width, scale)
        if max(sides) > self.longest:
            sides = self._scaled(*sides, self.longest / max(sides))
        return sides

    def _scaled(self, height: int, width: int, scale: float) -> tuple[int, int]:
        return self._multiple(round(height * scale)), self._multiple(round(width * scale))

    def _multiple(self, side: int) -> int:
        return max(self.stride, round(side / self.stride) * self.stride)


def resize(picture: NDArray[np.float32], sides: PictureSides) -> NDArray[np.float32]:
    """[C, H, W] in [0, 1] -> [C, h, w] in [0, 1], bicubic with antialiasing; itself if it fits."""
    size = sides.fit(*picture.shape[1:])
    if size == picture.shape[1:]:
        return picture
    pixels = torch.from_numpy(np.ascontiguousarray(picture))[None]
    resized = F.interpolate(pixels, size, mode="bicubic", antialias=True, align_corners=False)
    found: NDArray[np.float32] = resized[0].clamp(0, 1).numpy()
    return found
