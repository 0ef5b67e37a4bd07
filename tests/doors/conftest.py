"""What the table promises and some op does not keep yet."""

from __future__ import annotations

import re

import pytest

#: By test, as a pattern of its name with parameters: why it fails. A test that passes has to go.
PENDING: dict[str, str] = {
    r"test_two_graphs_serve_all_values\[\w+-packed_attention-scores\]": "constants of the graph",
    r"test_gradients_are_the_same_bits\[cpp-packed_attention-non_reentrant-(fp32|autocast)\]": (
        "its backward reads what it saved more than once"
    ),
    r"test_gradients_are_the_same_bits\[\w+-packed_attention-\w+-autocast of 16-bit weights\]": (
        "it refuses mixed dtypes under autocast"
    ),
    r"test_attention_does_what_sdpa_does\[.*\]": "autocast does not lower its factors",
    r"test_a_frozen_part_may_be_an_inference_tensor\[\w+-packed_attention\]": "saved as they are",
}


@pytest.fixture(autouse=True)
def _pending(request: pytest.FixtureRequest) -> None:
    for pattern, reason in PENDING.items():
        if re.fullmatch(pattern, request.node.name):
            request.applymarker(pytest.mark.xfail(strict=True, reason=reason))
