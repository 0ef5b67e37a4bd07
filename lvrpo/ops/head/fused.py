"""A policy loss whose gradient is formed in the forward: which rows, in which order, and when.

R rows, T tokens, B sequences.
"""

from __future__ import annotations

import bisect
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lvrpo import checks
from lvrpo.backends import Backend
from lvrpo.dtypes import numbers
from lvrpo.ops.head.linear import split
from lvrpo.ops.head.loss_inputs import LossInputs
from lvrpo.ops.head.rows import OUTSIDE, Chunk, Head, HeadRows
from lvrpo.ops.head.targets import any_of
from lvrpo.params.loss_metrics import STATISTICS
from lvrpo.token_layout import sequences_of


def loss_arguments(
    indices: tuple[Tensor, Tensor | None, Tensor | None],  # as `HeadRows` takes them
    data: LossInputs,
    temperature: float,
    softcap: float | None,
) -> tuple[list[Tensor | None], list[bool], str]:
    """What `FusedLoss` is made of again inside a composite op, in the order of its fields.

    Returns:
        Tensors, flags, and the choices in one string, as schemas know no lists of strings.
    """
    params = data.params
    tensors = [
        *(*indices, numbers(temperature, softcap or 0.0, OUTSIDE)),
        *(data.old_logprobs, data.advantages, data.layout.offsets, data.ref_logprobs),
        *(data.mask, data.policy_weights, data.numbers()),
    ]
    entropy_bonus = params.entropy_coef != 0
    every_active = params.beta != 0 or entropy_bonus
    of_gradient = params.sequence_level, every_active, entropy_bonus
    choices = " ".join(f"{kind}={name}" for kind, name in params.choices().items())
    return tensors, [data.per_token, params.count_empty, *of_gradient], choices


@dataclasses.dataclass(frozen=True)
class FusedLoss:
    """What an op takes that forms log-probs and their loss at once, besides factors or logits.

    Attributes:
        token_ids: [T], OUTSIDE for one that is no target; this and the next two are for `HeadRows`.
        row_index: [T] or None.
        vocab_range: [R, 2] or None.
        softmax_numbers: of `lvrpo::gather_logprobs_fwd`.
        old_logprobs: [T] or None; from here to `count_empty` as `lvrpo::grpo_loss_fwd` takes them.
        sequence_level: whether a token's gradient depends on its whole sequence.
        every_active: whether every active token has a gradient, whatever its advantage.
        entropy_bonus: whether the loss has a gradient by the entropy.
        choices: by argument of `lvrpo::grpo_loss_fwd`, the names that say which arithmetic it does.
    """

    token_ids: Tensor
    row_index: Tensor | None
    vocab_range: Tensor | None
    softmax_numbers: Tensor
    old_logprobs: Tensor | None
    advantages: Tensor
    cu_seqlens: Tensor
    ref_logprobs: Tensor | None
    mask: Tensor
    policy_weights: Tensor | None
    loss_numbers: Tensor
    advantage_per_token: bool
    count_empty: bool
    sequence_level: bool
    every_active: bool
    entropy_bonus: bool
    choices: Mapping[str, str]

    @classmethod
    def from_arguments(
        cls, tensors: Sequence[Tensor | None], flags: Sequence[bool], names: str
    ) -> FusedLoss:
        """From `loss_arguments`."""
        choices = dict(choice.split("=") for choice in names.split())
        return cls(*tensors, *flags, choices)  # type: ignore[arg-type, call-arg]

    def rows(self, head: Head, backend: Backend, order: Tensor | None = None) -> HeadRows:
        """The rows of a head, of which nothing is known yet, in the order of the chunks."""
        indices = self.token_ids, self.row_index, self.vocab_range
        return HeadRows(head, backend, self.softmax_numbers, *indices, order)

    def loss(self, rows: HeadRows) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Loss, statistics and its derivatives by log-probs and entropies of the tokens.

        True of the tokens whose log-probs are known.
        """
        found: tuple[Tensor, Tensor, Tensor, Tensor] = rows.backend.op("grpo_loss_fwd")(
            *(rows.logprobs, self.old_logprobs, self.advantages, self.cu_seqlens),
            *(self.ref_logprobs, rows.entropy_of_tokens(), self.mask, self.policy_weights),
            *(self.loss_numbers, self.advantage_per_token, self.count_empty),
            **self.choices,
        )
        return found

    def reported(self, rows: HeadRows) -> tuple[Tensor, Tensor]:
        """Log-probs and entropy [T], 0 for a masked token."""
        entropy = torch.where(self.mask, rows.entropy_of_tokens(), 0.0)
        return torch.where(self.mask, rows.logprobs, 0.0), entropy

    def run(self, rows: HeadRows, plan: Plan) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Loss, statistics, log-probs and entropy [T]; the gradients stay in the head of `rows`."""
        for chunk in plan.metrics_only:
            rows.forward(chunk)
        for group in plan.groups:
            for chunk in group:
                logits = rows.forward(chunk)
            _, _, dlogprobs, dentropy = self.loss(rows)
            of_rows = rows.sum_over_rows(dentropy) if self.entropy_bonus else None
            # From the back: the last chunk's logits are still there.
            for chunk in reversed(group):
                rows.backward(chunk, dlogprobs, of_rows, logits if chunk == group[-1] else None)
        loss, statistics, _, _ = self.loss(rows)
        return loss, statistics, *self.reported(rows)


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a pass over the rows does.

    Attributes:
        order: [R] the rows that chunks count through; None as they are.
        groups: chunks with a gradient. The gradients of a group's tokens are known when all of it
            has been projected: a group of one chunk is projected once, a longer one twice.
        metrics_only: chunks that the metrics need and whose gradient is zero.
    """

    order: Tensor | None
    groups: list[list[Chunk]]
    metrics_only: list[Chunk]

    def chunks(self) -> list[Chunk]:
        """All of them."""
        return [*(chunk for group in self.groups for chunk in group), *self.metrics_only]


def plan_rows(call: FusedLoss, rows: int, most: int, gradient: bool) -> Plan:
    """The plan, after one read from the device of the tokens (none while a graph is captured).

    Args:
        call: the loss.
        rows: R.
        most: rows of a chunk.
        gradient: whether anything is to be differentiated.
    """
    # On policy the ratio of a sequence is 1 before its log-probs are known; its KL is not.
    on_policy = call.old_logprobs is None and call.choices["kl_factor"] != "sequence_ratio"
    whole_sequences = call.sequence_level and not on_policy
    active, row_of = call.mask, call.row_index
    if is_captured(active):
        chunks = split(0, rows, most)
        if not gradient:
            return Plan(None, [], chunks)
        return Plan(None, [chunks] if whole_sequences else [[chunk] for chunk in chunks], [])
    sequences = len(call.cu_seqlens) - 1
    sequence = sequences_of(call.cu_seqlens, len(active))
    advantages = call.advantages if call.advantage_per_token else call.advantages[sequence]
    has_gradient = advantages != 0
    if call.policy_weights is not None:
        has_gradient = has_gradient & (call.policy_weights != 0)
    has_gradient = active & (has_gradient | call.every_active) & gradient
    if call.sequence_level:
        has_gradient = active & any_of(has_gradient, sequence, sequences)[sequence]

    rows_with_gradient, active_rows = (any_of(x, row_of, rows) for x in (has_gradient, active))
    order = (2 - rows_with_gradient.long() - active_rows.long()).argsort(stable=True)
    facts = [rows_with_gradient.sum().reshape(1), active_rows.sum().reshape(1)]
    if whole_sequences:
        position = order.argsort() if row_of is None else order.argsort()[row_of]
        facts.append(_straddled(position, sequence, has_gradient, (rows, sequences)))
    end, end_of_active, *straddled = torch.cat(facts).tolist()
    groups = [[chunk] for chunk in split(0, end, most)]
    if whole_sequences:
        groups = group_between([at for at in range(end + 1) if not straddled[at]], most)
    return Plan(None if end == rows else order, groups, split(end, end_of_active, most))


def group_between(cuts: Sequence[int], most: int) -> list[list[Chunk]]:
    """Groups that begin and end at cuts: one chunk where the rows up to a cut fit, or several."""
    groups, begin = [], 0
    while begin < cuts[-1]:
        end = cuts[bisect.bisect_right(cuts, begin + most) - 1]
        if end == begin:
            end = cuts[bisect.bisect_right(cuts, begin)]
        groups.append(split(begin, end, most))
        begin = end
    return groups


def is_captured(tensor: Tensor) -> bool:
    """Whether a CUDA graph is being recorded, which must not wait for the device."""
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()


def _straddled(
    position: Tensor, sequence: Tensor, has_gradient: Tensor, sizes: tuple[int, int]
) -> Tensor:
    """[R + 1] how many sequences with a gradient have rows on both sides of a cut before a row."""
    rows, sequences = sizes

    def end(side: str, nowhere: int) -> Tensor:
        inside = torch.where(has_gradient, position, nowhere)
        return position.new_full((sequences,), nowhere).scatter_reduce(0, sequence, inside, side)

    first, last = end("amin", rows), end("amax", -1)
    present = (last >= 0).long()
    steps = position.new_zeros(rows + 2)
    steps.index_add_(0, first + 1, present).index_add_(0, last + 1, -present)
    return steps.cumsum(0)[: rows + 1]


def empty_results(like: Tensor, token_ids: Tensor | None, rows: int) -> tuple[Tensor, ...]:
    """Of the shapes of loss, statistics, log-probs and entropy [T], and log-sum-exp [R]."""
    assert token_ids is not None
    of_tokens = like.new_empty(token_ids.shape), like.new_empty(token_ids.shape)
    statistics = like.new_empty(len(STATISTICS), dtype=torch.float64)
    return like.new_empty(()), statistics, *of_tokens, like.new_empty(rows)


def save_gradients(ctx: Any, inputs: Sequence[Tensor | None], gradients: list[Tensor]) -> None:
    """Keep gradients for the backward, and what they are computed from; called in a forward."""
    ctx.traced = torch.compiler.is_compiling()
    if ctx.traced:
        ctx.save_for_backward(*gradients)
    else:
        ctx.save_for_backward(*inputs)
        ctx.gradients = gradients


def release_gradients(
    ctx: Any,
    dloss: Tensor,
    dtype: torch.dtype,
    backend: Backend,
    recompute: Callable[[], list[Tensor]],
) -> list[Tensor]:
    """The saved gradients, scaled and in `dtype`; from `recompute` the second time."""
    if ctx.traced:  # a graph may not write to what it saved
        return [(gradient * dloss).to(dtype) for gradient in ctx.saved_tensors]
    # Given away: a buffer that is as large as the weight becomes its gradient.
    gradients, ctx.gradients = ctx.gradients, None
    gradients = recompute() if gradients is None else gradients
    by_one = checks.check_values(dloss) and float(dloss) == 1.0
    scaled = []
    while gradients:  # emptied, so that no two copies outlive the loop
        gradient = gradients.pop(0)
        scaled.append(gradient.to(dtype) if by_one else backend.scaled(gradient, dloss, dtype))
    return scaled
