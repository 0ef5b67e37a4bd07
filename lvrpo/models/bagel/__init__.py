"""BAGEL-MoT (arXiv 2505.14683): the model, its layout, and the folder that it is published in."""

from lvrpo.info import require

require("einops", "numpy", "safetensors")

from lvrpo.models.bagel.autoencoder import AutoencoderConfig, FluxAutoencoder
from lvrpo.models.bagel.checkpoint import BagelCheckpoint, load_bagel, save_bagel
from lvrpo.models.bagel.config import BagelConfig
from lvrpo.models.bagel.layout import BagelBuilder
from lvrpo.models.bagel.model import Bagel
from lvrpo.models.bagel.pictures import PictureSides
from lvrpo.models.bagel.policy import BagelPolicy
from lvrpo.models.bagel.tokenizer import QwenTokenizer

__all__ = [
    "AutoencoderConfig",
    "Bagel",
    "BagelBuilder",
    "BagelCheckpoint",
    "BagelConfig",
    "BagelPolicy",
    "FluxAutoencoder",
    "PictureSides",
    "QwenTokenizer",
    "load_bagel",
    "save_bagel",
]
