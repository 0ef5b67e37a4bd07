"""TRL's GRPOTrainer, whose loss head is `lvrpo.linear_grpo_loss`.

B completions of at most C tokens, padded to [B, C]. TRL samples, scores, logs and steps as before;
what it calls for log-probs goes through lvrpo, and the gradient is that of the fused loss.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lvrpo.integrations import versions
from lvrpo.integrations.transformers import CompletionStates, completion_states
from lvrpo.ops.linear_grpo_loss import linear_grpo_loss
from lvrpo.ops.linear_logprobs import linear_logprobs
from lvrpo.params.from_trl import refuse
from lvrpo.params.policy_loss import LossParams

versions.require("trl", "trl", "1.16", "1.17")
import trl  # noqa: E402

#: The losses that TRL divides by the completion tokens of the optimiser step.
OVER_ALL_ITEMS = ("cispo", "dapo", "vespo")
#: The smallest weight of TRL's VESPO, and its largest log-weight.
VESPO_FLOOR, VESPO_LIMIT = 1e-8, 20.0


class GRPOTrainer(trl.GRPOTrainer):  # type: ignore[misc]
    """TRL's GRPOTrainer with its constructor, its options and its metrics, and lvrpo's loss.

    The log-probs of the old and of the reference policy come from lvrpo too, so that on the same
    weights they are equal to those of the update to the last bit.

    Raises:
        ValueError: an option of `args` cannot be honoured; the message says what to do.
    """

    def __init__(
        self, model: Any, reward_funcs: Any = None, args: Any = None, *rest: Any, **options: Any
    ) -> None:
        if args is not None:
            check_options(args)  # before a model is loaded
        super().__init__(model, reward_funcs, args, *rest, **options)
        self._set_up_loss()

    def _set_up_loss(self) -> None:
        check_options(self.args)
        self.loss_params = LossParams.from_trl(self.args)

    def _get_per_token_logps_and_entropies(
        self,
        model: Any,
        input_ids: Tensor,
        attention_mask: Tensor,
        logits_to_keep: int,
        **more: Any,
    ) -> Any:
        head = model if isinstance(model, _Head) else _Head(self, model, logits_to_keep)
        return super()._get_per_token_logps_and_entropies(
            head, input_ids, attention_mask, logits_to_keep, **more
        )

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        head = _Head(self, model, inputs["completion_ids"].size(1), self._loss_arguments(inputs))
        # On detached log-probs TRL's own code computes its metrics, and a loss without a gradient.
        super()._compute_loss(head, inputs)
        assert head.loss is not None
        return head.loss

    def _states(self, model: Any, inputs: dict[str, Any], length: int) -> CompletionStates:
        """What predicts the last `length` columns of prompts with completions."""
        return completion_states(model, inputs, length)

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
        return {
            "old_logprobs": old,
            "advantages": advantages,
            "level": "sequence" if advantages.dim() == 1 else "token",
            "mask": mask,
            "policy_weights": weights,
            "ref_logprobs": inputs.get("ref_per_token_logps"),
            "denominator": self._denominator(mask, inputs["num_items_in_batch"]),
            "params": self.loss_params,
        }

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
        ValueError: names the option and its value, and says what to do.
    """
    LossParams.from_trl(config)
    inactive = {
        "top_entropy_quantile": 1.0,
        "off_policy_mask_threshold": None,
        "entropy_coef": 0.0,
        "use_adaptive_entropy": False,
    }
    for option, value in inactive.items():
        if getattr(config, option) != value:
            refuse(option, getattr(config, option), "which the fused loss has not", repr(value))


class _Scores(NamedTuple):
    """What TRL reads from the output of a model."""

    log_probs: Tensor
    entropy: Tensor | None
    aux_loss: Tensor | None


class _Head:
    """What TRL's code calls in the place of a model: log-probs of completions, and their loss.

    Args:
        trainer: whose temperature and precision count.
        model: as TRL would call it, with whatever it is wrapped in.
        length: C.
        arguments: of `linear_grpo_loss`; None for log-probs alone.
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

    def __call__(self, *, labels: Tensor, fused_lm_head: bool, **inputs: Any) -> _Scores:
        states = self.trainer._states(self.model, inputs, self.length)
        targets = labels[:, -self.length :]
        if not self.trainer.args.cast_lm_head_to_fp32:
            return self._scores(states, targets)
        states = dataclasses.replace(states, hidden=states.hidden.float())
        with torch.autocast(states.hidden.device.type, enabled=False):
            return self._scores(states, targets)

    def _scores(self, states: CompletionStates, targets: Tensor) -> _Scores:
        head = states.head(self.trainer.temperature)
        if self.arguments is None:
            return _Scores(linear_logprobs(token_ids=targets, **head), None, states.aux_loss)
        result = linear_grpo_loss(token_ids=targets, **head, **self.arguments)
        self.loss, aux_loss = result.loss, states.aux_loss
        if self.trainer.aux_loss_enabled and aux_loss is not None:
            coefficient = self.trainer.router_aux_loss_coef / self.trainer._accumulated()
            self.loss = self.loss + coefficient * aux_loss
            aux_loss = aux_loss.detach()
        return _Scores(result.logprobs, result.entropy, aux_loss)
