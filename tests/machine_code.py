"""What nvcc makes of the CUDA kernels: registers, local memory and instructions of each.

`python tests/machine_code.py` prints the tables of docs/kernels.md; it compiles for minutes.
"""

from __future__ import annotations

import functools
import itertools
import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from compiled_cuda import SOURCES, compile_all, toolkit

#: Architectures that a build is for by default.
GPUS = ["sm_80", "sm_90a", "sm_100a"]
BYTES = {"double": 8, "float": 4, "c10::Half": 2, "c10::BFloat16": 2}


@dataclass
class Kernel:
    """A kernel as it was compiled: what ptxas says, and its instructions by address."""

    file: str
    name: str
    types: list[str]
    draws: bool  # noise, in fp64
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


def parts(signature: str) -> tuple[str, list[str], bool]:
    """`sums_kernel`, the types among its template's arguments, and whether it draws noise."""
    name = re.search(r"(\w+)(?:<(.*?)>)?\(", signature.replace("(anonymous namespace)", "local"))
    assert name is not None, signature
    arguments = re.split(r", *", name[2] or "")
    return name[1], [x for x in arguments if x in BYTES], "lvrpo::Drawn" in arguments


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
        name, types, draws = parts(found["signature"])
        shared = re.search(r"(\d+) bytes smem", found["rest"])
        yield Kernel(
            *(file, name, types, draws, int(found["registers"]), int(found["stack"])),
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


def width(kernel: Kernel) -> str:
    """The type that a kernel reads, as the tables name it."""
    names = {"double": "fp64", "float": "fp32"}
    reads = names.get(kernel.types[0], "16 bits") if kernel.types else ""
    return f"{reads}, draws" if kernel.draws else reads


def spread(numbers: set[int]) -> str:
    low, high = min(numbers), max(numbers)
    return str(low) if low == high else f"{low} to {high}"


def table() -> Iterator[str]:
    """Registers, and bytes of spills where there are any, of all instances of a kernel together."""
    yield "| kernel | reads | " + " | ".join(GPUS) + " |"
    yield "|---|---|" + "---|" * len(GPUS)
    found: dict[tuple[str, str, str], dict[str, list[Kernel]]] = {}
    for gpu in GPUS:
        for kernel in kernels(gpu):
            if kernel.name != "empty_kernel":
                by_gpu = found.setdefault((*kernel.key, width(kernel)), {})
                by_gpu.setdefault(gpu, []).append(kernel)
    for (file, name, reads), by_gpu in sorted(found.items()):
        cells = [f"`{file}` `{name}`", reads]
        for gpu in GPUS:
            spills = max(kernel.spills for kernel in by_gpu[gpu])
            registers = spread({kernel.registers for kernel in by_gpu[gpu]})
            cells.append(registers + (f", spills {spills} B" if spills else ""))
        yield f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    print(*table(), sep="\n")
