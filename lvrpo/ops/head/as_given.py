"""A policy loss of arguments that are as kernels take them, which then nobody checks twice.

The kernels of `lvrpo._C` refuse what does not fit, though not in words that say what to do. So a
call whose dtypes are theirs goes to them at once, and only one that they refuse, or find a token at
fault in, through all of `loss_inputs`.

T packed tokens, B sequences.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lvrpo import checks
from lvrpo.backends.bound import Bound
from lvrpo.dtypes import numbers_by_name
from lvrpo.kept import kept_tensor
from lvrpo.params.policy_loss import LOSS_NUMBERS, LossParams


class GivenTerms(NamedTuple):
    """As `LossTerms`, of the arguments of a call; see `lvrpo::grpo_loss_fwd`."""

    old_logprobs: Tensor | None
    advantages: Tensor
    cu_seqlens: Tensor
    ref_logprobs: Tensor | None
    mask: Tensor | None
    policy_weights: Tensor | None
    numbers: Tensor
    advantage_per_token: bool
    count_empty: bool

    def fit(self, logprobs: Tensor, entropy: Tensor | None) -> bool:
        """Whether shapes and devices are what kernels take, for kernels that do not look."""
        shape, device = logprobs.shape, logprobs.device
        of_tokens = self.old_logprobs, self.ref_logprobs, entropy, self.mask, self.policy_weights
        for tensor in of_tokens:
            if tensor is not None and (tensor.shape != shape or tensor.device != device):
                return False
        advantages, cu_seqlens = self.advantages, self.cu_seqlens
        if advantages.dim() != 1 or cu_seqlens.dim() != 1 or cu_seqlens.device != device:
            return False
        fits = not self.advantage_per_token or advantages.shape == shape
        return fits and cu_seqlens.numel() > 0 and advantages.device == device

    def run(
        self, bound: Bound, logprobs: Tensor, entropy: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Loss, statistics, and the derivatives by log-probs and entropies [T]."""
        old, advantages, cu_seqlens, ref, *rest = self
        found: tuple[Tensor, Tensor, Tensor, Tensor] = bound.kernels(
            logprobs, old, advantages, cu_seqlens, ref, entropy, *rest
        )
        return found


def given_terms(
    op: str,
    logprobs: Any,
    old_logprobs: Any,
    advantages: Any,
    cu_seqlens: Any,
    ref_logprobs: Any,
    entropy: Any,
    mask: Any,
    policy_weights: Any,
    denominator: Any,
    params: LossParams,
) -> GivenTerms | None:
    """What kernels take, if it is what was given; None where something is to be made of it first.

    Offsets may be a list, or int32. `op` is for the error of a list that is none of numbers.
    Shapes, devices and values are for the kernels to refuse.
    """
    if torch.compiler.is_compiling() or type(logprobs) is not Tensor or logprobs.dim() != 1:
        return None
    dtype = logprobs.dtype
    if not (dtype is torch.float32 or dtype is torch.float64):
        return None
    if not (isinstance(advantages, Tensor) and advantages.dtype is dtype):
        return None
    for tensor in (old_logprobs, ref_logprobs, entropy, policy_weights):
        if tensor is not None and not (isinstance(tensor, Tensor) and tensor.dtype is dtype):
            return None
    if isinstance(cu_seqlens, list):
        cu_seqlens = checks.as_tensor(op, "cu_seqlens", cu_seqlens, logprobs.device)
    if not isinstance(cu_seqlens, Tensor) or cu_seqlens.dtype not in (torch.int64, torch.int32):
        return None
    if mask is not None and not (isinstance(mask, Tensor) and mask.dtype is torch.bool):
        return None
    if denominator is not None and not (
        type(denominator) in (float, int) and 0 < denominator < math.inf
    ):
        return None
    if params.beta > 0 and ref_logprobs is None:
        return None
    if params.entropy_coef != 0 and (entropy is None or params.entropy_aggregation is not None):
        return None
    per_token = advantages.numel() != cu_seqlens.numel() - 1
    if per_token and params.needs_sequence_advantages:
        return None
    if not per_token and advantages.numel() == logprobs.numel():  # the caller has to say which
        return None
    return GivenTerms(
        *(old_logprobs, advantages, cu_seqlens.long(), ref_logprobs, mask, policy_weights),
        *(_numbers(params, denominator), per_token, params.count_empty),
    )


@kept_tensor
def _numbers(params: LossParams, denominator: float | None) -> Tensor:
    return numbers_by_name(LOSS_NUMBERS, params.numbers(denominator))
