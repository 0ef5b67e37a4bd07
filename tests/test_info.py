from __future__ import annotations

import json
import subprocess
import sys

import lvrpo
from lvrpo import backends, info
from lvrpo.backends import library


def test_command_prints_the_report():
    result = subprocess.run(
        [sys.executable, "-m", "lvrpo.info"], capture_output=True, text=True, check=True
    )
    assert f"lvrpo      {lvrpo.__version__}" in result.stdout
    assert result.stderr == ""
    for name in [*(x.name for x in backends.ALL), *info.op_names()]:
        assert f"\n  {name} " in result.stdout


def test_a_missing_extension_says_why(monkeypatch):
    monkeypatch.setattr(library, "EXTENSION", None)
    monkeypatch.setattr(library, "MISSING", "no compiler was found")
    report = info.describe()
    assert "lvrpo._C   missing: no compiler was found" in report
    assert "cpp      no compiler was found" in report


def test_every_op_has_the_reference_and_the_compiled_backend():
    for op in info.op_names():
        expected = {"torch"} if library.MISSING else {"cpp", "torch"}
        assert expected <= set(info.backends_of(op)), op


def test_an_op_is_not_taken_for_another_with_a_longer_name():
    assert info.backends_of("gather") == ["torch"]


def test_environment_is_json():
    facts = json.loads(json.dumps(info.environment()))
    assert facts["lvrpo"] == lvrpo.__version__
    assert facts["threads"] >= 1


def test_commit_is_none_for_an_installed_copy(monkeypatch, tmp_path):
    monkeypatch.setattr(info, "__file__", str(tmp_path / "site-packages/lvrpo/info.py"))
    assert info.commit() is None
