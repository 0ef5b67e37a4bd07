"""The arguments of a policy loss over tokens, checked and in one form, and how its result is told.

T packed tokens or [B, C] padded ones, B sequences.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lvrpo import checks
from lvrpo.dtypes import numbers, numbers_by_name
from lvrpo.ops.head.loss_terms import LossTerms
from lvrpo.ops.head.targets import Targets
from lvrpo.params.loss_metrics import STATISTICS, LossMetrics
from lvrpo.params.policy_loss import LOSS_NUMBERS, FusedPolicyLoss, LossParams
from lvrpo.token_layout import Level, TokenLayout, token_layout
from lvrpo.token_selection import EVERY_TOKEN, TokenSelection

#: What advantages, masks and weights are given as.
Numbers = Tensor | Sequence[Any]


@dataclasses.dataclass(frozen=True)
class LossInputs:
    """What a policy loss takes besides log-probs, packed and in the dtype of its result.

    Attributes:
        layout: of the tokens, as they were given.
        params: the loss.
        old_logprobs: [T] or None.
        ref_logprobs: [T] or None.
        mask: [T] bool or None.
        policy_weights: [T] or None.
        advantages: [T] with `per_token`, else [B].
        per_token: whether the advantages are per token.
        divisor: a denominator that is a tensor: it divides the result of the op, which then needs
            no read from the device.
        denominator: for the op; None for its own count.
        entropy: [T] or None; attached to its graph.
        lost: [] how many tokens that the mask let in were taken out of it; None for none.
        selection: which tokens keep their policy term; its thresholds are checked.
    """

    layout: TokenLayout
    params: LossParams
    old_logprobs: Tensor | None
    ref_logprobs: Tensor | None
    mask: Tensor | None
    policy_weights: Tensor | None
    advantages: Tensor
    per_token: bool
    divisor: Tensor | None
    denominator: float | None
    entropy: Tensor | None = None
    lost: Tensor | None = None
    selection: TokenSelection = EVERY_TOKEN

    def tensors(self) -> tuple[Tensor | None, ...]:
        """All of them, to choose a backend by."""
        return (
            *(self.old_logprobs, self.ref_logprobs, self.entropy, self.mask),
            *(self.policy_weights, self.advantages, self.layout.offsets),
            self.selection.sampler_logprobs,
        )

    def numbers(self) -> Tensor:
        """The numbers of the loss as kernels take them."""
        denominator = self.denominator if self.divisor is None else 1.0
        return numbers_by_name(LOSS_NUMBERS, self.params.numbers(denominator))

    def bonus_scale(self) -> Tensor | None:
        """[] fp64: the coefficient of an entropy bonus with its own mean, times the divisor."""
        params = self.params
        if params.entropy_aggregation is None or params.entropy_coef == 0:
            return None
        scale = numbers(params.entropy_coef)[0]
        return scale if self.divisor is None else scale * self.divisor

    def terms(self) -> LossTerms:
        """The loss as kernels take it."""
        return LossTerms(
            *(self.old_logprobs, self.advantages, self.layout.offsets, self.ref_logprobs),
            *(self.mask, self.policy_weights, self.numbers()),
            *(self.per_token, self.params.count_empty, self.params.choices()),
            *(self.selection, self.bonus_scale()),
        )

    def for_reference(self) -> dict[str, Any]:
        """Keyword arguments of a reference, but for the log-probs and `entropy`."""
        same = "old_logprobs", "advantages", "ref_logprobs", "mask", "policy_weights"
        found = {name: getattr(self, name) for name in (*same, "selection", "params")}
        denominator = self.denominator if self.divisor is None else self.divisor
        level = "token" if self.per_token else "sequence"
        found |= {"denominator": denominator, "level": level}
        return {**found, "cu_seqlens": self.layout.offsets}

    def of_targets(self, targets: Targets, strange: Tensor | None) -> LossInputs:
        """The same without tokens [T] that are ignored, those `strange` among them counted.

        The mask is there then, and holds no token that no sequence has.
        """
        asked = targets.token_ids != targets.ignore_index
        mask, lost = self.mask, None
        if strange is not None:
            held = self.layout.held()
            mask = held if mask is None else mask & held
            lost = (strange & mask).sum()
        mask = asked if mask is None else mask & asked
        return dataclasses.replace(self, mask=mask, lost=lost)

    def finish_fused(
        self, loss: Tensor, statistics: Tensor, logprobs: Tensor, entropy: Tensor
    ) -> FusedPolicyLoss:
        """As `finish`, with what an op that forms log-probs found, in the caller's shape."""
        loss, metrics = self.finish(loss, statistics, logprobs)
        restore = self.layout.restore
        return FusedPolicyLoss(loss, metrics, restore(logprobs), restore(entropy))

    def divided(self, loss: Tensor, statistics: Tensor) -> tuple[Tensor, Tensor]:
        """Loss and statistics of kernels, by the divisor that they do not know."""
        if self.divisor is None:
            return loss, statistics
        # Where it is not positive nobody refused it: nothing may count.
        positive = self.divisor > 0
        divisor = torch.where(positive, self.divisor, 1.0)
        loss = torch.where(positive, loss / divisor.to(loss.dtype), 0.0)
        at = STATISTICS.index("policy_loss")
        divided = torch.where(positive, statistics[at] / divisor, 0.0)
        return loss, statistics.select_scatter(divided, 0, at)

    def finish(
        self, loss: Tensor, statistics: Tensor, logprobs: Tensor
    ) -> tuple[Tensor, LossMetrics]:
        """Loss and metrics, after naming the token that is at fault where values may be read."""
        if self.lost is not None:
            at = STATISTICS.index("dropped_tokens")
            statistics = statistics.select_scatter(statistics[at] + self.lost, 0, at)
        statistics = checks.as_data(statistics)
        if checks.check_values(loss):
            found = dict(zip(STATISTICS, statistics.tolist(), strict=True))
            self._refuse(loss.item(), found, logprobs)
        return loss, LossMetrics.from_statistics(statistics)

    def _refuse(self, loss: float, found: dict[str, float], logprobs: Tensor) -> None:
        op = self.layout.op
        sampler = self.selection.sampler_logprobs
        if sampler is not None:
            bad = sampler.isinf() if self.mask is None else sampler.isinf() & self.mask
            self._refuse_first("sampler_logprobs", sampler, bad, "finite, or NaN for none")
        if found["dropped_tokens"] > 0:
            self._refuse_tokens(logprobs.detach())
        divisor = self.denominator if self.divisor is None else float(self.divisor)
        if divisor == 0 and found["active_tokens"] > 0:
            raise ValueError(
                f"{op}: denominator is {divisor}, but {int(found['active_tokens'])} tokens are "
                "active; expected > 0"
            )
        if not math.isfinite(loss):
            raise ValueError(
                f"{op}: the loss is {loss}, from finite inputs; "
                f"params.log_ratio_limit is {self.params.log_ratio_limit}, and no limit or a large "
                "one lets ratios overflow"
            )

    def _refuse_tokens(self, logprobs: Tensor) -> None:
        asked = torch.ones_like(logprobs, dtype=torch.bool) if self.mask is None else self.mask
        expected = "a finite number where the mask lets the token in"
        inputs = {
            "logprobs": logprobs,
            "old_logprobs": self.old_logprobs,
            "ref_logprobs": self.ref_logprobs,
            "entropy": self.entropy,
        }
        for name, tensor in inputs.items():
            if tensor is not None:
                self._refuse_first(
                    name, tensor.detach(), asked & ~tensor.detach().isfinite(), expected
                )
        if self.policy_weights is not None:
            weights = self.policy_weights
            bad = asked & ~((weights >= 0) & weights.isfinite())
            self._refuse_first("policy_weights", weights, bad, "finite and >= 0")
        bad = ~self.advantages.isfinite()
        if self.per_token:
            if self.policy_weights is not None:
                asked = asked & (self.policy_weights != 0)
            self._refuse_first("advantages", self.advantages, bad & asked, expected)
        checks.refuse_first(self.layout.op, "advantages", self.advantages, bad, "a finite number")

    def _refuse_first(self, name: str, values: Tensor, bad: Tensor, expected: str) -> None:
        restore = self.layout.restore
        checks.refuse_first(self.layout.op, name, restore(values), restore(bad), expected)


def loss_inputs(
    op: str,
    tokens: tuple[str, Tensor],
    dtype: torch.dtype,
    *,
    advantages: Numbers,
    cu_seqlens: Tensor | Sequence[int] | None,
    level: Level | None,
    denominator: float | Tensor | None,
    top_entropy: float | None = None,
    entropy_threshold: float | Tensor | None = None,
    off_policy_threshold: float | None = None,
    params: LossParams,
    **of_tokens: Numbers | None,
) -> LossInputs:
    """Check the arguments of a policy loss and bring them to one form.

    `tokens` is the name and the value of the argument that says how the tokens are laid out,
    `dtype` that of the result, and `of_tokens` are old_logprobs, ref_logprobs, sampler_logprobs,
    mask, policy_weights and, of an op that takes it, entropy; everything is as the op has it.

    Raises:
        ValueError: they do not fit each other.
    """
    name, like = tokens
    layout = token_layout(op, name, like, cu_seqlens)
    flat: dict[str, Tensor | None] = dict.fromkeys(of_tokens)
    for key, given in of_tokens.items():
        if given is None:
            continue
        tensor = checks.as_tensor(op, key, given, like.device)
        if key in ("old_logprobs", "ref_logprobs", "sampler_logprobs", "entropy"):
            checks.check_floating(op, key, tensor)
        tensor = layout.flatten(key, tensor)
        if key == "entropy":
            flat[key] = tensor.to(dtype)
            continue
        tensor = checks.as_mask(op, key, tensor) if key == "mask" else checks.as_data(tensor, dtype)
        # The reference saves what it is given.
        flat[key] = checks.as_saved(tensor)
    values = checks.as_data(checks.as_tensor(op, "advantages", advantages, like.device), dtype)
    only = f"ratio {params.ratio!r}" if params.needs_sequence_advantages else None
    per_token = layout.per_token("advantages", values, level, only_sequences=only)
    checks.check_same_device(
        op, **{name: like}, **flat, advantages=values, cu_seqlens=layout.offsets
    )
    if params.beta > 0 and flat["ref_logprobs"] is None:
        raise ValueError(f"{op}: ref_logprobs is None, but beta is {params.beta}")
    sampler = flat.pop("sampler_logprobs", None)
    selection = _selection(
        *(op, top_entropy, entropy_threshold, off_policy_threshold),
        *(sampler, flat["old_logprobs"]),
    )
    _check_denominator(op, denominator)
    divisor = None
    if isinstance(denominator, Tensor):
        divisor, denominator = denominator.detach().reshape(()).double(), None
    offsets = checks.as_saved(layout.offsets)
    if offsets is not layout.offsets:
        layout = dataclasses.replace(layout, offsets=offsets)
    return LossInputs(
        layout,
        params,
        **flat,
        advantages=checks.as_saved(values if values.dim() == 1 else values.reshape(-1)),
        per_token=per_token,
        divisor=divisor,
        denominator=denominator,
        selection=selection,
    )


def _selection(
    op: str,
    top_entropy: float | None,
    entropy_threshold: float | Tensor | None,
    off_policy_threshold: float | None,
    sampler_logprobs: Tensor | None,
    old_logprobs: Tensor | None,
) -> TokenSelection:
    """Which tokens keep their policy term, checked."""
    given = top_entropy, entropy_threshold, off_policy_threshold, sampler_logprobs
    if all(x is None for x in given):
        return EVERY_TOKEN
    if top_entropy is not None and entropy_threshold is not None:
        raise ValueError(
            f"{op}: top_entropy is {top_entropy} and entropy_threshold is {entropy_threshold}, "
            "expected one of them"
        )
    if top_entropy is not None and not 0 <= top_entropy <= 1:
        raise ValueError(f"{op}: top_entropy is {top_entropy}, expected in [0, 1], or None")
    if top_entropy == 1:  # nothing to wait for
        top_entropy = None
    if entropy_threshold is not None:
        entropy_threshold = _as_threshold(op, entropy_threshold)
    if off_policy_threshold is None:
        if sampler_logprobs is not None:
            raise ValueError(
                f"{op}: sampler_logprobs is given, but off_policy_threshold is None, and nothing "
                "else uses it"
            )
    elif not off_policy_threshold >= 0:
        raise ValueError(
            f"{op}: off_policy_threshold is {off_policy_threshold}, expected >= 0, or None"
        )
    elif sampler_logprobs is None:
        sampler_logprobs = old_logprobs
    return TokenSelection(top_entropy, entropy_threshold, off_policy_threshold, sampler_logprobs)


def _as_threshold(op: str, threshold: float | Tensor) -> Tensor:
    if not isinstance(threshold, Tensor):
        if threshold != threshold:
            raise ValueError(f"{op}: entropy_threshold is {threshold}, expected a number, or None")
        return numbers(threshold)[0]
    if threshold.numel() != 1:
        shape = tuple(threshold.shape)
        raise ValueError(f"{op}: entropy_threshold has shape {shape}, expected one number")
    return checks.as_saved(threshold.detach().reshape(()))


def _check_denominator(op: str, denominator: float | Tensor | None) -> None:
    if isinstance(denominator, Tensor):
        if denominator.numel() != 1:
            shape = tuple(denominator.shape)
            raise ValueError(f"{op}: denominator has shape {shape}, expected one number")
        if not checks.check_values(denominator):
            return
        denominator = float(denominator)
    if denominator is not None and not 0 <= denominator < math.inf:
        raise ValueError(f"{op}: denominator is {denominator}, expected finite and >= 0, or None")
