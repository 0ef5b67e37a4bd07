"""Values at the edge of a dtype, a block or a row; and that nothing but a row decides its bits."""

from __future__ import annotations

import functools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ops.test_gather_logprobs import make_inputs, scales

import lvrpo
from lvrpo.reference.gather_logprobs import gather_logprobs as reference
from lvrpo.testing import check_op

BLOCK, CHUNK = 1024, 8192  # of the C++ backend: columns between looks at the maximum, per thread
FULL = {"return_entropy": True, "return_sum_squares": True}


def forward_and_backward(logits, ids, rows=None, **options):
    leaf = logits.detach().clone().requires_grad_()
    outputs = lvrpo.gather_logprobs(leaf, ids, rows, **FULL, **options)
    generator = torch.Generator().manual_seed(0)
    upstream = [torch.randn(out.shape, generator=generator).to(out) for out in outputs[:2]]
    return *outputs, *torch.autograd.grad(outputs[:2], leaf, upstream)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_shape_range_and_row_index(data):
    draw = data.draw
    rows, vocab = draw(st.integers(1, 5)), draw(st.integers(1, 2200))
    torch.manual_seed(draw(st.integers(0, 2**16)))
    dtype = draw(st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]))
    inputs = FULL | {"logits": (torch.randn(rows, vocab) * 4).to(dtype)}
    if draw(st.booleans()):
        low = torch.randint(0, vocab, (rows,))
        high = low + 1 + (torch.rand(rows) * (vocab - low)).long()
        inputs["vocab_range"] = torch.stack([low, high], dim=1)
    else:
        low, high = torch.zeros(rows, dtype=torch.int64), torch.full((rows,), vocab)
    of = torch.arange(rows)
    if draw(st.booleans()):
        inputs["row_index"] = of = torch.randint(0, rows, (draw(st.integers(1, 40)),))
    ids = low[of] + (torch.rand(len(of)) * (high - low)[of]).long()
    inputs["token_ids"] = ids
    inputs["temperature"] = draw(st.sampled_from([1.0, 0.6]))
    inputs["softcap"] = draw(st.sampled_from([None, 6.0]))
    magnitudes = scales({name: value for name, value in inputs.items() if value is not None})
    check_op(lvrpo.gather_logprobs, reference, inputs, differentiable=["logits"], scales=magnitudes)


@pytest.mark.parametrize("vocab", [3000, 3 * CHUNK + 5])
def test_a_row_alone_equals_the_row_in_a_batch(vocab):
    logits, ids = torch.randn(6, vocab), torch.randint(0, vocab, (6,))
    batch = lvrpo.gather_logprobs(logits, ids, **FULL)
    for row in range(6):
        alone = lvrpo.gather_logprobs(logits[row : row + 1], ids[row : row + 1], **FULL)
        assert all(torch.equal(a, b[row : row + 1]) for a, b in zip(alone, batch, strict=True))


@pytest.mark.parametrize("rows", [1, 7])
def test_the_number_of_threads_does_not_change_a_bit(rows):
    logits = torch.randn(rows, 3 * CHUNK + 5)
    ids, of = torch.randint(0, logits.shape[1], (20,)), torch.randint(0, rows, (20,))
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(forward_and_backward(logits, ids, of, softcap=20.0))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("step", [0.5, 10.0, 300.0])
@pytest.mark.parametrize("order", ["rising", "falling"])
def test_the_maximum_may_move_far_from_block_to_block(backend, step, order):
    blocks = torch.arange(12) if order == "rising" else torch.arange(12, 0, -1)
    logits = torch.randn(2, 12 * BLOCK) + step * blocks.repeat_interleave(BLOCK)
    inputs = FULL | {"logits": logits, "token_ids": torch.tensor([0, 12 * BLOCK - 1])}
    magnitudes = scales(inputs)
    magnitudes["dlogits"] += 1e-30  # a probability that is subnormal may count as 0
    op = functools.partial(lvrpo.gather_logprobs, backend=backend)
    check_op(op, reference, inputs, differentiable=["logits"], scales=magnitudes)


@pytest.mark.parametrize("vocab", [4099, 1, 8193])
def test_a_row_may_begin_and_end_anywhere(backend, vocab):
    """Within 16 bytes, in a buffer that holds something else around it; and so may its range."""
    buffer = torch.full((3 * vocab + 16,), 40.0, dtype=torch.float16)
    for ahead in (0, 1, 7):
        logits = buffer[ahead : ahead + 3 * vocab].view(3, vocab)
        logits.copy_(torch.randn(3, vocab))
        cut = torch.tensor([[0, vocab], [vocab // 2, vocab], [min(3, vocab - 1), vocab]])
        for ranges in (None, cut):
            outputs = lvrpo.gather_logprobs(
                *(logits, torch.full((3,), vocab - 1)),
                vocab_range=ranges,
                return_entropy=True,
                backend=backend,
            )
            rows = torch.zeros(3, 2).long() + torch.tensor([0, vocab]) if ranges is None else ranges
            for row, (low, high) in enumerate(rows.tolist()):
                log_p = logits[row, low:high].double().log_softmax(0)
                entropy = -(log_p.exp() * log_p).sum()
                gold = torch.stack([log_p[-1], entropy]).float()
                torch.testing.assert_close(torch.stack([x[row] for x in outputs]), gold)


@pytest.mark.parametrize("largest", [-100.0, -3e4, 3e4])
def test_a_row_far_below_or_above_0(backend, largest):
    logits = largest - torch.rand(2, 3000) * 5
    ids = torch.tensor([1, 2])
    exact = reference(logits.double(), ids)
    ours = lvrpo.gather_logprobs(logits, ids, backend=backend)
    assert (ours - exact).abs().max() < 1e-5


def test_a_row_may_begin_with_blocks_of_no_probability(backend):
    logits = torch.full((1, 4 * BLOCK), -torch.inf)
    logits[0, -2:] = torch.tensor([1.0, 2.0])
    logprobs, entropy = lvrpo.gather_logprobs(
        logits, torch.tensor([4 * BLOCK - 1]), return_entropy=True, backend=backend
    )
    expected = torch.log_softmax(logits[0, -2:], dim=0)
    torch.testing.assert_close(logprobs[0], expected[1])
    torch.testing.assert_close(entropy[0], -(expected.exp() * expected).sum())


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("at", [3, CHUNK + 3, 3 * CHUNK])
@pytest.mark.parametrize("rest", [0.0, -torch.inf])
def test_a_bad_logit_is_found_anywhere(backend, bad, at, rest):
    logits = torch.full((1, 3 * CHUNK + 1), rest)
    logits[0, 2 * CHUNK] = 0.0
    logits[0, at] = bad
    with pytest.raises(ValueError, match="row 0 of logits has no finite log-sum-exp"):
        lvrpo.gather_logprobs(logits, torch.tensor([2 * CHUNK]), backend=backend)


@pytest.mark.parametrize("vocab", [1, 2, 7, 8, 9, 15, 17, 63, 65, BLOCK - 1, BLOCK + 1, CHUNK + 1])
def test_no_padded_column_enters_a_sum(backend, vocab):
    # A padded column that counts as a logit of 0 would be most of the mass of these rows.
    logits = torch.full((2, vocab), -20.0)
    logprobs, entropy, squares = lvrpo.gather_logprobs(
        logits, torch.tensor([0, vocab - 1]), **FULL, backend=backend
    )
    log_vocab = torch.tensor(float(vocab)).log()
    torch.testing.assert_close(logprobs, -log_vocab.expand(2))
    torch.testing.assert_close(entropy, log_vocab.expand(2))
    torch.testing.assert_close(squares, torch.full((2,), 1 / vocab))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradient_of_a_confident_target_keeps_its_digits(backend, dtype):
    logits = torch.zeros(1, 1000, dtype=dtype)
    logits[0, 7] = 14.0  # p = 0.9992: in bf16 p is 1, and 1 - p would be 0
    leaf = logits.clone().requires_grad_()
    lvrpo.gather_logprobs(leaf, torch.tensor([7]), backend=backend).backward()
    exact = logits.double().requires_grad_()
    reference(exact, torch.tensor([7])).backward()
    relative = leaf.grad[0, 7].double() / exact.grad[0, 7] - 1
    assert relative.abs() < torch.finfo(dtype).eps


def test_numbers_of_fp16_from_subnormal_to_largest(backend):
    values = torch.arange(0x7C00, dtype=torch.int16).view(torch.float16)
    logits = torch.stack([values, -values])
    ids = torch.tensor([0, 5])
    ours = lvrpo.gather_logprobs(logits, ids, temperature=5e3, backend=backend)
    exact = reference(logits.double(), ids, temperature=5e3)
    assert (ours - exact).abs().max() < 1e-5


def test_thousands_of_tokens_of_one_row(backend):
    inputs = make_inputs(2, 50, 4000, torch.float32)
    inputs["token_ids"][::7] = -100
    kept = inputs["token_ids"] != -100
    op = functools.partial(lvrpo.gather_logprobs, backend=backend)
    magnitudes = {"out0": 20.0, "out1": 20.0, "out2": 1.0, "dlogits": 20.0 * kept.sum() / 4000}
    check_op(op, reference, inputs, differentiable=["logits"], scales=magnitudes)


def test_rows_beyond_2_to_the_31_elements(backend):
    # Only the pages of two rows are ever touched.
    memory = torch.empty(2**31 + 4096, dtype=torch.bfloat16)
    logits = memory.as_strided((2, 1000), (2**31 + 8, 1))
    logits.copy_(torch.randn(2, 1000))
    ids = torch.tensor([999, 0])
    small = forward_and_backward(logits.contiguous(), ids, backend=backend)
    leaf = logits.detach().requires_grad_()
    ours = lvrpo.gather_logprobs(leaf, ids, **FULL, inplace_backward=True, backend=backend)
    assert all(torch.equal(a, b) for a, b in zip(ours, small[:3], strict=True))
    (ours[0].sum() + ours[1].sum()).backward()
    again = logits.detach() if backend != "torch" else leaf.grad
    assert torch.equal(leaf.grad, again)
