"""The benchmarks measure what they say: gate, clock, memory, and the files they write."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import plot
import pytest
import torch
from harness import measure, results
from harness.providers import Case, Peer
from peers import loss_heads

from lvrpo import info

ROOT = Path(__file__).parents[1]
ROWS, VOCAB = 16, 301


def make_case(dtype=torch.float32, **changes):
    logits = (torch.randn(ROWS, VOCAB) * 3).to(dtype)
    token_ids = torch.randint(0, VOCAB, (ROWS,))
    fields = {
        "op": "gather_logprobs",
        "inputs": {"logits": logits, "token_ids": token_ids, "return_entropy": True},
        "differentiable": ("logits",),
        "plain": loss_heads.plain_gather_logprobs,
        "scales": {"out0": 20.0, "out1": 20.0, "dlogits": 20.0 / ROWS},
    }
    return Case(**fields | changes)


def test_gate_knows_right_from_wrong():
    gate = measure.Gate(make_case(), "forward+backward")

    def biased(**inputs):
        logprobs, entropy = loss_heads.plain_gather_logprobs(**inputs)
        return logprobs, entropy + 1e-3

    def without_gradient_of_entropy(**inputs):
        logprobs, entropy = loss_heads.plain_gather_logprobs(**inputs)
        return logprobs, entropy.detach()

    assert gate.grade(loss_heads.plain_gather_logprobs) == ("float32", "")
    for wrong, named in ((biased, "out1"), (without_gradient_of_entropy, "dlogits")):
        precision, sentence = gate.grade(wrong)
        assert precision is None
        assert sentence.startswith(f"{named}: worst element")


def test_gate_tells_narrow_arithmetic_from_wide():
    case = make_case(torch.bfloat16)
    gate = measure.Gate(case, "forward+backward")

    def wide(logits, **inputs):
        return loss_heads.plain_gather_logprobs(logits.float(), **inputs)

    assert gate.grade(wide) == ("float32", "")
    assert gate.grade(loss_heads.plain_gather_logprobs) == ("bfloat16", "")
    assert gate.grade(case.bind("torch")) == ("bfloat16", "")
    assert gate.grade(lambda **inputs: tuple(x * 1.05 for x in wide(**inputs)))[0] is None


def test_every_round_starts_with_another_function():
    order = []
    functions = {name: lambda name=name: order.append(name) for name in "abc"}
    race = measure.Race(functions, seconds=0.0)
    order.clear()
    for _ in range(4):
        race.round()
    assert "".join(order) == "abcbcacababc"
    assert all(len(times.wall) == 4 for times in race.times.values())


def test_each_function_is_timed_on_its_own():
    race = measure.Race({"quick": lambda: None, "slow": lambda: time.sleep(0.01)}, seconds=0.0)
    for _ in range(race.rounds):
        race.round()
    quick, slow = (race.times[name].facts() for name in ("quick", "slow"))
    assert quick["wall_ms"] < 5
    assert slow["wall_ms"] >= 10
    for facts in (quick, slow):
        assert facts["device_ms"] is facts["host_ms"] is None
        assert facts["min_ms"] <= facts["quartile_low_ms"] <= facts["quartile_high_ms"]


@pytest.mark.parametrize("direction", ["forward", "forward+backward"])
def test_all_providers_of_a_round_take_the_same_turn(direction):
    rows = (3, 5, 7, 4, 6)
    turns = [
        {"logits": torch.randn(n, VOCAB), "token_ids": torch.randint(0, VOCAB, (n,))} for n in rows
    ]
    case = make_case(inputs=turns[0], turns=turns)
    met = {"a": [], "b": []}

    def provider(name):
        def run(**inputs):
            met[name].append(len(inputs["logits"]))
            return loss_heads.plain_gather_logprobs(**inputs)

        return measure.step(run, case, direction)

    race = measure.Race({name: provider(name) for name in met}, seconds=0.0)
    assert met["a"] == list(rows[: race.WARM_UP])  # and none before the clock
    for _ in range(2):
        race.round()
    assert met["a"] == met["b"] == list(rows)


KNOWN_CASES = """
import sys, torch
sys.path[:0] = {path}
from harness import measure
count = {mebibytes} * 2**20 // 4

def two_and_a_half():
    first = torch.ones(count)
    second = first + 1
    kept = torch.zeros(count // 2)
    kept.add_(1)
    del first  # so that what comes next needs no more
    return second, kept, torch.ones(count)

def outside_of_torch():
    return bytearray(5 * {mebibytes} * 2**19)

for function in (two_and_a_half, outside_of_torch, lambda: None):
    function()
    # Other pages of the process may become resident meanwhile, which only adds.
    print(min(measure.peak_bytes(function) for _ in range(5)))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="peak_bytes reads Linux's /proc")
@pytest.mark.parametrize("mebibytes", [8, 64])
def test_peak_memory_of_a_known_case(mebibytes):
    # In a process of its own: what other tests have left in malloc's heap is taken first.
    code = KNOWN_CASES.format(path=sys.path, mebibytes=mebibytes)
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert printed.returncode == 0, printed.stderr
    expected = [2.5 * mebibytes * 2**20] * 2 + [0]
    for measured, known in zip(map(int, printed.stdout.split()), expected, strict=True):
        assert abs(measured - known) < 2**20


def test_a_peer_that_is_not_installed_says_so():
    case = make_case(peers={"there": Peer(lambda: None), "absent": Peer(lambda: None, "no-such")})
    providers = case.providers("full")
    assert next(iter(providers)) == "torch"
    assert providers["there"] == ""
    assert providers["absent"] == "no-such is not installed"
    assert case.version("absent") is None
    assert "torch.compile" in providers
    assert "torch.compile" not in case.providers("small")
    assert "torch.compile" not in make_case(compile_plain=False).providers("full")


def make_row(**changes):
    names = ("op", "direction", "shape", "dtype", "provider")
    row = dict.fromkeys(results.FIELDS) | dict.fromkeys(names, "x") | {"correct": True}
    times = ("wall_ms", "quartile_low_ms", "quartile_high_ms", "min_ms")
    return row | dict.fromkeys(times, 2.0) | {"precision": "float32"} | changes


NOTHING = dict.fromkeys(("wall_ms", "quartile_low_ms", "quartile_high_ms"))


def test_the_table_is_loud_about_what_is_missing():
    lines = results.table(
        [
            make_row(provider="torch", wall_ms=4.0),
            make_row(provider="cpp", peak_bytes=2**20, fraction_of_ceiling=0.5),
            make_row(provider="sloppy", correct=False, why_no_number="outside the rule: off by 1"),
            make_row(provider="narrow", precision="bfloat16"),
            make_row(provider="gone", why_no_number="gone is not installed", **NOTHING),
            make_row(provider="cpp", shape="y", why_no_number="no kernel", **NOTHING),
        ]
    )
    text = "\n".join(lines)
    assert lines[1] == "x x x x"
    assert "2.000 ms [2.000, 2.000]            2.00x      1.0 MiB   50%" in text
    assert "NOT CORRECT: outside the rule: off by 1" in text
    assert "as precise as plain bfloat16" in text
    assert "cpp            NO NUMBER: no kernel" in text
    assert lines[-1] == "NO NUMBER for gone: gone is not installed"


def test_the_table_has_rates_where_there_are_flops():
    forward = make_row(direction="forward", flops=6 * 10**9, first_call_ms=4000.0)
    both = {"direction": "forward+backward", "flops": 21 * 10**9}
    lines = results.table(
        [
            forward,
            make_row(**both, wall_ms=8.0, device_ms=7.0, host_ms=0.25),
            make_row(**both, wall_ms=8.0, provider="no forward"),
        ]
    )
    assert "3 TFLOP/s" in lines[2]
    assert "first call 4.0 s" in lines[2]
    assert "3 TFLOP/s" in lines[5]
    assert "host 0.250 ms" in lines[5]
    assert "backward 5.000 ms, 3 TFLOP/s" in lines[5]
    assert "backward" not in lines[6]


def test_results_are_refused_for_a_checkout_with_changes(monkeypatch):
    for commit, reason in ((None, "no commit"), ("abc-dirty", "uncommitted"), ("abc", "")):
        monkeypatch.setattr(info, "commit", lambda commit=commit: commit)
        assert reason in results.why_not_publishable()
        assert bool(reason) == bool(results.why_not_publishable())


def test_results_of_one_commit_share_a_file(tmp_path):
    head = {"device": "AMD EPYC (TM)", "commit": "0123456789abcdef"}
    first = results.write(tmp_path, head, [make_row(provider="a"), make_row(provider="b")])
    again = results.write(tmp_path, head, [make_row(provider="b", wall_ms=1.0)])
    assert first == again
    assert first.parent.name == "amd-epyc-tm"
    assert first.stem.endswith("-0123456789ab")
    rows = json.loads(first.read_text(encoding="utf-8"))["rows"]
    assert [(row["provider"], row["wall_ms"]) for row in rows] == [("a", 2.0), ("b", 1.0)]


def test_the_script_for_a_gpu_says_that_there_is_none(tmp_path):
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "PYTHON": sys.executable}
    command = [str(ROOT / "benchmarks/gpu.sh"), "--out", str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith("No GPU: torch sees no CUDA device.")
    asked = subprocess.run([command[0], "--help"], capture_output=True, text=True)
    assert asked.returncode == 2
    assert "--wheels DIR" in asked.stderr


def test_a_run_writes_rows_under_a_header(tmp_path):
    file = tmp_path / "results.json"
    command = [sys.executable, "-m", "pytest", "benchmarks/bench_loss_head.py", "-q"]
    command += ["--benchmark-only", "-k", "advantages", f"--benchmark-json={file}"]
    # Not as a worker of the session that this test is in, where benchmarks are off.
    alone = {k: x for k, x in os.environ.items() if not k.startswith("PYTEST_XDIST")}
    done = subprocess.run(command, cwd=ROOT, env=alone, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    content = json.loads(file.read_text(encoding="utf-8"))
    fields = ("device", "driver", "torch", "triton", "python", "commit", "dirty", "ceilings")
    assert set(fields) <= content["header"].keys()
    rows = {row["provider"]: row for row in content["rows"]}
    assert {"torch", "loops"} <= rows.keys()
    assert rows["loops"]["wall_ms"] > rows["torch"]["wall_ms"] > 0
    assert rows["loops"]["correct"] is True
    assert rows["loops"]["result_bytes"] == 48 * 8 * 4
    assert 0 < rows["loops"]["fraction_of_ceiling"] < 1
    assert all(set(results.FIELDS) <= row.keys() for row in rows.values())
    assert "loops" in done.stdout
    table = plot.markdown(content)
    for provider in ("torch", "loops"):
        assert f"| normalize_advantages forward 48 groups of 8, K=3 float32 | {provider} " in table
