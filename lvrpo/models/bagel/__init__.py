"""BAGEL-MoT (arXiv 2505.14683): the model, its layout, and the folder that it is published in."""

from lvrpo.models.bagel.config import BagelConfig
from lvrpo.models.bagel.layout import BagelBuilder
from lvrpo.models.bagel.model import Bagel

__all__ = ["Bagel", "BagelBuilder", "BagelConfig"]
