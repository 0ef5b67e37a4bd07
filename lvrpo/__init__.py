"""Fused kernels for GRPO on models that read and draw: ops as autograd functions.

Importing it needs torch only. The model is in `lvrpo.models`, the training loop in `lvrpo.trainer`.
"""

from lvrpo.covariance import clip_cov_weights, kl_cov_reference
from lvrpo.masks import (
    SpanMask,
    TargetIndex,
    Tile,
    bagel_position_ids,
    mrope_position_ids,
    position_ids,
    target_index,
)
from lvrpo.ops.flow_policy_loss import flow_policy_loss
from lvrpo.ops.flow_step import flow_step
from lvrpo.ops.gather_logprobs import gather_logprobs
from lvrpo.ops.grpo_loss import grpo_loss
from lvrpo.ops.guided_velocity import guided_velocity
from lvrpo.ops.linear_grpo_loss import linear_grpo_loss
from lvrpo.ops.linear_logprobs import linear_logprobs
from lvrpo.ops.logits_grpo_loss import logits_grpo_loss
from lvrpo.ops.normalize_advantages import normalize_advantages
from lvrpo.ops.packed_attention import packed_attention
from lvrpo.params.advantages import AdvantageParams, Advantages, AdvantageStats
from lvrpo.params.flow import (
    FlowLossMetrics,
    FlowLossParams,
    FlowPolicyLoss,
    GuidanceParams,
    StepCoefficients,
)
from lvrpo.params.loss_metrics import LossMetrics
from lvrpo.params.policy_loss import FusedPolicyLoss, LossParams, PolicyLoss
from lvrpo.sampler_correction import (
    Rejection,
    SamplerCorrection,
    SamplerCorrectionParams,
    SamplerCorrectionStats,
    off_policy_sequence_mask,
    sampler_weights,
    top_entropy_mask,
    top_entropy_threshold,
)
from lvrpo.token_advantages import (
    kl_penalized_rewards,
    optimal_baseline_advantages,
    reinforce_pp_advantages,
    remax_advantages,
    token_returns,
)

__version__ = "0.2.0"

__all__ = [
    "AdvantageParams",
    "AdvantageStats",
    "Advantages",
    "FlowLossMetrics",
    "FlowLossParams",
    "FlowPolicyLoss",
    "FusedPolicyLoss",
    "GuidanceParams",
    "LossMetrics",
    "LossParams",
    "PolicyLoss",
    "Rejection",
    "SamplerCorrection",
    "SamplerCorrectionParams",
    "SamplerCorrectionStats",
    "SpanMask",
    "StepCoefficients",
    "TargetIndex",
    "Tile",
    "bagel_position_ids",
    "clip_cov_weights",
    "flow_policy_loss",
    "flow_step",
    "gather_logprobs",
    "grpo_loss",
    "guided_velocity",
    "kl_cov_reference",
    "kl_penalized_rewards",
    "linear_grpo_loss",
    "linear_logprobs",
    "logits_grpo_loss",
    "mrope_position_ids",
    "normalize_advantages",
    "off_policy_sequence_mask",
    "optimal_baseline_advantages",
    "packed_attention",
    "position_ids",
    "reinforce_pp_advantages",
    "remax_advantages",
    "sampler_weights",
    "target_index",
    "token_returns",
    "top_entropy_mask",
    "top_entropy_threshold",
]
