"""The kernels of `lvrpo._C` for NVIDIA GPUs."""

from __future__ import annotations

import torch

from lvrpo.backends import library
from lvrpo.backends.cpp import CompiledBackend


class CudaBackend(CompiledBackend):
    """`csrc/cuda`: an op has kernels here where the build registered some for CUDA tensors."""

    name = "cuda"
    device = "cuda"
    key = "CUDA"
    least_capability = (8, 0)  # setup.py compiles for no older one

    def why_unavailable(self) -> str:
        """What is missing: the extension, its CUDA kernels, or a GPU."""
        if library.MISSING:
            return library.MISSING
        if not library.KERNELS[self.key]:
            return "this build of lvrpo._C has no CUDA kernels"
        return "" if torch.cuda.is_available() else "torch sees no GPU"
