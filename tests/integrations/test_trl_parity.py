"""Over the grid of TRL's options lvrpo has TRL's loss, gradient and metrics, or refuses by name."""

from __future__ import annotations

import dataclasses
import random

import pytest

pytest.importorskip("trl", reason="pip install 'lvrpo[trl]'")

from documented import Page

from lvrpo.integrations import parity
from lvrpo.params.policy_loss import LossParams

SAMPLE = 150


def chosen(count: int) -> list[dict]:
    every = parity.grid()
    return random.Random(1).sample(every, count)


def test_a_sample_of_the_grid():
    outcomes = parity.run(chosen(SAMPLE))
    assert [outcome for outcome in outcomes if not (outcome.refused or outcome.agrees)] == []
    counts = parity.counts(outcomes)
    assert counts["honoured"] + counts["refused"] == SAMPLE
    assert all(" is " in reason for reason in parity.reasons(outcomes))


@pytest.mark.slow
def test_the_whole_grid():
    printed = parity.table(parity.run(parity.grid()))
    documented = Page("integrations.md").rows("| loss_type | level |")
    counted = [[cell.strip() for cell in line.split("|")[1:7]] for line in printed.splitlines()]
    # Errors are of a machine; what is honoured, refused and wrong is not.
    assert [row[:6] for row in documented] == [row for row in counted if len(row) == 6]
    assert "0 wrong" in printed


def test_another_loss_is_seen(monkeypatch):
    real = LossParams.from_trl

    def other(config):
        return dataclasses.replace(real(config), clip_low=0.1, log_ratio_limit=0.1)

    monkeypatch.setattr(LossParams, "from_trl", other)
    options = {name: value for axis in parity.AXES.values() for name, value in axis[0].items()}
    assert parity.counts(parity.run([options] * 3))["wrong"] > 0


def test_the_command_prints_the_table(capsys):
    assert parity.main(["--sample", "16"]) == 0
    printed = capsys.readouterr().out
    assert "0 wrong. TRL 1.16" in printed
    assert printed.startswith("| loss_type | level |")
