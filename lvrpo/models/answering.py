"""The probability that a policy gives a certain answer to a question about a picture."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lvrpo.data.example import Example
from lvrpo.models.protocol import Policy


@torch.no_grad()
def answer_probability(
    policy: Policy, images: Tensor, questions: Sequence[str], answers: Sequence[str]
) -> Tensor:
    """p(answer | image, question), the end of the answer included.

    Args:
        policy: the answerer.
        images: [N, C, H, W] in [0, 1].
        questions: [N].
        answers: [N].

    Returns:
        [N] fp32 in [0, 1], on the policy's device.
    """
    if not len(questions):
        return torch.zeros(0)
    pixels = images.cpu().float().numpy()
    groups = []
    for i, (question, answer) in enumerate(zip(questions, answers, strict=True)):
        example = Example("understand", f"question {i}", question, image=pixels[i], answer=answer)
        groups.append((example, [policy.answer_ids(answer)]))
    (pack,) = policy.packs(groups)
    logprobs = policy.forward(pack).logprobs(pack, backend=policy.backend)
    owner = torch.arange(len(questions), device=logprobs.device).repeat_interleave(
        pack.cu_seqlens.diff(), output_size=len(logprobs)
    )
    sums = torch.zeros(len(questions), device=logprobs.device)
    return sums.index_add_(0, owner, logprobs.float()).exp()
