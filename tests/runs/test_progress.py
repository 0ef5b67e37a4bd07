"""What a run shows while it goes on, at the widths that terminals have."""

from __future__ import annotations

import io
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from lvrpo.runs.progress import ProgressView, shown_values

#: Of a default run.
METRICS = {
    "loss/text": 0.00449,
    "loss/image": 0.00112,
    "reward/generate/r_ins": 0.8,
    "strict/understand": 0.574,
    "strict/generate": 0.789,
    "kl/image": 3.2e-5,
    "alarm": [],
}
OWN = {
    "reward/understand/mine/my_rewards.py:brief": -3.25,
    "reward/generate/mine/my_rewards.py:colour": 0.6789,
}


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def row_of(step: int, metrics: dict) -> dict:
    return {"step": step, "phase": "warm_start" if step <= 1000 else "grpo", **metrics}


def view_at(width: int, *, terminal: bool = True) -> tuple[ProgressView, Clock, io.StringIO]:
    out, clock = io.StringIO(), Clock()
    console = Console(file=out, width=width, force_terminal=terminal, color_system=None)
    return ProgressView(1000, 1120, console, clock), clock, out


def shown(view: ProgressView, width: int) -> str:
    """The bar as one sees it."""
    plain = Console(file=io.StringIO(), width=width, color_system=None)
    plain.print(view.bar.get_renderable())
    assert isinstance(plain.file, io.StringIO)
    (line,) = plain.file.getvalue().splitlines()
    return line


@settings(max_examples=60, deadline=None)
@given(
    width=st.sampled_from([60, 72, 80, 100, 120, 200]),
    step=st.integers(1, 1120),
    metrics=st.sampled_from([METRICS, METRICS | OWN, {}, {"loss/text": 1e-9, "alarm": []}]),
    seconds=st.floats(0.01, 500.0),
)
def test_every_width_shows_phase_bar_step_time_and_then_values(width, step, metrics, seconds):
    view, clock, _ = view_at(width)
    phase = "warm_start" if step <= 1000 else "grpo"
    for at in range(max(1, step - 3), step + 1):
        clock.now += seconds
        view.step(row_of(at, metrics))
    line = shown(view, width)
    assert len(line) <= width
    name = {"warm_start": "warm start", "grpo": "lvrpo"}[phase]
    parts = rf"{name} +[━╸╺ ]{{10,24}} {step}/1120 (-:--:--|\d+:\d\d:\d\d)(.*)"
    match = re.fullmatch(parts, line)
    assert match is not None, line
    values = shown_values(metrics)
    if len(values) + match.start(2) + 1 <= width:
        assert match[2].strip() == values
    else:
        assert match[2].rstrip().endswith("…")
        assert values.startswith(match[2].strip()[:-1])


@pytest.mark.parametrize("terminal", [True, False])
def test_the_time_left_is_that_of_the_phase(terminal):
    view, clock, out = view_at(120, terminal=terminal)
    for step in range(1, 1001):
        clock.now += 0.2
        view.step(row_of(step, METRICS))
        if step == 500:
            half = shown(view, 120)
    assert re.search(r" 500/1120 0:01:4[01] ", half)  # rounded up
    for step in range(1001, 1011):
        clock.now += 6.0
        view.step(row_of(step, METRICS))
    # 110 steps of 6 seconds; the faster phase before does not count.
    assert re.search(r" 1010/1120 0:11:0[01] ", shown(view, 120))
    if not terminal:
        line = r"lvrpo 1010/1120  0:04:20 elapsed, 0:11:0[01] left  right answers"
        assert re.search(line, out.getvalue())


def test_without_a_terminal_there_is_a_line_now_and_then_and_the_last():
    view, clock, out = view_at(80, terminal=False)
    for step in range(1, 1001):
        clock.now += 0.5
        view.step(row_of(step, METRICS))
    lines = out.getvalue().splitlines()
    assert 40 <= len(lines) <= 50
    assert lines[-1].startswith("warm start 1000/1120  0:08:20 elapsed, 0:00:00 left  right ans")
    assert all("elapsed" in line and "left" in line for line in lines)


def test_rewards_of_the_users_own_come_first():
    assert shown_values(METRICS | OWN).startswith("brief -3.25  colour 0.679  right answers 0.574")
    both = {f"reward/{task}/mine.py:f": 1.0 for task in ("understand", "generate")}
    assert shown_values(both) == "f (understand) 1  f (generate) 1"


def test_an_evaluation_shows_how_far_it_is():
    view, clock, out = view_at(80, terminal=False)
    view.step(row_of(1120, METRICS))
    for done in range(256, 4097, 256):
        clock.now += 3
        view.evaluation("after", done, 4096)
        if done == 2048:
            assert re.search(r"evaluating +[━╸╺ ]+ 2048/4096 0:00:24 after", shown(view, 80))
    assert "evaluating 4096/4096  0:00:48 elapsed, 0:00:00 left  after" in out.getvalue()


def test_brackets_are_text():
    view, _, out = view_at(80, terminal=False)
    view.message("reward [bold]x[/bold] [0, 1]")
    assert out.getvalue() == "reward [bold]x[/bold] [0, 1]\n"


def test_an_alarm_is_said_once():
    """A service that is down for a hundred steps is one line, not a hundred."""
    view, _, out = view_at(100, terminal=False)
    for step in range(1, 6):
        alarms = ["a reward failed"] + ["all is equal"] * (step == 3)
        view.step(row_of(step, {"alarm": alarms}))
    said = [line for line in out.getvalue().splitlines() if line.startswith("step ")]
    assert said == ["step 1: a reward failed", "step 3: all is equal"]
