"""The table of docs/data.md is what its program prints."""

from __future__ import annotations

import pytest
from documented import Page


def test_what_survives_the_latents(capsys):
    page = Page("data.md")
    _, _, *table = page.rows("| numbers per cell |")
    lines = page.printed("LinearAutoencoder.fit", capsys)
    for line, (dim, *pairs) in zip(lines, table, strict=True):
        found = [float(number) for number in line.split()]
        documented = [float(share) for pair in pairs for share in pair.split("/")]
        assert found[0] == float(dim.split()[0])
        assert found[1:] == pytest.approx(documented, abs=0.01)
