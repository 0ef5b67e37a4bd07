"""A policy loss whose gradient is formed in the forward: which rows, in which order, and when.

R rows, T tokens, B sequences.
"""

from __future__ import annotations

import bisect
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from lvrpo import checks
from lvrpo.backends import Backend, library
from lvrpo.dtypes import numbers
from lvrpo.ops.head.linear import split
from lvrpo.ops.head.loss_inputs import LossInputs
from lvrpo.ops.head.loss_terms import LossTerms
from lvrpo.ops.head.rows import OUTSIDE, Chunk, Head, HeadRows
from lvrpo.ops.head.targets import any_of
from lvrpo.params.loss_metrics import STATISTICS
from lvrpo.token_layout import sequences_of
from lvrpo.token_selection import TokenSelection


def loss_arguments(
    indices: tuple[Tensor, Tensor | None, Tensor | None],  # as `HeadRows` takes them
    data: LossInputs,
    temperature: float,
    softcap: float | None,
) -> tuple[list[Tensor | None], list[bool], str]:
    """What `FusedLoss` is made of again inside a composite op.

    Returns:
        Tensors, flags, and the choices in one string, as schemas know no lists of strings.
    """
    params, terms, selection = data.params, data.terms(), data.selection
    given: tuple[Any, ...] = selection.top_entropy, selection.off_policy_threshold
    tensors = [
        *(*indices, numbers(temperature, softcap or 0.0, OUTSIDE)),
        *(terms.old_logprobs, terms.advantages, terms.cu_seqlens, terms.ref_logprobs),
        *(terms.mask, terms.policy_weights, terms.loss_numbers),
        *(None if x is None else numbers(x)[0] for x in given),
        *(selection.entropy_threshold, selection.sampler_logprobs, terms.bonus_scale),
    ]
    entropy_bonus = params.entropy_coef != 0
    every_active = params.beta != 0 or entropy_bonus
    of_gradient = params.sequence_level, every_active, entropy_bonus
    choices = " ".join(f"{kind}={name}" for kind, name in terms.choices.items())
    return tensors, [data.per_token, params.count_empty, *of_gradient], choices


@dataclasses.dataclass(frozen=True)
class FusedLoss:
    """What an op takes that forms log-probs and their loss at once, besides factors or logits.

    Attributes:
        token_ids: [T], OUTSIDE for one that is no target; this and the next two are for `HeadRows`.
        row_index: [T] or None.
        vocab_range: [R, 2] or None.
        softmax_numbers: of `lvrpo::gather_logprobs_fwd`.
        terms: the loss of log-probs and entropies.
        mask: [T].
        sequence_level: whether a token's gradient depends on its whole sequence.
        every_active: whether every active token has a gradient, whatever its advantage.
        entropy_bonus: whether the loss has a gradient by the entropy.
    """

    token_ids: Tensor
    row_index: Tensor | None
    vocab_range: Tensor | None
    softmax_numbers: Tensor
    terms: LossTerms
    mask: Tensor
    sequence_level: bool
    every_active: bool
    entropy_bonus: bool

    @classmethod
    def from_arguments(
        cls, tensors: Sequence[Tensor | None], flags: Sequence[bool], names: str
    ) -> FusedLoss:
        """From `loss_arguments`."""
        *of_terms, top_entropy, off_policy, threshold, sampler, bonus_scale = tensors[4:]
        selection = TokenSelection(top_entropy, threshold, off_policy, sampler)
        choices = dict(choice.split("=") for choice in names.split())
        terms = LossTerms(*of_terms, *flags[:2], choices, selection, bonus_scale)  # type: ignore[arg-type, call-arg]
        return cls(*tensors[:4], terms, terms.mask, *flags[2:])  # type: ignore[arg-type, call-arg]

    def rows(self, head: Head, backend: Backend, order: Tensor | None = None) -> HeadRows:
        """The rows of a head, of which nothing is known yet, in the order of the chunks."""
        indices = self.token_ids, self.row_index, self.vocab_range
        return HeadRows(head, backend, self.softmax_numbers, *indices, order)

    def loss(self, rows: HeadRows) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Loss, statistics and its derivatives by log-probs and entropies of the tokens.

        True of the tokens whose log-probs are known, and of those that nothing else decides about.
        """
        return self.terms.run(rows.backend, rows.logprobs, rows.entropy_of_tokens())

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
            left = self._left(rows, group, dlogprobs, of_rows)
            # From the back: the last chunk's logits are still there.
            for chunk in reversed(group if left is None else left):
                there = left is None and chunk == group[-1]
                rows.backward(chunk, dlogprobs, of_rows, logits if there else None)
        loss, statistics, _, _ = self.loss(rows)
        return loss, statistics, *self.reported(rows)

    def _left(
        self, rows: HeadRows, group: list[Chunk], dlogprobs: Tensor, of_rows: Tensor | None
    ) -> list[Chunk] | None:
        """The chunks of a group of the rows that a selection of tokens leaves with a gradient.

        None for all of them: it leaves too many, or values are not read.
        """
        if len(group) == 1 or not self.terms.selects or is_captured(dlogprobs):
            return None
        if not checks.check_values(dlogprobs):
            return None
        begin, end = group[0][0], group[-1][1]
        has_gradient = any_of(dlogprobs != 0, self.row_index, rows.head.rows)
        if of_rows is not None:
            has_gradient = has_gradient | (of_rows != 0)
        count = int(rows.in_order(has_gradient)[begin:end].sum())
        projected_again = group[-1][0] - begin
        if count >= projected_again:
            return None
        rows.put_first(has_gradient, (begin, end))
        return split(begin, begin + count, group[0][1] - begin)


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
    terms, active, row_of = call.terms, call.mask, call.row_index
    # On policy the ratio of a sequence is 1 before its log-probs are known; its KL is not.
    on_policy = terms.old_logprobs is None and terms.choices["kl_factor"] != "sequence_ratio"
    whole_sequences = (call.sequence_level and not on_policy) or terms.by_sampler
    if is_captured(active):
        chunks = split(0, rows, most)
        if not gradient:
            return Plan(None, [], chunks)
        whole = whole_sequences or terms.of_whole_batch
        return Plan(None, [chunks] if whole else [[chunk] for chunk in chunks], [])
    sequences = len(terms.cu_seqlens) - 1
    sequence = sequences_of(terms.cu_seqlens, len(active))
    advantages = terms.advantages if terms.advantage_per_token else terms.advantages[sequence]
    has_gradient = advantages != 0
    if terms.policy_weights is not None:
        has_gradient = has_gradient & (terms.policy_weights != 0)
    has_gradient = active & (has_gradient | call.every_active) & gradient
    if call.sequence_level:
        has_gradient = active & any_of(has_gradient, sequence, sequences)[sequence]

    rows_with_gradient, active_rows = (any_of(x, row_of, rows) for x in (has_gradient, active))
    order = (2 - rows_with_gradient.long() - active_rows.long()).argsort(stable=True)
    facts = [rows_with_gradient.sum().reshape(1), active_rows.sum().reshape(1)]
    if whole_sequences and not terms.of_whole_batch:
        position = order.argsort() if row_of is None else order.argsort()[row_of]
        facts.append(_straddled(position, sequence, has_gradient, (rows, sequences)))
    end, end_of_active, *straddled = torch.cat(facts).tolist()
    groups = [[chunk] for chunk in split(0, end, most)]
    if terms.of_whole_batch:
        groups = [split(0, end, most)] if end else []
    elif whole_sequences:
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


@library.register("scale_gradient", kernels="scale_gradient", mutates=["scaled"])
def _scale_fake(scaled: Tensor, gradient: Tensor, factor: Tensor) -> None:
    return None
