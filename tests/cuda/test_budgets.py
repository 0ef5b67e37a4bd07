"""What nvcc makes of the CUDA kernels: registers, local memory, width of loads, exponentials.

docs/kernels.md says what follows from these facts. They are of the machine code, not of a run.
"""

from __future__ import annotations

import functools
import itertools
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from compiled_cuda import SOURCES, compile_all, toolkit

#: Registers of a thread. 64 leave an SM four blocks of 256 threads, whose 64 bytes in flight each
#: hide the latency of its memory; 128 leave two: enough for what reads little, or waits for fp64.
HOT, OTHERS = 64, 128
#: A gradient has as many bytes on their way out as in: three blocks do.
REGISTERS = {("gather_logprobs", "dlogits_kernel"): 80}
#: By kernel that reads or writes as much as the op does: the exponentials that its loop has for an
#: element of the packs in flight. A softmax needs one. Another moves the reference of a thread's
#: sums; in dlogits_kernel a pack at an edge has code of its own.
EXPONENTIALS = {
    ("gather_logprobs", "sums_kernel"): 1 + 1 / 16,
    ("gather_logprobs", "dlogits_kernel"): 1 + 5 / 8,
    ("flow_step", "step_kernel"): 0,
    ("flow_step", "gradient_kernel"): 0,
    ("flow_policy_loss", "sums_kernel"): 0,
    ("flow_policy_loss", "gradient_kernel"): 0,
}
#: Bytes of local memory that a thread has, and that it moves in all its code. Only numbers that are
#: kept for later, of a group between two phases.
LOCAL = {
    ("normalize_advantages", "advantages_kernel", "float"): (16, 32),
    ("normalize_advantages", "advantages_kernel", "c10::Half"): (16, 32),
    ("normalize_advantages", "advantages_kernel", "c10::BFloat16"): (16, 32),
}
#: Packs of 16 bytes that a thread has in flight.
IN_FLIGHT = 4
BYTES = {"double": 8, "float": 4, "c10::Half": 2, "c10::BFloat16": 2}


@dataclass
class Kernel:
    """A kernel as it was compiled: what ptxas says, and its instructions by address."""

    file: str
    name: str
    types: list[str]
    registers: int
    stack: int
    spills: int
    shared: int
    code: list[tuple[int, str]] = field(repr=False)

    @property
    def key(self) -> tuple[str, str]:
        return self.file, self.name

    def hot_loop(self) -> list[str]:
        """The smallest loop with the most loads of 16 bytes, or all of the code."""
        bodies = [[text for _, text in self.code]]
        for address, text in self.code:
            jump = re.search(r"BRA(?:\.U)? (?:!?U?P\d, )?0x([0-9a-f]+)", text)
            if jump and int(jump[1], 16) < address:
                bodies.append([x for at, x in self.code if int(jump[1], 16) <= at <= address])
        most = max(wide_loads(body) for body in bodies[1:] or bodies)
        return min((x for x in bodies if wide_loads(x) >= most), key=len)


def wide_loads(body: list[str]) -> int:
    return sum("LDG.E.128" in text or "LDG.E.ENL2.256" in text for text in body)


def disassembler() -> str | None:
    """cuobjdump of the toolkit, or the one that Triton brings."""
    beside = toolkit().home / "bin/cuobjdump"
    if beside.exists():
        return str(beside)
    triton = pytest.importorskip("triton")
    brought = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    return str(brought) if brought.exists() else None


def demangled(text: str) -> str:
    done = subprocess.run(["c++filt"], input=text, capture_output=True, text=True, check=True)
    return done.stdout


def parts(signature: str) -> tuple[str, list[str]]:
    """`sums_kernel` and the types among its template's arguments."""
    name = re.search(r"(\w+)(?:<(.*?)>)?\(", signature.replace("(anonymous namespace)", "local"))
    assert name is not None, signature
    return name[1], [x for x in re.split(r", *", name[2] or "") if x in BYTES]


def code_by_signature(object_file: Path) -> dict[str, list[tuple[int, str]]]:
    command = [disassembler(), "-sass", object_file]
    sass = demangled(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    code: dict[str, list[tuple[int, str]]] = {}
    for block in re.split(r"^\s*Function : ", sass, flags=re.MULTILINE)[1:]:
        instructions = re.findall(r"/\*([0-9a-f]{4,})\*/\s+([^;]*);", block)
        code[block.partition("\n")[0]] = [(int(at, 16), text) for at, text in instructions]
    return code


def read(file: str, log: str, code: dict[str, list[tuple[int, str]]]) -> Iterator[Kernel]:
    entry = re.compile(
        r"Compiling entry function '(?P<signature>.+?)' for '\w+'.*?"
        r"(?P<stack>\d+) bytes stack frame, "
        r"(?P<stored>\d+) bytes spill stores, (?P<loaded>\d+) bytes spill loads.*?"
        r"Used (?P<registers>\d+) registers(?P<rest>[^\n]*)",
        re.DOTALL,
    )
    for found in entry.finditer(demangled(log)):
        name, types = parts(found["signature"])
        shared = re.search(r"(\d+) bytes smem", found["rest"])
        yield Kernel(
            *(file, name, types, int(found["registers"]), int(found["stack"])),
            spills=int(found["stored"]) + int(found["loaded"]),
            shared=int(shared[1]) if shared else 0,
            code=code[found["signature"]],
        )


@functools.cache
def kernels(gpu: str) -> list[Kernel]:
    option = f"-gencode=arch={gpu.replace('sm', 'compute')},code={gpu}"
    compiled = compile_all([option])
    of_files = (
        read(source.stem, built.log, code_by_signature(built.object))
        for source, built in zip(SOURCES, compiled, strict=True)
    )
    return list(itertools.chain.from_iterable(of_files))


#: Minutes of nvcc for each, which `make test-slow` takes but CI does not.
OTHER = [
    pytest.mark.slow,
    pytest.mark.skipif("CI" in os.environ, reason="CI compiles for one architecture"),
]
GPUS = ["sm_90a", pytest.param("sm_80", marks=OTHER), pytest.param("sm_100a", marks=OTHER)]
pytestmark = [
    pytest.mark.skipif(toolkit() is None, reason="nvcc is not found"),
    pytest.mark.skipif(shutil.which("c++filt") is None, reason="there is no c++filt"),
    pytest.mark.parametrize("gpu", GPUS),
]


def test_no_kernel_spills_and_registers_leave_room_for_other_blocks(gpu):
    for kernel in kernels(gpu):
        is_hot = kernel.key in EXPONENTIALS and "double" not in kernel.types
        stack, spills = LOCAL.get((*kernel.key, *kernel.types), (0, 0))
        assert kernel.stack <= stack, kernel
        assert kernel.spills <= spills, kernel
        most = REGISTERS.get(kernel.key, HOT) if is_hot else OTHERS
        assert kernel.registers <= most, kernel
        # All of it is dynamic: the emulation checks its bounds.
        assert kernel.shared == 0, kernel


def test_hot_loops_load_16_bytes_at_a_time_and_take_one_exponential(gpu):
    seen = set()
    for kernel in kernels(gpu):
        if kernel.key not in EXPONENTIALS:
            continue
        seen.add(kernel.key)
        body = kernel.hot_loop()
        assert wide_loads(body) >= 2, kernel.key
        if (*kernel.key, *kernel.types) not in LOCAL:
            assert not [text for text in body if "LDL" in text or "STL" in text], kernel.key
        # fp64 has no such instruction; a gradient of another type than its logits is not hot.
        is_mixed = len(kernel.types) == 3 and kernel.types[0] != kernel.types[1]
        if kernel.types[0] != "double" and not is_mixed:
            elements = IN_FLIGHT * 16 / BYTES[kernel.types[0]]
            taken = sum("MUFU.EX2" in text for text in body) / elements
            assert taken <= EXPONENTIALS[kernel.key], (kernel.key, kernel.types, taken)
    assert seen == set(EXPONENTIALS)
