"""Two processes of TRL's trainer with and without lvrpo: counts, entropies, gradients."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("trl", reason="pip install 'lvrpo[trl]'")

pytestmark = pytest.mark.slow
TESTS = Path(__file__).parents[1]
LIMIT = 300  # seconds


def results(kind: str, folder: Path, options: dict[str, Any]) -> list[dict[str, Any]]:
    """What each of two processes found."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    script = [str(TESTS / "integrations/trl_process.py"), kind, str(folder), json.dumps(options)]
    path = os.pathsep.join([str(TESTS.parent), str(TESTS)])
    done = subprocess.run(
        [*command, *script],
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=LIMIT,
    )
    assert done.returncode == 0, done.stderr
    return [json.loads((folder / f"{kind}-{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize(
    "options",
    [
        {"max_steps": 5, "num_iterations": 2},
        {
            "max_steps": 5,
            "top_entropy_quantile": 0.3,
            "entropy_coef": 0.05,
            "gradient_accumulation_steps": 2,
            "loss_type": "bnpo",
        },
    ],
)
def test_two_processes_log_what_those_of_trl_do(options, tmp_path):
    theirs, ours = (results(kind, tmp_path, options) for kind in ("theirs", "ours"))
    assert len(theirs) == len(ours) == 2
    for process, other in zip(ours, theirs, strict=True):
        assert len(process["norms"]) == 5
        for x, y in zip(process["norms"], other["norms"], strict=True):
            assert math.isclose(x, y, rel_tol=1e-5)
        for logged, expected in zip(process["logged"], other["logged"], strict=True):
            for key in logged.keys() - {"step_time"}:
                x, y = float(logged[key]), float(expected[key])
                assert math.isclose(x, y, rel_tol=1e-4, abs_tol=1e-6), key
