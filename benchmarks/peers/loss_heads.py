"""Other libraries' loss heads, each wrapped to take and return what our op does.

Every peer gets the same inputs and its own recommended settings. A log-prob head is called as
linear_logprobs(hidden, weight, token_ids, return_entropy=...), one from logits as gather_logprobs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from harness.providers import DEVICE, Peer
from torch import Tensor

TRL_CHUNK_SIZE = 32_768  # of the vocabulary, in trl.trainer.utils
NEEDS_GPU = "" if DEVICE == "cuda" else "needs a CUDA device"
CLIP_LOW, CLIP_HIGH = 0.2, 0.28  # of the preset "dapo", for peers that have the whole loss


def plain_gather_logprobs(logits: Tensor, token_ids: Tensor, return_entropy: bool = False) -> Any:
    """What everybody writes first."""
    all_logprobs = torch.log_softmax(logits, dim=-1)
    logprobs = all_logprobs.gather(1, token_ids[:, None])[:, 0]
    if not return_entropy:
        return logprobs
    return logprobs, -(all_logprobs.exp() * all_logprobs).sum(dim=-1)


def plain_linear_logprobs(
    hidden: Tensor, weight: Tensor, token_ids: Tensor, return_entropy: bool = False
) -> Any:
    logits = hidden @ weight.T
    wide = logits if logits.dtype == torch.float64 else logits.float()
    return plain_gather_logprobs(wide, token_ids, return_entropy)


def with_plain_loss(head: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The loss of preset "dapo" without KL, as plain PyTorch after a log-prob head."""

    def loss(
        token_ids: Tensor,
        old_logprobs: Tensor,
        advantages: Tensor,
        cu_seqlens: Tensor,
        mask: Tensor,
        params: Any = None,
        **of_head: Any,
    ) -> Tensor:
        logprobs = head(**of_head, token_ids=token_ids)
        advantage = advantages.repeat_interleave(cu_seqlens.diff())
        ratio = (logprobs - old_logprobs).exp()
        clipped = ratio.clamp(1 - CLIP_LOW, 1 + CLIP_HIGH)
        per_token = -torch.minimum(ratio * advantage, clipped * advantage)
        return (per_token * mask).sum() / mask.sum()

    return loss


def without_masked_rows(head: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """linear_grpo_loss by `head`, which sees the active rows only, as in TRL's trainer."""

    def loss(**inputs: Any) -> Tensor:
        active = inputs["mask"]

        def active_rows(hidden: Tensor, weight: Tensor, token_ids: Tensor) -> Tensor:
            found = head(hidden[active], weight, token_ids[active])
            return found.new_zeros(active.shape).masked_scatter(active, found)

        return with_plain_loss(active_rows)(**inputs)

    return loss


def _trl_two_calls() -> Callable[..., Any]:
    from trl.trainer.utils import entropy_from_logits, selective_log_softmax

    def run(logits: Tensor, token_ids: Tensor, return_entropy: bool = False) -> Any:
        logprobs = selective_log_softmax(logits, token_ids)
        return (logprobs, entropy_from_logits(logits)) if return_entropy else logprobs

    return run


def _trl_one_call() -> Callable[..., Any]:
    if DEVICE == "cuda":  # its Triton kernel by itself, which needs fewer packages
        from trl.kernels.logprob_entropy import selective_log_softmax_and_entropy
    else:
        from trl.trainer.utils import selective_log_softmax_and_entropy

    def run(logits: Tensor, token_ids: Tensor, return_entropy: bool = True) -> Any:
        return selective_log_softmax_and_entropy(logits, token_ids)

    return run


def _verl_from_logits() -> Callable[..., Any]:
    from verl.utils.torch_functional import entropy_from_logits, logprobs_from_logits

    def run(logits: Tensor, token_ids: Tensor, return_entropy: bool = False) -> Any:
        logprobs = logprobs_from_logits(logits, token_ids, inplace_backward=False)
        return (logprobs, entropy_from_logits(logits)) if return_entropy else logprobs

    return run


def _liger_from_logits() -> Callable[..., Any]:
    from liger_kernel.transformers.grpo_loss import fused_selective_log_softmax

    def run(logits: Tensor, token_ids: Tensor, return_entropy: bool = False) -> Tensor:
        # Takes one sequence whose last row predicts nothing, and skips it.
        return fused_selective_log_softmax(logits[None], token_ids[None, :-1], 1.0)[0]

    return run


def _quack_from_logits() -> Callable[..., Any]:
    from quack.cross_entropy import cross_entropy

    def run(logits: Tensor, token_ids: Tensor, return_entropy: bool = False) -> Tensor:
        return -cross_entropy(logits, token_ids, reduction="none")

    return run


def _trl_linear() -> Callable[..., Any]:
    from trl.kernels import ChunkedLogProbFunction

    def run(hidden: Tensor, weight: Tensor, token_ids: Tensor, return_entropy: bool = False) -> Any:
        outputs = ("entropy",) if return_entropy else ()
        logprobs, entropy, *_ = ChunkedLogProbFunction.apply(
            *(hidden, weight, None, token_ids, 1.0, TRL_CHUNK_SIZE, None, 1.0, outputs)
        )
        return (logprobs, entropy) if return_entropy else logprobs

    return run


def _verl_linear() -> Callable[..., Any]:
    if DEVICE == "cuda":
        from verl.utils.kernel.linear_cross_entropy import linear_cross_entropy as head
    else:
        from verl.utils.experimental.torch_functional import FusedLinearForPPO

        head = FusedLinearForPPO()

    def run(hidden: Tensor, weight: Tensor, token_ids: Tensor, return_entropy: bool = False) -> Any:
        logprobs, entropy = head(hidden, weight, token_ids, 1.0)
        return (logprobs, entropy) if return_entropy else logprobs

    return run


def _liger_linear() -> Callable[..., Any]:
    from liger_kernel.ops import LigerFusedLinearScaledCrossEntropyFunction

    def run(hidden: Tensor, weight: Tensor, token_ids: Tensor, return_entropy: bool = False) -> Any:
        found = LigerFusedLinearScaledCrossEntropyFunction.apply(
            hidden, weight, token_ids, return_entropy=return_entropy
        )
        return (-found[0], found[1]) if return_entropy else -found

    return run


def _cce_linear() -> Callable[..., Any]:
    from cut_cross_entropy import linear_cross_entropy

    impl = "cce" if DEVICE == "cuda" else "torch_compile"

    def run(hidden: Tensor, weight: Tensor, token_ids: Tensor, return_entropy: bool = False) -> Any:
        return -linear_cross_entropy(hidden, weight, token_ids, reduction="none", impl=impl)

    return run


def _liger_whole_loss() -> Callable[..., Any]:
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    loss = LigerFusedLinearGRPOLoss(
        *(0.0, True, False),  # no KL; torch.compile, which is its default; no reference model
        epsilon_low=CLIP_LOW,
        epsilon_high=CLIP_HIGH,
        loss_type="bnpo",
    )

    def run(**given: Any) -> Tensor:
        """For sequences of one length, which is all that padded tensors can be compared on."""
        sequences = len(given["cu_seqlens"]) - 1

        def padded(name: str) -> Tensor:
            return given[name].unflatten(0, (sequences, -1))

        found: Tensor = loss(
            padded("hidden"),
            given["weight"],
            padded("token_ids"),
            padded("mask"),
            given["advantages"],
            old_per_token_logps=padded("old_logprobs"),
        )[0]
        return found

    return run


FROM_LOGITS: Mapping[str, Peer] = {
    "trl": Peer(_trl_two_calls, "trl"),
    "verl": Peer(_verl_from_logits, "verl"),
}
FROM_LOGITS_WITH_ENTROPY: Mapping[str, Peer] = {"trl, one call": Peer(_trl_one_call, "trl")}
#: These return no entropy, and liger's has no gradient.
FROM_LOGITS_WITHOUT_ENTROPY: Mapping[str, Peer] = {
    "liger": Peer(_liger_from_logits, "liger-kernel", NEEDS_GPU),
    "quack": Peer(_quack_from_logits, "quack-kernels", NEEDS_GPU, compiles=True),
}
FROM_HIDDEN: Mapping[str, Peer] = {
    "trl": Peer(_trl_linear, "trl"),
    "verl": Peer(_verl_linear, "verl"),
    "liger": Peer(_liger_linear, "liger-kernel"),
}
FROM_HIDDEN_WITHOUT_ENTROPY: Mapping[str, Peer] = {
    "cce": Peer(_cce_linear, "cut-cross-entropy", compiles=True),
}
LOSS_FROM_LOGITS: Mapping[str, Peer] = {
    "trl": Peer(lambda: with_plain_loss(_trl_two_calls()), "trl"),
    "verl": Peer(lambda: with_plain_loss(_verl_from_logits()), "verl"),
    "quack": Peer(
        lambda: with_plain_loss(_quack_from_logits()), "quack-kernels", NEEDS_GPU, compiles=True
    ),
}
WHOLE_LOSS: Mapping[str, Peer] = {
    "trl": Peer(lambda: without_masked_rows(_trl_linear()), "trl"),
    "verl": Peer(lambda: with_plain_loss(_verl_linear()), "verl"),
    "liger": Peer(lambda: with_plain_loss(_liger_linear()), "liger-kernel"),
    "liger, whole": Peer(_liger_whole_loss, "liger-kernel", compiles=True),
    "cce": Peer(lambda: with_plain_loss(_cce_linear()), "cut-cross-entropy", compiles=True),
}
