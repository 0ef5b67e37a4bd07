"""The probability that a policy gives a certain answer to a question about a picture."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lvrpo.data.example import Example
from lvrpo.models.packs import pack_groups
from lvrpo.models.unified.policy import Policy
from lvrpo.ops.gather_logprobs import gather_logprobs


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
        [N] fp32 in [0, 1].
    """
    if not len(questions):
        return torch.zeros(0)
    pixels = images.cpu().float().numpy()
    groups = []
    for i, (question, answer) in enumerate(zip(questions, answers, strict=True)):
        example = Example("understand", f"question {i}", question, image=pixels[i], answer=answer)
        groups.append((example, [policy.answer_ids(answer)]))
    (pack,) = pack_groups(policy, groups)
    text, _ = policy.model(pack.batch, backend=policy.backend)
    logprobs = gather_logprobs(
        policy.model.logits(text[pack.predictor]),
        pack.token_ids,
        vocab_range=policy.answer_range,
        backend=policy.backend,
    )
    lengths = pack.cu_seqlens.diff()
    sums = torch.zeros(len(lengths)).index_add_(
        0, torch.arange(len(lengths)).repeat_interleave(lengths), logprobs.float()
    )
    return sums.exp()
