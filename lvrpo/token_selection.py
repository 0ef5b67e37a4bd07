"""Which tokens keep their policy term, where log-probs and entropies of the same pass decide.

T packed tokens of B sequences. 80/20 training (https://arxiv.org/abs/2506.01939) keeps the term of
the tokens with the largest entropy; the off-policy sequence mask (DeepSeek-V3.2,
https://arxiv.org/abs/2512.02556) takes it from sequences with a negative advantage that the policy
has moved away from.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from lvrpo.dtypes import number
from lvrpo.token_layout import sequences_of


def usable_tokens(
    asked: Tensor,  # [T] bool, the mask
    weight: Tensor,  # [T]
    advantage: Tensor,  # [T]
    *others: Tensor | None,  # [T] log-probs and entropy
) -> Tensor:
    """[T] which tokens that are asked for count: those whose inputs are finite, weights >= 0."""
    # Nobody asks for the advantage that a policy weight of 0 leaves out.
    usable = asked & (weight >= 0) & (advantage.isfinite() | (weight == 0))
    for data in (weight, *others):
        if data is not None:
            usable = usable & data.detach().isfinite()
    return usable


def quantile(values: Tensor, active: Tensor, fraction: float | Tensor) -> Tensor:
    """[] the `fraction` quantile of the active values, linear in between; inf where none is."""
    values, active = torch.where(active, values, torch.inf).reshape(-1), active.reshape(-1)
    if values.numel() == 0:
        return values.new_full((), torch.inf)
    # torch.quantile has a size limit and would need the active tokens gathered, which waits for the
    # device.
    ascending = values.sort().values
    last = (active.sum(dim=0, keepdim=True) - 1).clamp(min=0)
    rank = fraction * last.double()
    below = ascending.gather(0, rank.floor().long())
    above = ascending.gather(0, torch.minimum(rank.ceil().long(), last))
    return torch.lerp(below, above, rank.frac().to(values.dtype)).reshape(())


def is_near_sampler(
    logprobs: Tensor,  # [T] of the policy
    sampler_logprobs: Tensor,  # [T]; what is not finite was not reported
    advantage: Tensor,  # [T]
    active: Tensor,  # [T] bool
    cu_seqlens: Tensor,  # [B + 1]
    threshold: float | Tensor,
) -> Tensor:
    """[T] bool; False where A < 0 and the mean of sampler - logprobs over the active tokens of the
    sequence is above the threshold.
    """
    compared = active & sampler_logprobs.isfinite()
    drift = torch.where(compared, sampler_logprobs - logprobs, 0.0).double()
    # Offsets that do not fit are refused on a CPU; where nobody reads them they stay in range and
    # in order.
    bounds = cu_seqlens.clamp(0, len(active)).cummax(0).values

    def total(x: Tensor) -> Tensor:
        # Unlike index_add on a GPU, the same bits every time.
        return torch.segment_reduce(x.double(), "sum", offsets=bounds, unsafe=True)

    mean = total(drift) / total(active).clamp(min=1)
    far: Tensor = mean > number(threshold, mean)
    return ~((advantage < 0) & far[sequences_of(cu_seqlens, len(active))])


@dataclasses.dataclass(frozen=True)
class TokenSelection:
    """What a loss was asked to keep.

    Attributes:
        top_entropy: fraction of the active tokens, those of largest entropy; None for all.
        entropy_threshold: [] nats; tokens with at least this entropy; None for all.
        off_policy_threshold: nats per token; None with `sampler_logprobs` None.
        sampler_logprobs: [T] or None.
    """

    top_entropy: float | Tensor | None = None
    entropy_threshold: Tensor | None = None
    off_policy_threshold: float | Tensor | None = None
    sampler_logprobs: Tensor | None = None

    @property
    def by_entropy(self) -> bool:
        """Whether entropies decide."""
        return self.top_entropy is not None or self.entropy_threshold is not None

    def of(
        self,
        logprobs: Tensor,  # [T]
        entropy: Tensor | None,  # [T]
        advantage: Tensor,  # [T]
        active: Tensor,  # [T] bool
        cu_seqlens: Tensor,  # [B + 1]
    ) -> tuple[Tensor, Tensor]:
        """[T] bool: the active tokens that entropy keeps; and those of them that all keeps."""
        logprobs, high = logprobs.detach(), active
        threshold = self.entropy_threshold
        if self.by_entropy:
            assert entropy is not None
            entropy = entropy.detach()
            if threshold is None:
                assert self.top_entropy is not None
                threshold = quantile(entropy, active, 1.0 - self.top_entropy)
            high = active & (entropy >= threshold)
        if self.sampler_logprobs is None:
            return high, high
        assert self.off_policy_threshold is not None
        near = is_near_sampler(
            *(logprobs, self.sampler_logprobs, advantage, active, cu_seqlens),
            self.off_policy_threshold,
        )
        return high, high & near


EVERY_TOKEN = TokenSelection()
