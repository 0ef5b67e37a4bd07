"""What nvcc makes of the CUDA kernels: registers, local memory, width of loads, exponentials.

docs/kernels.md says what follows from these facts. They are of the machine code, not of a run.
"""

from __future__ import annotations

import itertools
import os
import shutil

import pytest
from compiled_cuda import toolkit
from machine_code import BYTES, kernels, wide_loads

#: Registers of a thread. 64 leave an SM four blocks of 256 threads, whose 64 bytes in flight each
#: hide the latency of its memory; 128 leave two: enough for what reads little, or waits for fp64.
HOT, OTHERS = 64, 128
#: A gradient has as many bytes on their way out as in: three blocks do.
REGISTERS = {("gather_logprobs", "dlogits_kernel"): 80, ("logits_grpo_loss", "row_kernel"): 80}
#: By kernel that reads or writes as much as the op does: the exponentials that its loop has for an
#: element of the packs in flight. A softmax needs one. Another moves the reference of a thread's
#: sums; in dlogits_kernel a pack at an edge has code of its own.
EXPONENTIALS = {
    ("gather_logprobs", "sums_kernel"): 1 + 1 / 16,
    ("gather_logprobs", "dlogits_kernel"): 1 + 5 / 8,
    ("flow_step", "step_kernel"): 0,
    ("flow_step", "gradient_kernel"): 0,
    ("flow_policy_loss", "sums_kernel"): 0,
    ("flow_policy_loss", "gradient_kernel"): 0,
    ("guided_velocity", "sums_kernel"): 0,
    ("guided_velocity", "sample_kernel"): 0,
    ("guided_velocity", "row_kernel"): 0,
    ("logits_grpo_loss", "row_kernel"): 1 + 1 / 16,
    ("scale_gradient", "scale_kernel"): 0,
}
#: Where loads are of one number: exponentials in all the code, for each token that a lane has at
#: once. That of grpo_loss holds every choice of a loss, of which a token takes one of each kind,
#: and that of its one launch the counts, too.
IN_ALL_CODE = {
    ("normalize_advantages", "advantages_kernel"): 0,
    ("grpo_loss", "count_kernel"): 1,
    ("grpo_loss", "terms_kernel"): 14,
    ("grpo_loss", "whole_kernel"): 1 + 14,
    ("grpo_loss", "reduce_kernel"): 0,
    ("grpo_loss", "finish_kernel"): 0,
}
TOKENS_AT_ONCE = 4
#: Bytes of local memory that a thread has, and that it moves in all its code: in fp64, which is
#: nobody's hot path, an address.
LOCAL = {
    ("flow_policy_loss", "sums_kernel", "double"): (8, 16),
    ("guided_velocity", "sums_kernel", "double"): (8, 24),
}
#: Of kernels that draw noise: fp64 fills their registers and their time, three blocks do, for the
#: third of which ptxas puts an address aside; on sm_100a, in 16 bits, two.
DRAWING, DRAWING_LOCAL = 97, (8, 24)
#: Packs of 16 bytes that a thread has in flight.
IN_FLIGHT = 4

#: Minutes of nvcc for each, which `make test-slow` takes but CI does not.
OTHER = [
    pytest.mark.slow,
    pytest.mark.skipif("CI" in os.environ, reason="CI compiles for one architecture"),
]
GPUS = ["sm_90a", pytest.param("sm_80", marks=OTHER), pytest.param("sm_100a", marks=OTHER)]
pytestmark = [
    pytest.mark.skipif(toolkit() is None, reason="nvcc is not found"),
    pytest.mark.skipif(shutil.which("c++filt") is None, reason="there is no c++filt"),
    pytest.mark.parametrize("gpu", GPUS),
]


def local(kernel):
    if kernel.draws:
        return DRAWING_LOCAL
    of_type = LOCAL.get((*kernel.key, *kernel.types[:1]), (0, 0))
    return LOCAL.get(kernel.key, of_type)


def test_no_kernel_spills_and_registers_leave_room_for_other_blocks(gpu):
    for kernel in kernels(gpu):
        is_hot = kernel.key in EXPONENTIALS and "double" not in kernel.types and not kernel.draws
        stack, spills = local(kernel)
        assert kernel.stack <= stack, kernel
        assert kernel.spills <= spills, kernel
        others = DRAWING if kernel.draws else OTHERS
        most = REGISTERS.get(kernel.key, HOT) if is_hot else others
        assert kernel.registers <= most, kernel
        # All of it is dynamic: the emulation checks its bounds.
        assert kernel.shared == 0, kernel


def test_hot_loops_load_16_bytes_at_a_time_and_take_one_exponential(gpu):
    seen = set()
    for kernel in kernels(gpu):
        if kernel.key not in EXPONENTIALS or kernel.draws:
            continue
        seen.add(kernel.key)
        body = kernel.hot_loop()
        assert wide_loads(body) >= 2, kernel.key
        if local(kernel) == (0, 0):
            assert not [text for text in body if "LDL" in text or "STL" in text], kernel.key
        # fp64 has no such instruction; a gradient of another type than its logits is not hot.
        is_mixed = len(kernel.types) == 3 and kernel.types[0] != kernel.types[1]
        if kernel.types[0] != "double" and not is_mixed:
            elements = IN_FLIGHT * 16 / BYTES[kernel.types[0]]
            taken = sum("MUFU.EX2" in text for text in body) / elements
            assert taken <= EXPONENTIALS[kernel.key], (kernel.key, kernel.types, taken)
    assert seen == set(EXPONENTIALS)


def test_kernels_of_a_few_numbers_take_few_exponentials(gpu):
    seen = set()
    for kernel in kernels(gpu):
        if kernel.key not in IN_ALL_CODE or "double" in kernel.types:
            continue
        seen.add(kernel.key)
        taken = sum("MUFU.EX2" in text for _, text in kernel.code) / TOKENS_AT_ONCE
        assert taken <= IN_ALL_CODE[kernel.key], (kernel.key, kernel.types, taken)
    assert seen == set(IN_ALL_CODE)


def test_a_factor_of_1_leaves_a_gradient_unread(gpu):
    found = [kernel for kernel in kernels(gpu) if kernel.key == ("scale_gradient", "scale_kernel")]
    assert found
    for kernel in found:
        texts = [text for _, text in kernel.code]
        before = list(itertools.takewhile(lambda text: "EXIT" not in text, texts))
        assert sum("LDG" in text for text in before) == 1, "the factor"
        assert texts[len(before)].startswith("@"), "a thread leaves for one factor, not always"
        assert not [text for text in before if "BRA" in text], kernel
