"""The page on verl runs, and verl finds the names that it registers by itself."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("verl", reason="pip install 'lvrpo[verl]'")

PAGE = Path(__file__).parents[2] / "examples/verl.md"
BLOCKS = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.M | re.S)


def run(code: str, folder: Path, **variables: str) -> str:
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        cwd=folder,
        env=os.environ | variables,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_the_page_runs(tmp_path):
    assert "actor/ppo_kl" in run("\n".join(BLOCKS), tmp_path)


def test_verl_imports_the_module_of_the_page(tmp_path):
    (tmp_path / "with_lvrpo.py").write_text(BLOCKS[0], encoding="utf-8")
    code = "from verl.trainer.ppo import core_algos as c; print(*c.POLICY_LOSS_REGISTRY)"
    assert "lvrpo_gspo" in run(code, tmp_path, VERL_USE_EXTERNAL_MODULES="with_lvrpo")
