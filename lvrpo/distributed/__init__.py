"""Ops on several processes: a vocabulary or a batch that ranks share.

Every rank of the group calls, and gets the whole's numbers. How they talk: docs/distributed.md.
"""

from lvrpo.distributed.batch import (
    global_denominator,
    normalize_advantages,
    top_entropy_threshold,
)
from lvrpo.distributed.gather_logprobs import gather_logprobs
from lvrpo.distributed.linear_grpo_loss import linear_grpo_loss
from lvrpo.distributed.linear_logprobs import linear_logprobs
from lvrpo.distributed.loss_head import LossHead
from lvrpo.distributed.shards import VocabShards

__all__ = [
    "LossHead",
    "VocabShards",
    "gather_logprobs",
    "global_denominator",
    "linear_grpo_loss",
    "linear_logprobs",
    "normalize_advantages",
    "top_entropy_threshold",
]
