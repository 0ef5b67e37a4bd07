"""The emulation catches faults: kernels with a planted one each, and the same without it."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from emulated_cuda import SANITIZED, compiler

FOLDER = Path(__file__).parent
RACE, OVERRUN, WRONG = "data race", "heap-buffer-overflow", "a wrong result"
NEVER_COME, APART = "for others that never come", "wait in different places"
#: By planted fault, what must be said of it, and under which sanitizer.
CAUGHT = {
    "missing_barrier": {"thread": RACE},
    "race_on_shared_memory": {"thread": RACE},
    "race_on_global_memory": {"thread": RACE},
    "read_beyond_global_memory": {"address": OVERRUN},
    "write_beyond_global_memory": {"address": OVERRUN},
    "read_beyond_shared_memory": {"address": OVERRUN},
    "write_beyond_shared_memory": {"address": OVERRUN},
    "unwritten_shared_memory": {"address": WRONG, "thread": WRONG},
    "misaligned_pack": {"address": "misaligned address"},
    "divergent_barrier": {"address": NEVER_COME, "thread": NEVER_COME},
    "barriers_in_two_branches": {"address": APART, "thread": APART},
    "divergent_shuffle": {"address": APART, "thread": APART},
    "lanes_that_have_returned": {"address": NEVER_COME, "thread": NEVER_COME},
    "neighbour_before_a_barrier": {"thread": RACE},
    "neighbour_that_has_ended": {"thread": RACE},
}


def build(sanitizer: str, program: Path) -> None:
    flags = ("-x", "c++", "-std=c++20", "-DLVRPO_EMULATE", "-Wall", "-Werror", f"-I{FOLDER}")
    command = [*compiler(), *SANITIZED[sanitizer], *flags, FOLDER / "planted.cu", "-o", program]
    done = subprocess.run(command, capture_output=True, text=True)
    if "cannot find" in done.stderr:
        pytest.skip(f"the compiler has no -fsanitize={sanitizer}")
    assert done.returncode == 0, done.stderr


def verdict(program: Path, *arguments: str) -> str:
    """What is said of a kernel: nothing, a report that names it, or that its result is wrong."""
    kept = {k: v for k, v in os.environ.items() if not k.endswith("_OPTIONS")}
    done = subprocess.run([program, *arguments], capture_output=True, text=True, env=kept)
    if "unexpected memory mapping" in done.stderr:
        pytest.skip("ThreadSanitizer does not run here: vm.mmap_rnd_bits is too large for it")
    assert bool(done.returncode) >= bool(done.stderr), done.stderr
    return done.stderr or (WRONG if done.returncode == 1 else "")


@pytest.mark.parametrize("sanitizer", ["address", "thread"])
def test_every_planted_fault_is_caught_and_none_is_seen_where_there_is_none(sanitizer, tmp_path):
    program = tmp_path / "planted"
    build(sanitizer, program)
    names = subprocess.run([program], capture_output=True, text=True, check=True).stdout.split()
    assert set(names) == set(CAUGHT)
    assert {name: verdict(program, name, "right") for name in names} == dict.fromkeys(names, "")
    for name, by_sanitizer in CAUGHT.items():
        if sanitizer in by_sanitizer:
            said = verdict(program, name, "wrong")
            assert by_sanitizer[sanitizer] in said, (name, said)
            # The report says where: in this file.
            assert said == WRONG or "planted.cu:" in said, (name, said)
