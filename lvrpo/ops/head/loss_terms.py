"""A policy loss whose log-probs and entropies are all that is missing: one call of the kernels.

T tokens, B sequences.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch
from torch import Tensor

from lvrpo.backends import Backend
from lvrpo.token_layout import held_tokens, sequences_of
from lvrpo.token_selection import TokenSelection, usable_tokens


@dataclasses.dataclass(frozen=True)
class LossTerms:
    """What `lvrpo::grpo_loss_fwd` takes besides log-probs and entropies, and what comes around it.

    Attributes:
        old_logprobs: [T] or None; from here to `count_empty` in the order of the kernels.
        choices: by argument of the op, the names that say which arithmetic it does.
        selection: which tokens keep their policy term.
        bonus_scale: [] fp64: the coefficient of an entropy bonus with a mean of its own, over the
            tokens whose entropy is kept; None where kernels have it, or nobody.
    """

    old_logprobs: Tensor | None
    advantages: Tensor
    cu_seqlens: Tensor
    ref_logprobs: Tensor | None
    mask: Tensor | None
    policy_weights: Tensor | None
    loss_numbers: Tensor
    advantage_per_token: bool
    count_empty: bool
    choices: Mapping[str, str]
    selection: TokenSelection
    bonus_scale: Tensor | None

    @property
    def by_sampler(self) -> bool:
        """Whether the log-probs of a whole sequence decide about its terms."""
        return self.selection.sampler_logprobs is not None

    @property
    def selects(self) -> bool:
        """Whether tokens may lose their policy term."""
        return self.selection.by_entropy or self.by_sampler

    @property
    def of_whole_batch(self) -> bool:
        """Whether a token's gradient depends on the entropies of all tokens."""
        counts_kept = self.bonus_scale is not None and self.selection.by_entropy
        return self.selection.top_entropy is not None or counts_kept

    @property
    def is_plain(self) -> bool:
        """Whether kernels have all of the loss."""
        return not self.selects and self.bonus_scale is None

    def run(
        self, backend: Backend, logprobs: Tensor, entropy: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Loss, statistics, and the derivatives by log-probs and entropies [T]."""
        weights, bonus = self.policy_weights, None
        if not self.is_plain:
            weights, bonus = self._selected(logprobs, entropy)
        loss, statistics, dlogprobs, dentropy = backend.op("grpo_loss_fwd")(
            *(logprobs, self.old_logprobs, self.advantages, self.cu_seqlens, self.ref_logprobs),
            *(entropy, self.mask, weights, self.loss_numbers),
            *(self.advantage_per_token, self.count_empty),
            **self.choices,
        )
        if bonus is not None and entropy is not None:
            of_entropy = torch.where(bonus != 0, bonus * entropy, 0.0).sum()
            loss, dentropy = (loss - of_entropy).to(loss.dtype), -bonus.to(entropy.dtype)
        return loss, statistics, dlogprobs, dentropy

    def _selected(self, logprobs: Tensor, entropy: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """[T] policy weights, 0 where the term is not kept; and what multiplies entropies, fp64."""
        asked = held_tokens(self.cu_seqlens, len(logprobs))
        if self.mask is not None:
            asked = asked & self.mask
        weight = torch.ones_like(logprobs) if self.policy_weights is None else self.policy_weights
        advantage = self.advantages
        if not self.advantage_per_token:
            advantage = advantage[sequences_of(self.cu_seqlens, len(asked))]
        usable = usable_tokens(
            *(asked, weight, advantage, logprobs, self.old_logprobs, entropy, self.ref_logprobs)
        )
        high, kept = self.selection.of(logprobs, entropy, advantage, usable, self.cu_seqlens)
        # A token that does not count keeps what says so.
        weight = torch.where(usable & ~kept, 0.0, weight)
        if self.bonus_scale is None:
            return weight, None
        return weight, torch.where(high, self.bonus_scale / high.sum().clamp(min=1), 0.0)
