"""Log-probs and entropies from hidden states, in the shapes of verl's fused kernels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lvrpo.integrations.verl.release import require_verl
from lvrpo.ops.linear_logprobs import linear_logprobs

#: Options of models that multiply their logits, or divide them.
SCALES = ("logit_scale", "logits_scaling")


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    temperature: float = 1.0,
    reduction: str = "none",
    dist_process_group: Any = None,
) -> tuple[Tensor, Tensor]:
    """verl.utils.kernel's function of this name by `linear_logprobs`, on any device.

    Args:
        hidden: [T, H] or [B, C, H].
        weight: [V, H].
        labels: [T] or [B, C].
        temperature: divides the logits.
        reduction: "none".
        dist_process_group: None.

    Returns:
        Log-probs and entropies in the shape of `labels`, fp32, nats. Both are differentiable.

    Raises:
        ValueError: as `linear_logprobs`; a reduction or a process group is asked for.
    """
    op = "linear_cross_entropy"
    if reduction != "none":
        raise ValueError(f"{op}: reduction is {reduction!r}, expected 'none'")
    if dist_process_group is not None:
        raise ValueError(
            f"{op}: dist_process_group is given, expected None; a vocabulary over several ranks "
            "has lvrpo.distributed"
        )
    logprobs, entropy = linear_logprobs(
        hidden, weight, labels, temperature=temperature, return_entropy=True
    )
    return logprobs, entropy.reshape(labels.shape)


def forward_with_lvrpo_backend(
    model: Any,
    input_ids: Tensor | None = None,
    *args: Any,
    labels: Tensor | None = None,
    shift_labels: Tensor | None = None,
    temperature: float = 1.0,
    return_dict: bool | None = None,
    **kwargs: Any,
) -> Any:
    """The forward of a causal language model as verl has it under `use_fused_kernels`.

    In place of verl's `forward_with_torch_backend`: bias and soft-cap of the head count.

    Args:
        model: a model of transformers with `model` and `lm_head`.
        input_ids: [B, C].
        *args: as verl's, for the body.
        labels: [B, C], the tokens, where they are not the input ids.
        shift_labels: [B, C], the token that each position predicts, where verl has them already.
        temperature: divides the logits.
        return_dict: true.
        **kwargs: as verl's, for the body; what concerns logits is ignored.

    Returns:
        verl's CausalLMOutputForPPO, with `log_probs` and `entropy` [B, C] of the next token.

    Raises:
        ValueError: `return_dict` is not asked for, there are no tokens to predict, or the model
            scales its logits.
        ImportError: verl is missing, or of a release that lvrpo is not tested with.
    """
    require_verl()
    from verl.models.transformers.dense_common import CausalLMOutputForPPO, forward_base_model

    if not return_dict:
        raise ValueError(f"forward_with_lvrpo_backend: return_dict is {return_dict}, expected True")
    following = shift_labels
    if following is None:
        tokens = input_ids if labels is None else labels
        if tokens is None:
            raise ValueError(
                "forward_with_lvrpo_backend: input_ids, labels and shift_labels are None, expected "
                "one of them"
            )
        following = torch.roll(tokens, -1, dims=-1)
    kwargs.pop("logits_to_keep", None)
    outputs = forward_base_model(model, input_ids, *args, return_dict=True, **kwargs)
    for option in SCALES:
        value = getattr(model.config, option, None)
        if value not in (None, 1):
            raise ValueError(
                f"forward_with_lvrpo_backend: {option} is {value}, but the heads of verl have no "
                "scale; expected a model without one, or use_fused_kernels=False"
            )
    log_probs, entropy = linear_logprobs(
        outputs[0],
        model.lm_head.weight,
        following,
        bias=getattr(model.lm_head, "bias", None),
        temperature=temperature,
        softcap=getattr(model.config, "final_logit_softcapping", None),
        return_entropy=True,
    )
    return CausalLMOutputForPPO(
        log_probs=log_probs,
        entropy=entropy.reshape(log_probs.shape),
        past_key_values=outputs.past_key_values,
        hidden_states=outputs.hidden_states,
        attentions=outputs.attentions,
    )
