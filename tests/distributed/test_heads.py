"""A vocabulary over ranks gives what one process gives, values, gradients and metrics."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest
import sharded_heads
import torch
from loss_inputs import PARAMS
from mutants._distributed import MUTANTS
from rank_pool import Ranks, ranks
from runnable import ON_HOST

SIZES = (2, 4)
#: Of 23 columns.
CUTS = {
    "2 even": [(0, 12), (12, 23)],
    "2, one of a column": [(0, 22), (22, 23)],
    "2, in the other order": [(9, 23), (0, 9)],
    "2, one with nothing": [(0, 23), (23, 23)],
    "4 uneven": [(0, 2), (2, 13), (13, 14), (14, 23)],
    "4, mixed, one with nothing": [(20, 23), (0, 7), (7, 7), (7, 20)],
}
OPTIONS = {
    "plain": {},
    "temperature and softcap": {"temperature": 0.7, "softcap": 4.0},
    "a slice of the vocabulary": {"vocab_range": (3, 21)},
    "a slice that some ranks have none of": {"vocab_range": (2, 7), "temperature": 2.0},
    "a slice for each row": {"vocab_range": "of rows", "softcap": 6.0},
}


@pytest.fixture(scope="module")
def groups() -> Iterator[dict[int, Ranks]]:
    with ranks(2) as two, ranks(4) as four:
        yield {2: two, 4: four}


def random_cuts(size: int, vocab: int, seed: int) -> list[tuple[int, int]]:
    """Any, empty ones and any order included."""
    draw = random.Random(seed)
    ends = sorted(draw.randint(0, vocab) for _ in range(size - 1))
    cuts = list(zip([0, *ends], [*ends, vocab], strict=True))
    draw.shuffle(cuts)
    return cuts


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("cuts", CUTS.values(), ids=CUTS)
@pytest.mark.parametrize("backend", ON_HOST)
def test_logprobs(groups, backend, cuts, options):
    for check in (sharded_heads.check_linear, sharded_heads.check_logits):
        groups[len(cuts)].run(check, cuts, backend, torch.float32, options)


@pytest.mark.parametrize("params", PARAMS.values(), ids=PARAMS)
def test_loss(groups, params):
    for cuts in (CUTS["2, one of a column"], CUTS["4, mixed, one with nothing"]):
        run = groups[len(cuts)].run
        run(sharded_heads.check_loss, cuts, None, torch.float32, params, 5, {})


@pytest.mark.parametrize("name", ["grpo, all terms", "gspo, all terms"])
def test_loss_on_the_reference(groups, name):
    given = torch.float32, PARAMS[name], 5, {"softcap": 9.0}
    for cuts in (CUTS["2 even"], CUTS["4 uneven"]):
        groups[len(cuts)].run(sharded_heads.check_loss, cuts, "torch", *given)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_other_dtypes(groups, dtype):
    cuts = CUTS["4 uneven"]
    run = groups[4].run
    run(sharded_heads.check_linear, cuts, None, dtype, {})
    run(sharded_heads.check_logits, cuts, None, dtype, {})
    run(sharded_heads.check_loss, cuts, None, dtype, PARAMS["gspo, all terms"], 7, {})


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("size", SIZES)
def test_any_cuts_and_any_budget(groups, size, seed):
    cuts = random_cuts(size, 5 + 4 * seed, seed)
    names = list(PARAMS)
    params, rows = PARAMS[names[seed * 7 % len(names)]], 1 + seed * 3
    groups[size].run(sharded_heads.check_linear, cuts, None, torch.float64, {})
    groups[size].run(sharded_heads.check_loss, cuts, None, torch.float64, params, rows, {})


@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_mutant_is_rejected_by_every_rank(groups, mutant):
    given = mutant, sharded_heads.check_linear, CUTS["2 even"], None, torch.float32, {}
    assert all(groups[2].run(sharded_heads.is_rejected, *given))


def test_what_is_sent(groups):
    rows, masked, width = 7, 2, 12
    for found in groups[2].run(sharded_heads.messages, CUTS["2 even"]):
        # Numbers and messages, forward and backward: statistics of rows, log-probs of tokens, and
        # the gradient of the hidden states.
        assert found == {
            "gather_logprobs": [4 * rows, 0, 1, 0],
            "linear_logprobs": [4 * rows, rows * width, 1, 1],
            "linear_grpo_loss": [4 * (rows - masked) + rows * width, 0, 2, 0],
        }


@pytest.mark.parametrize(
    ("check", "given"),
    [
        (sharded_heads.check_second_backward, ()),
        (sharded_heads.check_frozen, ("weight",)),
        (sharded_heads.check_frozen, ("hidden",)),
        (sharded_heads.check_frozen, ("bias",)),
        (sharded_heads.check_without_gradients, ()),
        (sharded_heads.check_autocast, ()),
        # Dynamo looks at every frame.
        pytest.param(sharded_heads.check_compiled, (), marks=pytest.mark.slow),
        (sharded_heads.check_nothing, ()),
        *((sharded_heads.check_selection, (backend,)) for backend in ON_HOST),
        *((sharded_heads.check_unused_rows, (backend,)) for backend in ON_HOST),
        *((sharded_heads.check_part_of_nothing, (backend,)) for backend in ON_HOST),
    ],
)
def test_edges(groups, check, given):
    groups[2].run(check, CUTS["2 even"], *given)
