"""TRL's GRPOTrainer, whose loss head is `lvrpo.linear_grpo_loss`.

B completions of at most C tokens, padded to [B, C]. TRL samples, scores, logs and steps as before;
what it calls for log-probs goes through lvrpo, and the gradient is that of the fused loss.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lvrpo.integrations import versions
from lvrpo.integrations.prompt_groups import check_model, grouped_inputs
from lvrpo.integrations.transformers import CompletionStates, completion_states, set_attention
from lvrpo.integrations.transformers.release import require_transformers
from lvrpo.ops.linear_grpo_loss import linear_grpo_loss
from lvrpo.ops.linear_logprobs import linear_logprobs
from lvrpo.params.from_trl import refuse
from lvrpo.params.policy_loss import LossParams

versions.require("trl", "trl", "1.16", "1.17")
require_transformers()
import trl  # noqa: E402

#: The losses that TRL divides by the completion tokens of the optimiser step.
OVER_ALL_ITEMS = ("cispo", "dapo", "vespo")
#: The smallest weight of TRL's VESPO, and its largest log-weight.
VESPO_FLOOR, VESPO_LIMIT = 1e-8, 20.0


class GRPOTrainer(trl.GRPOTrainer):  # type: ignore[misc]
    """TRL's GRPOTrainer with its constructor, its options and its metrics, and lvrpo's loss.

    The log-probs of the old and of the reference policy come from lvrpo too, so that on the same
    weights they are equal to those of the update to the last bit. A subclass may put advantages
    of tokens, [B, C], in the place of TRL's [B]; a loss per sequence refuses them at the first
    update.

    Args:
        model: as TRL takes it, like everything but `share_prompts`.
        reward_funcs: likewise.
        args: a GRPOConfig.
        rest: the others, by position.
        share_prompts: lay the completions of a micro-batch that have equal prompts out as one tree,
            in which the prompt stands once, with its images, on `packed_attention`. The model's
            attention becomes "lvrpo". Results are those of separate sequences to rounding.
        options: the others, by name.

    Raises:
        TypeError: `args` is no GRPOConfig.
        ValueError: an option of `args` cannot be honoured, or `share_prompts` for this model; the
            message says what to do.
    """

    share_prompts = False

    def __init__(
        self,
        model: Any,
        reward_funcs: Any = None,
        args: Any = None,
        *rest: Any,
        share_prompts: bool = False,
        **options: Any,
    ) -> None:
        if args is not None:
            check_options(args)  # before a model is loaded
        super().__init__(model, reward_funcs, args, *rest, **options)
        self._set_up_loss()
        self.share_prompts = share_prompts
        if share_prompts:
            self._set_up_sharing()

    def _set_up_sharing(self) -> None:
        if self.aux_loss_enabled:
            why = "but share_prompts counts the tokens of a prompt once, which changes its mean"
            refuse("router_aux_loss_coef", self.router_aux_loss_coef, why, "0")
        noise = self.args.neftune_noise_alpha
        if noise is not None:
            why = "but share_prompts embeds a micro-batch at once, whose length scales the noise"
            refuse("neftune_noise_alpha", noise, why, "None")
        check_model(self.model)
        for model in (self.model, self.ref_model):
            if model is not None:
                set_attention(self.accelerator.unwrap_model(model))

    def _set_up_loss(self) -> None:
        check_options(self.args)
        self.loss_params = LossParams.from_trl(self.args)

    def _get_per_token_logps_and_entropies(
        self,
        model: Any,
        input_ids: Tensor,
        attention_mask: Tensor,
        logits_to_keep: int,
        batch_size: int | None = None,
        **more: Any,
    ) -> Any:
        head = model if isinstance(model, _Head) else _Head(self, model, logits_to_keep)
        score = functools.partial(
            super()._get_per_token_logps_and_entropies,
            input_ids=input_ids,
            attention_mask=attention_mask,
            logits_to_keep=logits_to_keep,
            **more,
        )
        if self.share_prompts:
            # TRL knows which images are of which sequence, in the form of every model.
            rows = _Rows()
            score(rows, batch_size=1)
            head.rows = iter(rows.inputs)
        return score(head, batch_size=batch_size)

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        head = _Head(self, model, inputs["completion_ids"].size(1), self._loss_arguments(inputs))
        # On detached log-probs TRL's own code computes its metrics, and a loss without a gradient.
        super()._compute_loss(head, inputs)
        assert head.loss is not None
        return head.loss

    def _states(self, model: Any, inputs: dict[str, Any], length: int | None) -> CompletionStates:
        """What predicts the last `length` columns, or every row, in the dtypes of the head."""
        if not self.args.cast_lm_head_to_fp32:
            return completion_states(model, inputs, length)
        states = completion_states(model, inputs, length, autocast=False)
        return dataclasses.replace(states, hidden=states.hidden.float())

    def _loss_arguments(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """What `linear_grpo_loss` takes besides hidden states, for one micro-batch."""
        mask = inputs["completion_mask"]
        if "tool_mask" in inputs:
            mask = mask * inputs["tool_mask"]
        advantages = inputs["advantages"]
        old, weights = inputs.get("old_per_token_logps"), None
        if self.use_vllm and self.vllm_importance_sampling_correction:
            ratio = inputs["importance_sampling_ratio"]
            if self.loss_type == "vespo":
                # Its weight is one of the whole sequence, from the sampler's policy to this one.
                log_ratio = ratio.log().clamp(math.log(VESPO_FLOOR), VESPO_LIMIT)
                active = mask.sum(-1, keepdim=True).clamp(min=1)
                old = old - log_ratio.sum(-1, keepdim=True) / active
            else:
                weights = ratio.expand(mask.shape)
        threshold = self.off_policy_mask_threshold
        sampler = None if threshold is None else inputs.get("sampling_per_token_logps")
        optional = {
            "policy_weights": weights,
            "ref_logprobs": inputs.get("ref_per_token_logps"),
            "top_entropy": self.top_entropy_quantile if self.top_entropy_quantile < 1 else None,
            "off_policy_threshold": threshold,
            "sampler_logprobs": sampler,
        }
        return {
            "old_logprobs": old,
            "advantages": advantages,
            "level": "sequence" if advantages.dim() == 1 else "token",
            "mask": mask,
            "denominator": self._denominator(mask, inputs["num_items_in_batch"]),
            "params": self._params(),
            **{name: value for name, value in optional.items() if value is not None},
        }

    def _params(self) -> LossParams:
        """The loss, with the entropy bonus that TRL's controller allows in this step."""
        if not self._entropy_bonus_enabled:
            return self.loss_params
        off = self.use_adaptive_entropy and self._last_world_entropy > self.args.entropy_target
        coefficient = 0.0 if off else self.entropy_coef / self._accumulated()
        return dataclasses.replace(self.loss_params, entropy_coef=coefficient)

    def _denominator(self, mask: Tensor, items: Tensor) -> float | Tensor:
        """What TRL divides a micro-batch by, with the number of them in a step."""
        accumulated = self._accumulated()
        if self.loss_type in OVER_ALL_ITEMS:
            # TRL's number of items is of all processes and of all steps of a generation.
            share = accumulated / self.args.steps_per_generation if self.model.training else 1.0
            divisor: Tensor = items.clamp(min=1) / self.accelerator.num_processes * share
            return divisor
        if self.loss_type == "bnpo":
            return mask.sum().clamp(min=1) * accumulated
        return float(len(mask) * accumulated)

    def _accumulated(self) -> int:
        """Micro-batches of an optimiser step; an evaluation has one."""
        return self.current_gradient_accumulation_steps if self.model.training else 1


def check_options(config: Any) -> None:
    """Refuse a GRPOConfig with an option that cannot be honoured.

    Raises:
        TypeError: it is no GRPOConfig.
        ValueError: names the option and its value, and says what to do.
    """
    if not isinstance(config, trl.GRPOConfig):
        found = f"{type(config).__module__}.{type(config).__qualname__}"
        raise TypeError(f"lvrpo for TRL: args is a {found}, expected a trl.GRPOConfig")
    LossParams.from_trl(config)
    threshold = config.off_policy_mask_threshold
    if threshold is not None and not threshold >= 0:
        why = "which drops sequences that the sampler's own policy made"
        refuse("off_policy_mask_threshold", threshold, why, "0 or more, or None")
    plugin = config.deepspeed_plugin
    if plugin is not None and plugin.zero_stage == 3:
        why = "which shards the head again before its loss"
        refuse("DeepSpeed's zero_stage", 3, why, "2 or less, or FSDP2")


class _Scores(NamedTuple):
    """What TRL reads from the output of a model."""

    log_probs: Tensor
    entropy: Tensor
    aux_loss: Tensor | None


class _Rows:
    """What TRL's code calls in the place of a model to find the inputs of each sequence."""

    def __init__(self) -> None:
        self.inputs: list[dict[str, Any]] = []

    def __call__(self, *, labels: Tensor, fused_lm_head: bool, **inputs: Any) -> _Scores:
        self.inputs.append(inputs)
        return _Scores(labels, labels, None)


class _Head:
    """What TRL's code calls in the place of a model: log-probs of completions, and their loss.

    Args:
        trainer: whose temperature and precision count.
        model: as TRL would call it, with whatever it is wrapped in.
        length: C.
        arguments: of `linear_grpo_loss`; None for log-probs alone.

    Attributes:
        loss: after a call, of its completions.
        rows: inputs of every sequence by itself, where equal prompts are to be one; None: as TRL
            batches them.
    """

    def __init__(
        self,
        trainer: GRPOTrainer,
        model: Any,
        length: int,
        arguments: dict[str, Any] | None = None,
    ) -> None:
        self.trainer, self.model, self.length = trainer, model, length
        self.arguments = arguments
        self.loss: Tensor | None = None
        self.rows: Iterator[dict[str, Any]] | None = None

    def __call__(self, *, labels: Tensor, fused_lm_head: bool, **inputs: Any) -> _Scores:
        targets, row_index = labels[:, -self.length :], None
        if self.rows is None:
            states = self.trainer._states(self.model, inputs, self.length)
        else:
            rows = list(itertools.islice(self.rows, len(targets)))
            inputs, row_index = grouped_inputs(self.model, rows, self.length)
            states = self.trainer._states(self.model, inputs, None)
            states = dataclasses.replace(states, hidden=states.hidden[0])
        precision: Any = contextlib.nullcontext()
        if self.trainer.args.cast_lm_head_to_fp32:
            precision = torch.autocast(states.hidden.device.type, enabled=False)
        head: dict[str, Any] = {"token_ids": targets, "row_index": row_index}
        head |= states.head(self.trainer.temperature)
        with precision:
            if self.arguments is None:
                return _Scores(*_logprobs_and_entropy(head), states.aux_loss)
            if "top_entropy" in self.arguments and self.trainer.accelerator.num_processes > 1:
                self.arguments |= self._entropy_of_all_processes(head)
            result = linear_grpo_loss(**head, **self.arguments)
        self.loss, aux_loss = result.loss, states.aux_loss
        if self.trainer.aux_loss_enabled and aux_loss is not None:
            coefficient = self.trainer.router_aux_loss_coef / self.trainer._accumulated()
            self.loss = self.loss + coefficient * aux_loss
            aux_loss = aux_loss.detach()
        return _Scores(result.logprobs, result.entropy, aux_loss)

    @torch.no_grad()
    def _entropy_of_all_processes(self, head: dict[str, Any]) -> dict[str, Any]:
        """The arguments for a share of the tokens of all processes, by TRL's own choice."""
        assert self.arguments is not None
        entropy = _logprobs_and_entropy(head)[1]
        fraction, mask = self.arguments["top_entropy"], self.arguments["mask"]
        kept = self.trainer.get_high_entropy_mask(entropy, mask, 1 - fraction)
        least = torch.where(kept, entropy, torch.inf).min()
        return {"top_entropy": None, "entropy_threshold": least}


def _logprobs_and_entropy(head: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """[B, C] each; a masked token's entropy may be anything."""
    logprobs, entropy = linear_logprobs(**head, return_entropy=True)
    row_index = head["row_index"]
    return logprobs, entropy if row_index is None else entropy[row_index]
