"""verl's advantage estimators, with the arguments that verl calls them with.

B responses of C columns, padded: [B, C]. Each function takes `token_level_rewards` and
`response_mask` [B, C], and `index` [B], the `uid` of the prompts in any order; it returns
advantages and returns, [B, C]. A group of one has its raw reward wherever verl's function has,
where `lvrpo.normalize_advantages` alone would give 0.
"""

from __future__ import annotations

import collections
from collections.abc import Callable, Hashable, Iterable
from typing import Any

import torch
from torch import Tensor

from lvrpo import checks
from lvrpo.ops.normalize_advantages import normalize_advantages
from lvrpo.params.advantages import AdvantageParams
from lvrpo.params.from_verl import refuse
from lvrpo.token_advantages import (
    optimal_baseline_advantages,
    reinforce_pp_advantages,
    remax_advantages,
    token_returns,
)

Index = Tensor | Iterable[Hashable] | None
Estimate = tuple[Tensor, Tensor]
#: Added to a standard deviation; that of verl.
EPS = 1e-6


def grpo(
    token_level_rewards: Tensor,
    response_mask: Tensor,
    index: Index = None,
    config: Any = None,
    **_: Any,
) -> Estimate:
    """GRPO, or Dr. GRPO without `config.norm_adv_by_std_in_grpo`."""
    scores = token_level_rewards.sum(-1)
    scaled = _scaled(config)
    values = _in_groups(scores, index, **scaled)
    return _per_token(_raw_where_alone(values, scores, index, **scaled), response_mask)


def rloo(
    token_level_rewards: Tensor, response_mask: Tensor, index: Index = None, **_: Any
) -> Estimate:
    """RLOO."""
    scores = token_level_rewards.sum(-1)
    values = _in_groups(scores, index, preset="rloo")
    return _per_token(_raw_where_alone(values, scores, index), response_mask)


def rloo_vectorized(
    token_level_rewards: Tensor, response_mask: Tensor, index: Index = None, **_: Any
) -> Estimate:
    """RLOO, with 0 for a group of one."""
    return _per_token(_in_groups(token_level_rewards.sum(-1), index, preset="rloo"), response_mask)


def opo(
    token_level_rewards: Tensor, response_mask: Tensor, index: Index = None, **_: Any
) -> Estimate:
    """OPO: minus the mean that is weighted by the lengths of the responses."""
    scores = token_level_rewards.sum(-1)
    values = _in_groups(scores, index, preset="opo", lengths=(response_mask > 0).sum(-1))
    return _per_token(_raw_where_alone(values, scores, index), response_mask)


def gpg(
    token_level_rewards: Tensor,
    response_mask: Tensor,
    index: Index = None,
    f_norm: float = 1.0,
    **_: Any,
) -> Estimate:
    """GPG: minus the mean, times the batch over its rewards that are not 0, over `f_norm`."""
    scores = token_level_rewards.sum(-1)
    values = _raw_where_alone(_in_groups(scores, index, preset="dr_grpo"), scores, index)
    nonzero = torch.count_nonzero(scores).clamp(min=1)
    return _per_token(values * (len(scores) / nonzero / f_norm), response_mask)


def grpo_passk(
    token_level_rewards: Tensor,
    response_mask: Tensor,
    index: Index = None,
    config: Any = None,
    **_: Any,
) -> Estimate:
    """Pass@k: the lead of the best response over the second best, and 0 for the others."""
    scores = token_level_rewards.sum(-1)
    scaled = _scaled(config) | {"preset": "pass_at_k"}
    scaled |= {} if "eps" in scaled else {"scale": "none"}
    return _per_token(_in_groups(scores, index, **scaled), response_mask)


def reinforce_plus_plus_baseline(
    token_level_rewards: Tensor, response_mask: Tensor, index: Index = None, **_: Any
) -> Estimate:
    """REINFORCE++ with the group's mean as baseline, whitened over tokens."""
    scores = token_level_rewards.sum(-1)
    values = _raw_where_alone(_in_groups(scores, index, preset="dr_grpo"), scores, index)
    return _whitened(values, response_mask)


def gdpo(
    token_level_rewards: Tensor,
    response_mask: Tensor,
    index: Index = None,
    config: Any = None,
    non_tensor_batch: Any = None,
    **_: Any,
) -> Estimate:
    """GDPO: each of `config.gdpo_reward_keys` normalised in its group, then added and whitened."""
    scores, weights = token_level_rewards.sum(-1, keepdim=True), None
    if config is not None and non_tensor_batch is not None:
        columns = [non_tensor_batch[key].tolist() for key in config.gdpo_reward_keys]
        scores = scores.new_tensor(columns).T
        weights = config.gdpo_reward_weights
    factors = torch.ones_like(scores[0]) if weights is None else scores.new_tensor(list(weights))
    scaled = _scaled(config)
    parts = _in_groups(scores, index, **scaled, combine="decoupled", per_reward=True)
    values = _raw_where_alone(parts, scores, index, **scaled) @ factors
    return _whitened(values, response_mask)


def reinforce_plus_plus(
    token_level_rewards: Tensor, response_mask: Tensor, config: Any = None, **_: Any
) -> Estimate:
    """REINFORCE++: whitened returns, discounted by `config.gamma`."""
    options = {"mask": response_mask, "gamma": config.gamma}
    returns = token_returns(token_level_rewards, **options)
    return reinforce_pp_advantages(token_level_rewards, **options), returns


def remax(
    token_level_rewards: Tensor, response_mask: Tensor, reward_baselines: Tensor, **_: Any
) -> Estimate:
    """ReMax: minus `reward_baselines` [B], the rewards of greedy responses."""
    returns = token_returns(token_level_rewards, mask=response_mask)
    return remax_advantages(token_level_rewards, reward_baselines, mask=response_mask), returns


def optimal_token_baseline(
    token_level_rewards: Tensor,
    response_mask: Tensor,
    index: Index = None,
    **given: Any,
) -> Estimate:
    """verl's baseline of least variance for each column; see `tir_optimal_token_baseline`.

    Raises:
        ValueError: also when a mask has holes: columns after a tool's output are no steps.
    """
    if checks.check_values(response_mask) and bool(((response_mask > 0).int().diff() > 0).any()):
        why = "with holes, behind which columns are no steps of one policy"
        refuse("response_mask", "given", why, "adv_estimator 'tir_optimal_token_baseline'")
    return tir_optimal_token_baseline(token_level_rewards, response_mask, index, **given)


def tir_optimal_token_baseline(
    token_level_rewards: Tensor,
    response_mask: Tensor,
    index: Index = None,
    old_log_probs: Tensor | None = None,
    sum_pi_squared: Tensor | None = None,
    rollout_is_weights: Tensor | None = None,
    handle_zero_tail: bool = True,
    **_: Any,
) -> Estimate:
    """The baseline of least variance for each step, holes in the masks left out.

    Raises:
        ValueError: `old_log_probs` or `sum_pi_squared` [B, C] is missing, which
            `linear_logprobs(return_sum_squares=True)` gives; `handle_zero_tail` is False.
    """
    if not handle_zero_tail:
        why = "but a step that one response has alone is no baseline for itself"
        refuse("handle_zero_tail", False, why, "True")
    if old_log_probs is None or sum_pi_squared is None:
        why = "which the estimator needs of the actor"
        refuse("old_log_probs or sum_pi_squared", None, why, "calculate_sum_pi_squared=True")
    advantages = optimal_baseline_advantages(
        token_level_rewards,
        old_log_probs,
        sum_pi_squared,
        group_ids=_uid(index),
        weights=rollout_is_weights,
        mask=response_mask,
    )
    return advantages, token_returns(token_level_rewards, mask=response_mask)


#: By the name that verl has for them. Without "gae", which needs a critic.
ESTIMATORS: dict[str, Callable[..., Estimate]] = {
    "grpo": grpo,
    "grpo_vectorized": grpo,
    "grpo_passk": grpo_passk,
    "rloo": rloo,
    "rloo_vectorized": rloo_vectorized,
    "opo": opo,
    "gpg": gpg,
    "gdpo": gdpo,
    "reinforce_plus_plus": reinforce_plus_plus,
    "reinforce_plus_plus_baseline": reinforce_plus_plus_baseline,
    "remax": remax,
    "optimal_token_baseline": optimal_token_baseline,
    "tir_optimal_token_baseline": tir_optimal_token_baseline,
}
#: verl gives what these need to estimators of its own names only.
UNREACHED = ("gdpo", "optimal_token_baseline", "tir_optimal_token_baseline")


def _scaled(config: Any) -> dict[str, Any]:
    by_std = config is None or config.get("norm_adv_by_std_in_grpo", True)
    return {"preset": "grpo", "eps": EPS} if by_std else {"preset": "dr_grpo"}


def _uid(index: Index) -> Tensor | Iterable[Hashable]:
    if index is None:
        refuse("index", None, "but the estimator compares responses of a prompt", "the uid array")
    return index


def _in_groups(
    scores: Tensor,
    index: Index,
    *,
    preset: str,
    lengths: Tensor | None = None,
    per_reward: bool = False,
    **changes: Any,
) -> Tensor:
    """[B], or with `per_reward` [B, K], of scores [B] or [B, K]."""
    params = AdvantageParams.preset(preset, **changes)
    result = normalize_advantages(scores, group_ids=_uid(index), lengths=lengths, params=params)
    return result.per_reward if per_reward else result.values


def _raw_where_alone(
    values: Tensor, scores: Tensor, index: Index, eps: float = 0.0, **_: Any
) -> Tensor:
    """The advantages, but the score itself in a group of one, whose deviation is 1."""
    uid = _uid(index)
    names = uid.tolist() if hasattr(uid, "tolist") else list(uid)
    sizes = collections.Counter(names)
    alone = torch.tensor([sizes[name] == 1 for name in names], device=scores.device)
    return torch.where(alone if values.dim() == 1 else alone[:, None], scores / (1 + eps), values)


def _per_token(values: Tensor, response_mask: Tensor) -> Estimate:
    advantages = values[:, None] * response_mask
    return advantages, advantages


def _whitened(values: Tensor, response_mask: Tensor) -> Estimate:
    """Over tokens: REINFORCE++ whose returns are the values, no step looking ahead."""
    tokens = values[:, None].expand(response_mask.shape)
    advantages = reinforce_pp_advantages(tokens, mask=response_mask, gamma=0.0)
    return advantages, advantages
