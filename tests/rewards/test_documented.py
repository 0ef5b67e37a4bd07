"""The tables of docs/rewards.md are what their programs print."""

from __future__ import annotations

import ast

import pytest
from documented import Page

PAGE = Page("rewards.md")


def test_the_readers_of_digits(capsys):
    lines = PAGE.printed("reader_accuracy(reader)", capsys)
    for line, (_, _, *documented) in zip(lines, PAGE.rows("| | fitted on")[2:], strict=True):
        found = [float(number) for number in line.split()[1:]]
        assert found == pytest.approx([float(number) for number in documented], abs=0.01)


@pytest.mark.slow
def test_what_r_sem_notices(capsys):
    lines = PAGE.printed("noticed", capsys)
    header, _, *table = PAGE.rows("| implied | form |")
    for line, (implied, form, *documented) in zip(lines, table, strict=True):
        words, _, found = line.partition(" {")
        dense = form.startswith("dense")
        assert words.split()[0] == form.split(",")[0]
        assert words.split()[2] == {"yes": "True", "no": "False"}[implied]
        assert not dense or words.split()[1] == form.split(", ")[1]
        shares = ast.literal_eval("{" + found)
        assert set(shares) == set(header[2:])
        most = 2 if dense and implied == "yes" else 25
        wanted = {name: float(share) for name, share in zip(header[2:], documented, strict=True)}
        assert shares == pytest.approx(wanted, abs=most)
    assert min(map(float, table[0][2:])) >= 99
