"""`import lvrpo` has no side effects and brings next to nothing on top of torch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]

PROBE = """
import json, os, sys
import torch
environment, modules = dict(os.environ), set(sys.modules)
import lvrpo
print(json.dumps({
    "environment_changed": dict(os.environ) != environment,
    "new": sorted({name.partition(".")[0] for name in set(sys.modules) - modules}),
    "cuda": torch.cuda.is_initialized(),
    "deterministic": torch.are_deterministic_algorithms_enabled(),
    "dtype": str(torch.get_default_dtype()),
    "undefined": [name for name in lvrpo.__all__ if not hasattr(lvrpo, name)],
}))
"""


def python(code: str, **options: Any) -> str:
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, capture_output=True, text=True, check=True, **options)
    assert result.stderr == ""
    return result.stdout


def test_import_is_pure_and_light():
    seen = json.loads(python(PROBE))
    assert not seen["environment_changed"]
    assert seen["new"] == ["lvrpo"]
    assert not seen["cuda"]
    assert not seen["deterministic"]
    assert seen["dtype"] == "torch.float32"
    assert seen["undefined"] == []


def test_several_processes_are_asked_for():
    code = (
        "import sys, torch, lvrpo; before = 'lvrpo.distributed' in sys.modules; "
        "import lvrpo.distributed; "
        "print(before, 'torch.distributed.tensor' in sys.modules, "
        "torch.distributed.is_initialized())"
    )
    assert python(code) == "False False False\n"


def test_our_kernels_folder_does_not_shadow_the_package_of_that_name(tmp_path):
    # `kernels` is a package on PyPI. A folder without __init__.py gives way to any regular package
    # on the path, even from the root of this repository, where Python looks first.
    theirs = tmp_path / "kernels"
    theirs.mkdir()
    (theirs / "__init__.py").write_text("theirs = True\n")
    code = f"import sys; sys.path.append({str(tmp_path)!r}); import kernels; print(kernels.theirs)"
    assert python(code, cwd=ROOT, env={**os.environ, "PYTHONPATH": ""}) == "True\n"


def test_packaged_kernels_resolve_to_the_folder():
    import lvrpo.kernels

    assert Path(*lvrpo.kernels.__path__).resolve() == ROOT / "kernels"
