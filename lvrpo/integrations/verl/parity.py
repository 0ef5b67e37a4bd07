"""verl's own losses and estimators against lvrpo's: `python -m lvrpo.integrations.verl.parity`.

Both get the same padded tensors, in fp64. A configuration is honoured, where results and gradients
agree, refused by name, or wrong.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import platform
import uuid
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy
import torch
from torch import Tensor

import lvrpo
from lvrpo.integrations.verl.advantages import ESTIMATORS
from lvrpo.integrations.verl.losses import policy_loss
from lvrpo.integrations.verl.release import require_verl
from lvrpo.params.from_verl import AGGREGATIONS, KLS, LOSSES

require_verl()
import verl  # noqa: E402
from verl.trainer.config import AlgoConfig  # noqa: E402
from verl.trainer.ppo import core_algos  # noqa: E402
from verl.workers.config import ActorConfig, PolicyLossConfig  # noqa: E402

#: Of leaves, by name.
Loss = Callable[..., Tensor]
#: What verl knows of the whole batch: nothing, or the counts of two ranks.
INFOS: tuple[dict[str, Any], ...] = (
    {},
    {"dp_size": 2, "batch_num_tokens": 77, "global_batch_size": 9, "loss_scale_factor": 11},
)
#: How far the policy is from the old one, nats.
SPREADS = (0.05, 0.5, 2.0)
#: Losses that need a choice of tokens besides `LossParams`.
CHOOSING = ("clip_cov", "kl_cov")
#: What counts as agreement, relative to the largest value: verl adds 1e-8 to lengths and counts,
#: and some of its estimators are fp32 whatever they are given.
AGREEMENT = 1e-7
IN_FP32 = {"grpo_vectorized": 2e-6, "gdpo": 2e-6}
#: Responses, and columns of them.
B, C = 5, 7


class Outcome(NamedTuple):
    """A configuration: by how much verl and lvrpo differ, or why it is refused."""

    name: str
    value: float = 0.0
    gradient: float = 0.0
    refused: str | None = None

    @property
    def agrees(self) -> bool:
        """Whether the differences are verl's small numbers."""
        return max(self.value, self.gradient) <= IN_FP32.get(self.name, AGREEMENT)


def actor(loss: str, aggregation: str = "token-mean", **options: Any) -> ActorConfig:
    """An ActorConfig whose tokens of covariance are no matter of chance."""
    policy = PolicyLossConfig(
        loss_mode=loss,
        dro_beta=0.3,
        clip_cov_ratio=1.0,
        clip_cov_lb=0.01,
        clip_cov_ub=0.6,
        kl_cov_ratio=0.3,
    )
    given = {"clip_ratio_high": 0.3, "tau_neg": 1.3, "kl_loss_coef": 0.1} | options
    return ActorConfig(
        strategy="fsdp",
        rollout_n=4,
        ppo_micro_batch_size_per_gpu=1,
        loss_agg_mode=aggregation,
        policy_loss=policy,
        **given,
    )


def tokens(loss: str, seed: int, spread: float) -> dict[str, Tensor]:
    """Ragged responses with holes, one of them empty, and one without an advantage."""
    torch.manual_seed(seed)
    mask = (torch.rand(B, C) < 0.7).long()
    mask[:4, 0], mask[4] = 1, 0
    old = -torch.rand(B, C, dtype=torch.float64) * 3
    advantages = torch.randn(B, C, dtype=torch.float64)
    if loss == "geo_mean":
        advantages = advantages[:, :1].expand(B, C).clone()
    advantages[1] = 0.0
    return {
        "old_log_prob": old,
        "log_prob": (old + spread * torch.randn(B, C, dtype=torch.float64)).clamp(max=-1e-3),
        "advantages": advantages,
        "response_mask": mask,
    }


def registered(loss: str) -> list[Outcome]:
    """A policy loss as verl calls it, over aggregations, counts, weights and distances."""
    outcomes = []
    cases = itertools.product(AGGREGATIONS, INFOS, (False, True), SPREADS)
    for seed, (aggregation, info, weighted, spread) in enumerate(cases):
        x = tokens(loss, seed, spread)
        config = actor(loss, aggregation, loss_scale_factor=info.get("loss_scale_factor"))
        config.global_batch_info.update(info)
        given = {"loss_agg_mode": aggregation, "config": config}
        if weighted:
            given["rollout_is_weights"] = torch.rand(B, C, dtype=torch.float64) + 0.1

        mine = _policy_term(functools.partial(policy_loss, loss), x, given)
        theirs = _policy_term(core_algos.get_policy_loss_fn(loss), x, given)
        leaves = {"log_prob": x["log_prob"]}
        outcomes.append(_compare(loss, mine, theirs, leaves, x["response_mask"]))
    return outcomes


def _policy_term(call: Callable[..., Any], x: dict[str, Tensor], given: Any) -> Loss:
    def loss(log_prob: Tensor) -> Tensor:
        value: Tensor = call(**{**x, "log_prob": log_prob}, **given)[0]
        return value

    return loss


def in_one_call(loss: str) -> list[Outcome]:
    """With KL and entropy bonus, as verl's `ppo_loss` adds them, by `LossParams.from_verl`."""
    outcomes = []
    kinds = [None, *KLS, *(f"{kind}+" for kind in KLS)]
    cases = itertools.product(AGGREGATIONS, kinds, (0.0, 0.02))
    for seed, (aggregation, kind, coefficient) in enumerate(cases):
        options = {} if kind is None else {"use_kl_loss": True, "kl_loss_type": kind}
        config = actor(loss, aggregation, entropy_coeff=coefficient, **options)
        x = tokens(loss, seed, 0.5)
        if loss == "geo_mean":  # over empty responses verl averages this loss alone
            x["response_mask"][4, 0] = 1
        x["ref_log_prob"] = -torch.rand(B, C, dtype=torch.float64) * 3
        mine, theirs = _one_call(loss, config, x), _verls_sum(loss, config, x)
        entropy = torch.rand(B, C, dtype=torch.float64)
        leaves = {"log_prob": x["log_prob"], "entropy": entropy}
        outcomes.append(_compare(loss, mine, theirs, leaves, x["response_mask"]))
    return outcomes


def _one_call(loss: str, config: ActorConfig, x: dict[str, Tensor]) -> Loss:
    def call(log_prob: Tensor, entropy: Tensor) -> Tensor:
        return lvrpo.grpo_loss(
            *(log_prob, x["old_log_prob"]),
            x["advantages"][:, 0] if loss == "geo_mean" else x["advantages"],
            mask=x["response_mask"],
            ref_logprobs=x["old_log_prob" if loss == "dro" else "ref_log_prob"],
            entropy=entropy,
            params=lvrpo.LossParams.from_verl(config, response_length=C),
        ).loss

    return call


def _verls_sum(loss: str, config: ActorConfig, x: dict[str, Tensor]) -> Loss:
    names = "old_log_prob", "advantages", "response_mask"

    def call(log_prob: Tensor, entropy: Tensor) -> Tensor:
        mode, mask = config.loss_agg_mode, x["response_mask"]
        given = {name: x[name] for name in names}
        policy = core_algos.get_policy_loss_fn(loss)
        total: Tensor = policy(log_prob=log_prob, **given, loss_agg_mode=mode, config=config)[0]
        total = total - config.entropy_coeff * core_algos.agg_loss(entropy, mask, mode)
        if config.use_kl_loss:
            kld = core_algos.kl_penalty(log_prob, x["ref_log_prob"], config.kl_loss_type)
            total = total + config.kl_loss_coef * core_algos.agg_loss(kld, mask, mode)
        return total

    return call


def _compare(
    name: str,
    mine: Loss,
    theirs: Loss,
    leaves: dict[str, Tensor],
    mask: Tensor,
) -> Outcome:
    """Two losses of the same leaves: value, and the largest error of the gradients."""
    found = []
    for call in (mine, theirs):
        given = {key: leaf.clone().requires_grad_() for key, leaf in leaves.items()}
        try:
            loss = call(**given)
        except ValueError as error:
            return Outcome(name, refused=str(error))
        gradients = torch.autograd.grad(loss, list(given.values()), allow_unused=True)
        slopes = [g for g in gradients if g is not None and bool(g.any())]
        found.append((loss.detach(), torch.stack(slopes) * mask if slopes else mask * 0.0))
    (value, gradient), (expected, slope) = found
    return Outcome(name, _apart(value, expected), _apart(gradient, slope))


def _apart(x: Tensor, y: Tensor) -> float:
    """The largest difference, relative to the largest value of `y` where that is above 1."""
    if x.shape != y.shape:
        return float("inf")
    return float((x - y).abs().max() / y.abs().max().clamp(min=1.0))


def responses(seed: int, sizes: Sequence[int], holes: bool) -> dict[str, Any]:
    """Responses to several prompts in any order, with what the estimators of verl take."""
    torch.manual_seed(seed)
    count, columns = sum(sizes), 9
    mask = (torch.arange(columns) < torch.randint(1, columns, (count, 1))).long()
    if holes:
        mask[:, 1:] *= (torch.rand(count, columns - 1) < 0.7).long()
    rewards = torch.zeros(count, columns, dtype=torch.float64)
    last = (mask * torch.arange(columns)).argmax(1)
    # Eighths, so that rewards that agree have no spread in fp32 either.
    rewards[torch.arange(count), last] = torch.randint(9, (count,)).double() / 8
    ids = [str(uuid.UUID(int=i)) for i, size in enumerate(sizes) for _ in range(size)]
    logp = torch.randn(count, columns, 5, dtype=torch.float64).log_softmax(-1)
    return {
        "token_level_rewards": rewards,
        "response_mask": mask,
        "index": numpy.array([ids[i] for i in torch.randperm(count).tolist()], dtype=object),
        "reward_baselines": torch.rand(count, dtype=torch.float64),
        "old_log_probs": logp[..., 0],
        "sum_pi_squared": logp.exp().square().sum(-1),
        "rollout_is_weights": torch.rand(count, columns, dtype=torch.float64) + 0.5,
    }


def estimator(name: str) -> list[Outcome]:
    """An advantage estimator over batches, with groups of one and holes where verl allows them."""
    outcomes = []
    for seed, by_std in itertools.product(range(12), (True, False)):
        sizes = (4, 2, 3, 5) if name == "grpo_passk" or seed % 2 else (4, 1, 3, 5, 1)
        x = responses(seed, sizes, holes=seed % 3 == 0)
        x["config"] = AlgoConfig(gamma=0.9, norm_adv_by_std_in_grpo=by_std)
        try:
            found = ESTIMATORS[name](**x)
        except ValueError as error:
            outcomes.append(Outcome(name, refused=str(error)))
            continue
        expected = verls_estimate(name, x)
        mask = x["response_mask"]  # between the steps of a response nobody trains
        pairs = zip(found, expected, strict=True)
        outcomes.append(Outcome(name, max(_apart(a * mask, b * mask) for a, b in pairs)))
    return outcomes


def verls_estimate(name: str, x: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Advantages and returns by verl, which writes into what it is given."""
    call = core_algos.get_adv_estimator_fn(name)
    by_std = x["config"].norm_adv_by_std_in_grpo  # which verl's trainer gives to "grpo" alone
    given = {**x, "norm_adv_by_std_in_grpo": by_std}
    taken = call.__code__.co_varnames[: call.__code__.co_argcount]
    copied = {k: v.clone() if isinstance(v, Tensor) else v for k, v in given.items() if k in taken}
    advantages, returns = call(**copied)
    return advantages, returns


def table(outcomes: Iterable[Outcome], what: str, calls: dict[str, str]) -> str:
    """Markdown: by name the call, how many cases agree, and the largest errors."""
    head = (what, "call", "honoured", "refused by name", "wrong", "value", "gradient")
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for name, group in itertools.groupby(outcomes, lambda outcome: outcome.name):
        rows = list(group)
        errors = (max(row.value for row in rows), max(row.gradient for row in rows))
        cells = [name, calls[name], *counts(rows).values(), *(f"{e:.0e}" for e in errors)]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def counts(outcomes: Sequence[Outcome]) -> dict[str, int]:
    """How many configurations are honoured, refused and wrong."""
    refused = sum(outcome.refused is not None for outcome in outcomes)
    wrong = sum(outcome.refused is None and not outcome.agrees for outcome in outcomes)
    return {"honoured": len(outcomes) - refused - wrong, "refused": refused, "wrong": wrong}


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; 1 where something is wrong."""
    argparse.ArgumentParser(prog="python -m lvrpo.integrations.verl.parity").parse_args(arguments)
    fields = {
        loss: "`" + ", ".join(f"{name}={value!r}" for name, value in fields.items()) + "`"
        for loss, fields in LOSSES.items()
    }
    names = {name: f"`{call.__name__}`" for name, call in ESTIMATORS.items()}
    parts = {
        "loss_mode, registered": ([o for loss in LOSSES for o in registered(loss)], fields),
        "loss_mode, in one call": (
            [o for loss in LOSSES if loss not in CHOOSING for o in in_one_call(loss)],
            fields,
        ),
        "adv_estimator": ([o for name in ESTIMATORS for o in estimator(name)], names),
    }
    every = [outcome for outcomes, _ in parts.values() for outcome in outcomes]
    print("\n\n".join(table(outcomes, what, calls) for what, (outcomes, calls) in parts.items()))
    counted = counts(every)
    print(
        f"\n{len(every)} configurations: {counted['honoured']} honoured, {counted['refused']} "
        f"refused by name, {counted['wrong']} wrong. verl {verl.__version__}, torch "
        f"{torch.__version__}, lvrpo {lvrpo.__version__}, Python {platform.python_version()}.\n"
    )
    for reason in sorted({outcome.refused for outcome in every if outcome.refused is not None}):
        print(f"- refused: {reason}")
    return int(counted["wrong"] > 0)


if __name__ == "__main__":
    raise SystemExit(main())
