"""One finished tiny run, made by the real command, for all who only look at it."""

from __future__ import annotations

from pathlib import Path

import pytest
from runs.tiny import command


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Read only: copy it to change it."""
    directory = tmp_path_factory.mktemp("trained") / "run"
    result = command("train", directory, tiny=True)
    assert result.exit_code == 0, result.output
    assert result.stdout == f"report: {directory / 'report.html'}\n"
    return directory
