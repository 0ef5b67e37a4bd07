"""Estimators whose advantage differs from token to token, and rewards with a KL in them.

`lvrpo.normalize_advantages` gives a number per sample; these give one per token, for `advantages`
of a loss. They are plain PyTorch, read no value on the host and have no gradient. Formulas and
sources: docs/token-advantages.md.

T packed tokens of B sequences, or [B, C] padded ones, whose sequences are the rows. What the mask
leaves out is no step: a reward there counts nowhere, and the step after it is the next.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lvrpo import checks
from lvrpo._sampler_inputs import Numbers, as_active, as_logprobs, without
from lvrpo.dtypes import widen
from lvrpo.groups import GroupIds, check_one, group_offsets, group_order
from lvrpo.params.log_ratio import LOG_RATIO_LIMIT
from lvrpo.params.policy_loss import KL, LOSS_CHOICES
from lvrpo.token_layout import TokenLayout, sequences_of, token_layout

#: Below it a variance, or a sum of weights, is rounding; that of verl.
EPS = 1e-8


def token_returns(
    rewards: Numbers,
    cu_seqlens: Tensor | Sequence[int] | None = None,
    *,
    mask: Numbers | None = None,
    gamma: float = 1.0,
) -> Tensor:
    """What follows from each token on: sum over its sequence's later steps s of gamma^(s - t) r_s.

    Args:
        rewards: [T] or [B, C], a reward per token.
        cu_seqlens: [B + 1] offsets of packed sequences, any integers. None for padded tokens.
        mask: in the shape of the tokens, of any dtype: what is above 0 is a step; the other tokens
            may hold anything. None: all.
        gamma: discount of one step, in [0, 1].

    Returns:
        In the shape of the tokens and fp32 (fp64 from fp64 rewards), 0 where `mask` is.

    Raises:
        ValueError: shapes or dtypes do not match, or gamma is outside [0, 1]; on a CPU also when
            the reward of a step is not finite. Where values are not read, such a token is no step.
    """
    op = "token_returns"
    _check_gamma(op, gamma)
    layout, tokens, active = _inputs(op, cu_seqlens, mask, rewards=rewards)
    steps = _Steps(layout, active)
    return _result(layout, steps.to_go(tokens["rewards"].double(), gamma), tokens["rewards"])


def reinforce_pp_advantages(
    rewards: Numbers,
    cu_seqlens: Tensor | Sequence[int] | None = None,
    *,
    mask: Numbers | None = None,
    gamma: float = 1.0,
) -> Tensor:
    """REINFORCE++: returns, minus their mean over the steps of the call, over their deviation.

    Args:
        rewards: as `token_returns`, often with a KL in them (`kl_penalized_rewards`).
        cu_seqlens: likewise.
        mask: likewise.
        gamma: likewise.

    Returns:
        As `token_returns`.

    Raises:
        ValueError: as `token_returns`.
    """
    op = "reinforce_pp_advantages"
    _check_gamma(op, gamma)
    layout, tokens, active = _inputs(op, cu_seqlens, mask, rewards=rewards)
    returns = _Steps(layout, active).to_go(tokens["rewards"].double(), gamma)
    count = active.sum()
    above = torch.where(active, returns - returns.sum() / count.clamp(min=1), 0.0)
    variance = above.square().sum() / (count - 1).clamp(min=1)
    return _result(layout, above * (variance + EPS).rsqrt(), tokens["rewards"])


def remax_advantages(
    rewards: Numbers,
    greedy_rewards: Numbers,
    cu_seqlens: Tensor | Sequence[int] | None = None,
    *,
    mask: Numbers | None = None,
) -> Tensor:
    """ReMax: the return from each token on, minus the reward of the greedy answer to its prompt.

    Args:
        rewards: as `token_returns`.
        greedy_rewards: [B], of the answer that the policy gives at temperature 0.
        cu_seqlens: as `token_returns`.
        mask: likewise.

    Returns:
        As `token_returns`.

    Raises:
        ValueError: as `token_returns`; on a CPU also when a greedy reward is not finite.
    """
    op = "remax_advantages"
    layout, tokens, active = _inputs(op, cu_seqlens, mask, rewards=rewards)
    like = tokens["rewards"]
    greedy = as_logprobs(op, {"greedy_rewards": greedy_rewards}, like)["greedy_rewards"]
    checks.check_shape(op, "greedy_rewards", greedy, (layout.sequences,))
    checks.check_same_device(op, rewards=like, greedy_rewards=greedy)
    if checks.check_values(greedy):
        expected = "a finite number"
        checks.refuse_first(op, "greedy_rewards", greedy, ~greedy.isfinite(), expected)
    steps = _Steps(layout, active)
    above = steps.to_go(like.double()) - greedy.double()[steps.sequence]
    return _result(layout, torch.where(active, above, 0.0), like)


def optimal_baseline_advantages(
    rewards: Numbers,
    logprobs: Numbers,
    sum_squares: Numbers,
    cu_seqlens: Tensor | Sequence[int] | None = None,
    *,
    groups: Tensor | Sequence[int] | int | None = None,
    group_ids: GroupIds | None = None,
    weights: Numbers | None = None,
    mask: Numbers | None = None,
) -> Tensor:
    """The baseline of least variance for each step of a group's sequences.

    A token's score has the squared norm 1 - 2 p + sum of p^2 over the vocabulary (in logits). What
    a sequence has gathered of it up to step t weighs its return in the baseline of step t. A step
    that one sequence of a group has alone has no baseline: its advantage is its return.

    Args:
        rewards: as `token_returns`.
        logprobs: in the shape of the tokens, of the sampled tokens, nats.
        sum_squares: in the shape of the tokens: what `gather_logprobs` and `linear_logprobs` return
            with `return_sum_squares`.
        cu_seqlens: as `token_returns`.
        groups: [P + 1] offsets of the groups in the batch of sequences, or the size of all of them;
            this or `group_ids`.
        group_ids: [B], what the group of each sequence is called (`normalize_advantages`).
        weights: in the shape of the tokens: importance weights such as those of `sampler_weights`,
            whose squares multiply the norm.
        mask: as `token_returns`.

    Returns:
        As `token_returns`.

    Raises:
        ValueError: as `token_returns`, for all that is given per token; both or neither of `groups`
            and `group_ids` are given, or they do not fit B.
    """
    op = "optimal_baseline_advantages"
    of_tokens = {"rewards": rewards, "logprobs": logprobs, "sum_squares": sum_squares}
    if weights is not None:
        of_tokens["weights"] = weights
    layout, tokens, active = _inputs(op, cu_seqlens, mask, **of_tokens)
    like = tokens["rewards"]
    steps = _Steps(layout, active)
    returns = steps.to_go(like.double())
    energy = 1 - 2 * tokens["logprobs"].double().exp() + tokens["sum_squares"].double()
    if weights is not None:
        energy = energy * tokens["weights"].double().square()
    gathered = steps.so_far(torch.where(active, energy, 0.0))

    group = _group_of_sequence(op, groups, group_ids, layout)
    cells = _Cells(group[steps.sequence] * layout.tokens + steps.step, active)
    baseline = cells.sum(gathered * returns) / (cells.sum(gathered) + EPS)
    baseline = torch.where(cells.sum(active.double()) > 1, baseline, 0.0)
    return _result(layout, torch.where(active, returns - baseline, 0.0), like)


def kl_penalized_rewards(
    rewards: Numbers,
    logprobs: Numbers,
    ref_logprobs: Numbers,
    cu_seqlens: Tensor | Sequence[int] | None = None,
    *,
    beta: float,
    kl: KL = "k1",
    kl_limit: float | None = None,
    mask: Numbers | None = None,
) -> Tensor:
    """Rewards per token minus beta times an estimate of the KL to the reference policy.

    Args:
        rewards: as `token_returns`.
        logprobs: in the shape of the tokens, under the policy that sampled them, nats.
        ref_logprobs: the same under the reference policy.
        cu_seqlens: as `token_returns`.
        beta: coefficient of the KL, finite and >= 0.
        kl: the estimator, as `LossParams.kl`.
        kl_limit: its value is clamped to plus or minus this; None for no bound.
        mask: as `token_returns`.

    Returns:
        As `token_returns`; what the mask leaves out is 0.

    Raises:
        ValueError: as `token_returns`, for all that is given per token; beta, `kl` or `kl_limit` is
            not as described.
    """
    op = "kl_penalized_rewards"
    if not 0 <= beta < float("inf"):
        raise ValueError(f"{op}: beta is {beta}, expected finite and >= 0")
    if kl not in LOSS_CHOICES["kl"]:
        raise ValueError(f"{op}: kl is {kl!r}, expected one of {', '.join(LOSS_CHOICES['kl'])}")
    if kl_limit is not None and not kl_limit > 0:
        raise ValueError(f"{op}: kl_limit is {kl_limit}, expected > 0, or None")
    of_tokens = {"rewards": rewards, "logprobs": logprobs, "ref_logprobs": ref_logprobs}
    layout, tokens, active = _inputs(op, cu_seqlens, mask, **of_tokens)
    like = tokens["rewards"]
    d = tokens["ref_logprobs"].double() - tokens["logprobs"].double()
    d = torch.where(active, d, 0.0)
    if kl == "k3":
        d = d.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
        value = d.expm1() - d
    else:
        value = {"k1": -d, "k2": d.square() / 2, "abs": d.abs()}[kl]
    if kl_limit is not None:
        value = value.clamp(-kl_limit, kl_limit)
    penalized = torch.where(active, like.double(), 0.0) - beta * value
    return _result(layout, penalized, like)


def _check_gamma(op: str, gamma: float) -> None:
    if not 0 <= gamma <= 1:
        raise ValueError(f"{op}: gamma is {gamma}, expected in [0, 1]")


def _inputs(
    op: str, cu_seqlens: Tensor | Sequence[int] | None, mask: Numbers | None, **given: Numbers
) -> tuple[TokenLayout, dict[str, Tensor], Tensor]:
    """Their layout, the tensors as [T] that are 0 where no step is, and the steps as bool [T]."""
    tensors = as_logprobs(op, given)
    name, first = next(iter(tensors.items()))
    layout = token_layout(op, name, first, cu_seqlens)
    checks.check_same_device(op, **tensors, cu_seqlens=layout.offsets)
    active = as_active(op, first, mask)
    for name, tensor in tensors.items():
        checks.check_shape(op, name, tensor, layout.shape)
        active = without(op, name, tensor, active, ~tensor.isfinite())
    active = active.reshape(-1) & layout.held()
    flat = {name: layout.flatten(name, tensor) for name, tensor in tensors.items()}
    return layout, {name: torch.where(active, x, 0.0) for name, x in flat.items()}, active


def _result(layout: TokenLayout, values: Tensor, like: Tensor) -> Tensor:
    return layout.restore(values.to(widen(like).dtype))


def _group_of_sequence(
    op: str,
    groups: Tensor | Sequence[int] | int | None,
    group_ids: GroupIds | None,
    layout: TokenLayout,
) -> Tensor:
    """[B], the number of each sequence's group."""
    batch, device = layout.sequences, layout.offsets.device
    check_one(op, groups, group_ids)
    if groups is not None:
        return sequences_of(group_offsets(op, groups, batch, device), batch)
    assert group_ids is not None
    by_group = group_order(op, group_ids, batch, device)
    return sequences_of(by_group.offsets, batch)[by_group.place]


class _Steps:
    """Sums along the steps of every sequence, [T] -> [T] in fp64; of other tokens 0.

    Attributes:
        sequence: [T], of each token.
        step: [T], how many steps its sequence has before it.
    """

    def __init__(self, layout: TokenLayout, active: Tensor) -> None:
        offsets = layout.offsets.clamp(0, layout.tokens)
        self.active = active
        self.sequence = sequences_of(offsets, layout.tokens)
        # Steps first in each sequence, so that the next one is the next place.
        self._order = (2 * self.sequence + (~active).long()).argsort(stable=True)
        self._place = self._order.argsort()
        self._first = offsets[:-1][self.sequence]
        self._end = offsets[1:][self.sequence]
        self._longest = layout.tokens if len(layout.shape) == 1 else layout.shape[1]
        self.step = self._place - self._first

    def to_go(self, x: Tensor, gamma: float = 1.0) -> Tensor:
        """Of each step and those after it, discounted by their distance."""
        return self._scan(x, gamma, ahead=True)

    def so_far(self, x: Tensor) -> Tensor:
        """Of each step and those before it."""
        return self._scan(x, 1.0, ahead=False)

    def _scan(self, x: Tensor, gamma: float, ahead: bool) -> Tensor:
        """After round j a place has the sum of 2^j places: log2 rounds in place of a loop."""
        total = x[self._order]
        place = torch.arange(len(x), device=x.device)
        distance = 1
        while distance < self._longest:
            other = place + distance if ahead else place - distance
            inside = other < self._end if ahead else other >= self._first
            far = total[other.clamp(0, len(x) - 1)]
            total = total + gamma**distance * torch.where(inside, far, 0.0)
            distance *= 2
        return torch.where(self.active, total[self._place], 0.0)


class _Cells:
    """Sums over the active tokens that have one key, [T] -> [T] in fp64."""

    def __init__(self, key: Tensor, active: Tensor) -> None:
        self._order = torch.where(active, key, -1).argsort(stable=True)
        self._place = self._order.argsort()
        ascending = key.where(active, -1)[self._order]
        starts = torch.ones_like(ascending)
        starts[1:] = ascending[1:] != ascending[:-1]
        self._cell = starts.cumsum(0) - 1
        everything = torch.arange(len(key) + 1, device=key.device)
        self._offsets = torch.searchsorted(self._cell, everything)

    def sum(self, x: Tensor) -> Tensor:
        # Unlike index_add on a GPU, the same bits every time.
        sums = torch.segment_reduce(x[self._order], "sum", offsets=self._offsets, unsafe=True)
        return sums[self._cell][self._place]
