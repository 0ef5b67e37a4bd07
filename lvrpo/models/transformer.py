"""A model as the numbers that its cost follows from; every family describes its own."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

from torch import nn


@dataclass(frozen=True)
class Stack:
    """Layers of one width, of attention and feed-forward.

    Attributes:
        layers: how many.
        hidden: width of a row.
        heads: of queries.
        kv_heads: of keys and of values.
        head_dim: D.
        mlp: width of the feed-forward.
        gated: whether it has a gate beside that width, as SwiGLU.
        qk_norms: whether queries and keys have norms of their own.
        joint: whether one matrix projects queries, keys and values.
        layer_norms: whether norms are LayerNorm, one more after the last layer; else RMSNorm.
    """

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp: int
    gated: bool = True
    qk_norms: bool = True
    joint: bool = False
    layer_norms: bool = False

    @property
    def attended(self) -> int:
        """Hq * D, the width of what attention gives."""
        return self.heads * self.head_dim

    @property
    def qkv(self) -> int:
        """(Hq + 2 Hkv) * D, the width of queries, keys and values together."""
        return (self.heads + 2 * self.kv_heads) * self.head_dim

    @property
    def matrices(self) -> int:
        """Numbers in the matrices that multiply a row in one layer."""
        of_mlp = (3 if self.gated else 2) * self.mlp
        return self.hidden * (self.qkv + self.attended + of_mlp)


@dataclass(frozen=True)
class Transformer:
    """A language model that may read pictures and draw them.

    Attributes:
        language: its layers, each with a parameter set per expert.
        vocab: columns of the whole head.
        answers: of these, the columns that answers are sampled from and the loss projects on.
        patch: numbers of a patch of a picture that is read; 0 for a model that reads none.
        vision: layers that patches go through first, maybe none.
        connector: widths of the MLP from patches to the language model, both ends included.
        latent: numbers of a latent token of a drawing; 0 for a model that draws none.
        timestep: width of the embedding of a drawing's time.
        keeps_noise: whether a drawing keeps the noise of its steps.
        experts: whether rows that are drawn have parameters of their own, for which rows are put in
            another order around attention.
    """

    language: Stack
    vocab: int
    answers: int
    patch: int = 0
    vision: Stack | None = None
    connector: tuple[int, ...] = ()
    latent: int = 0
    timestep: int = 0
    keeps_noise: bool = True
    experts: bool = True

    @property
    def tower(self) -> Stack:
        """`vision`, or a stack of no layers."""
        return self.vision or Stack(0, 0, 0, 0, 0, 0)

    @property
    def connector_matrices(self) -> int:
        """Numbers in the connector's matrices."""
        return sum(before * after for before, after in pairwise(self.connector))


@dataclass(frozen=True)
class Parameters:
    """Parameters of a module, counted.

    Attributes:
        trained: those with a gradient.
        frozen: the others.
        unit: those of the largest part that is gathered at once where ranks share them: a layer, or
            a part outside of the layers, such as the head.
    """

    trained: int
    frozen: int
    unit: int

    @property
    def total(self) -> int:
        """All of them."""
        return self.trained + self.frozen

    @classmethod
    def of(cls, module: nn.Module) -> Parameters:
        """Count a module's, on whatever device it is; those of the meta device take no memory."""
        sizes = [p.numel() for p in module.parameters() if p.requires_grad]
        trained, total = sum(sizes), sum(p.numel() for p in module.parameters())
        unit = max(sum(p.numel() for p in part.parameters()) for part in _units(module))
        return cls(trained, total - trained, unit)


def _units(module: nn.Module) -> list[nn.Module]:
    """Every layer of a list of them, and the largest parts that have no such list."""
    if isinstance(module, nn.ModuleList):
        return list(module)
    if not any(isinstance(part, nn.ModuleList) for part in module.modules()):
        return [module]
    return [unit for child in module.children() for unit in _units(child)]
