"""The formulas of docs/ops/gather_logprobs.md as plain as they are there: nothing of lvrpo."""

from __future__ import annotations

import torch
from torch import Tensor


def softmax_terms(
    logits: Tensor,  # [R, V], every row of them used
    token_ids: Tensor,  # [T], none ignored
    rows: Tensor,  # [T]
    *,
    temperature: float = 1.0,
    softcap: float | None = None,
    vocab_range: Tensor | None = None,  # [R, 2]
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probs [T], entropies [R] and sums of squares [R], differentiable."""
    logprobs, entropy, squares = [], [], []
    for row in range(len(logits)):
        low, high = (0, logits.shape[1]) if vocab_range is None else vocab_range[row].tolist()
        x = logits[row, low:high]
        z = (x if softcap is None else softcap * (x / softcap).tanh()) / temperature
        z = z - z.detach().max()
        p = z.exp() / z.exp().sum()
        log_p = z - z.exp().sum().log()
        entropy.append(-(p * log_p).sum())
        squares.append(p.detach().square().sum())
        logprobs.append(log_p)
    firsts = [0] * len(logits) if vocab_range is None else vocab_range[:, 0].tolist()
    gathered = [
        logprobs[row][token - firsts[row]]
        for token, row in zip(token_ids.tolist(), rows.tolist(), strict=True)
    ]
    return torch.stack(gathered), torch.stack(entropy), torch.stack(squares)
