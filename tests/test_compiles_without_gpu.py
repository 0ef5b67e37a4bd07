"""Every Triton kernel compiles for every architecture, fits, without spills, and compiles once.

No GPU is needed: the launchers run on tensors of the meta device, whose launches are recorded, and
Triton's compiler and ptxas do the rest.
"""

from __future__ import annotations

import dataclasses
import importlib
import itertools
import json
import re
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton", reason="triton is not installed")
if triton.knobs.runtime.interpret:
    pytest.skip("TRITON_INTERPRET=1 replaces the compiler", allow_module_level=True)

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource, make_backend  # noqa: E402
from triton.runtime.jit import compute_cache_key, create_function_from_signature  # noqa: E402

from lvrpo.kernels import _launch  # noqa: E402
from lvrpo.params.policy_loss import LossParams  # noqa: E402

ROOT = Path(__file__).parents[1]
OPS = sorted(path.stem for path in (ROOT / "kernels").glob("[a-z]*.py"))
#: By compute capability, the KiB of shared memory that a program may have.
ARCHITECTURES = {80: 163, 86: 99, 90: 227, 100: 227}
CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
#: Bytes of local memory per thread a kernel may use, beyond which registers have spilled.
SPILL_BUDGET: dict[str, int] = {
    # ptxas gives up one fp64 to fit another program on an SM, at every tile size that was tried.
    # Half the tile would spill nothing, and do half the work for every byte it reads.
    "_forward_kernel": 64,
    "dq_kernel": 64,
    "dkv_kernel": 80,
    "_measure_kernel": 8,
    "_write_kernel": 8,
    # On 9.0 alone, for GPG: it also counts the samples that any reward scored.
    "_batch_kernel": 8,
    # On 8.6 alone, where more programs fit on an SM.
    "_dlogits_kernel": 8,
    # An fp64 factor or a pointer, of loops whose registers are full.
    "_terms_kernel": 8,
    # In fp64 on 8.0; of rows that are no multiple of 16 on 10.0: ptxas fits another program.
    "_sums_kernel": 8,
    "_row_kernel": 8,
    # With noise that it draws, in fp64: ptxas fits another program.
    "_gradient_kernel": 8,
    # One program, once a call: sums that wait for its last stores. Every tile that was tried spills
    # somewhere, and more of them would be read by fewer threads.
    "_reduce_kernel": 48,
}
#: The same of kernels whose products are in fp32, for which there are no tensor cores: each product
#: takes the registers of a tile more.
SPILL_BUDGET_IN_FP32 = SPILL_BUDGET | {"_forward_kernel": 152}
#: The same under a sliding window, whose ends are kept through both loops: on 10.0; 48 on 9.0.
SPILL_BUDGET_IN_A_WINDOW = SPILL_BUDGET | {"dkv_kernel": 216}

#: What launchers allocate, or the fused ops: never a slice.
OWN = {
    *("max_ptr", "log_sum_ptr", "logprobs_ptr", "squares_ptr", "order_ptr", "first_ptr"),
    *("counts_ptr", "sums_ptr", "partial_ptr", "dlogp_ptr", "loss_ptr", "statistics_ptr"),
    *("values_ptr", "per_reward_ptr", "spread_ptr", "measured_ptr", "means_ptr", "stats_ptr"),
    *("all_zero_ptr", "gradient_ptr", "scaled_ptr", "parts_ptr", "out_ptr", "dno_text_ptr"),
    *("dno_image_ptr", "x_next_ptr", "logprob_ptr", "dvelocity_ptr", "dx_t_ptr"),
    *("extremes_ptr", "directions_ptr"),
}
#: What kernels read 16 bytes at a time where that can be: another alignment is another kernel.
LATENTS = {
    *("velocity_ptr", "without_text_ptr", "without_image_ptr", "dout_ptr"),
    *("x_t_ptr", "noise_ptr", "dx_next_ptr", "velocity_old_ptr", "velocity_ref_ptr"),
}

#: Registers of a thread of the kernels that pass over latents: of 96 an SM has room for five
#: programs of 128 threads, each of which waits for 16 elements of every array at once; of 128, for
#: what has the sums of rows by element, four, of which each waits for 8.
LATENT_REGISTERS = {"_row_kernel": 128}
OTHER_LATENT_REGISTERS = 96


def specialise(launch: _launch.Launch, architecture: int):
    """What Triton's runtime would compile for this launch, and the key it would cache it under."""
    kernel = launch.kernel
    backend = make_backend(GPUTarget("cuda", architecture, 32))
    binder = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialization, options = binder(**launch.arguments)
    key = compute_cache_key({}, specialization, options)
    options, signature, constexprs, attributes = kernel._pack_args(
        backend, dict(launch.arguments), bound, specialization, options
    )
    return key, ASTSource(kernel, signature, constexprs, attributes), options


def kernels_of(op: str) -> set[str]:
    kernels = importlib.import_module(f"lvrpo.kernels.{op}")
    return {name for name in vars(kernels) if name.endswith("_kernel")}


def launches_of(op: str, group: str, architecture: int = 90) -> list[_launch.Launch]:
    """Of its own kernels: a launcher may run those of another op too."""
    calls = importlib.import_module(f"launches.{op}")
    with _launch.record(architecture) as launches:
        result = getattr(calls, group)()
        if result is not None:
            list(result)
    return [launch for launch in launches if launch.kernel.__name__ in kernels_of(op)]


def resources(cubin: bytes) -> dict[str, int]:
    """Of a kernel, by cuobjdump's names: registers of a thread, bytes of its stack, and so on."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [CUOBJDUMP, "--dump-resource-usage", file.name]
        printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {name: int(number) for name, number in re.findall(r"\b(\w+):(\d+)", printed)}


def local_bytes(cubin: bytes) -> int:
    found = resources(cubin)
    return found["STACK"] + found["LOCAL"]


@pytest.mark.parametrize("op", OPS)
def test_every_kernel_is_launched_by_the_cases(op):
    jitted = kernels_of(op)
    assert jitted
    assert {launch.kernel.__name__ for launch in launches_of(op, "every_form")} == jitted


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("op", OPS)
def test_compiles_and_fits(op, architecture):
    variants = {}
    for launch in launches_of(op, "every_form", architecture):
        key, source, options = specialise(launch, architecture)
        variants[launch.kernel.__name__, key] = source, options
    beyond = []
    for (name, _), (source, options) in variants.items():
        target = GPUTarget("cuda", architecture, 32)
        compiled = triton.compile(source, target=target, options=options.__dict__)
        used = local_bytes(compiled.asm["cubin"])
        if used > spill_budget(source.signature).get(name, 0):
            beyond.append(f"{name}: spills {used} bytes for {json.dumps(source.signature)}")
        shared = compiled.metadata.shared / 1024
        if shared > ARCHITECTURES[architecture]:
            beyond.append(f"{name}: {shared} KiB shared for {json.dumps(source.signature)}")
    assert not beyond, "\n".join(beyond)


def spill_budget(signature: dict[str, str]) -> dict[str, int]:
    if signature.get("q_ptr") == "*fp32":
        return SPILL_BUDGET_IN_FP32
    in_a_window = signature.get("key_rows_ptr", "constexpr") != "constexpr"
    return SPILL_BUDGET_IN_A_WINDOW if in_a_window else SPILL_BUDGET


@pytest.mark.parametrize("op", OPS)
def test_a_training_run_compiles_once(op):
    """A kernel that takes an input or leaves it out is two."""
    keys: dict[tuple[str, ...], set[str]] = {}
    for launch in launches_of(op, "one_training_run"):
        absent = (name for name, value in launch.arguments.items() if value is None)
        form = launch.kernel.__name__, *absent
        keys.setdefault(form, set()).add(specialise(launch, 90)[0])
    several = {form: len(found) for form, found in keys.items() if len(found) > 1}
    assert not several, "these would compile again and again"
    assert keys


#: Whole numbers of every width, on both sides of its bounds.
INTEGERS = (0, 1, 2, -1, 15, 16, 48, 2**31 - 1, 2**31, 2**31 + 1, -(2**31), -(2**31) - 1, 2**40)
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.bool)


def others_like(value: object, pool: torch.Tensor) -> Iterator[object]:
    """What else a launch might have in the place of an argument that no kernel is written for."""
    if isinstance(value, torch.Tensor):
        yield None
        for dtype, begin in itertools.product(DTYPES, (0, 1, 8)):
            yield pool.view(dtype)[begin:]
    elif type(value) is int:
        yield from INTEGERS
    elif type(value) is float:
        yield from (0.0, 1.0, 16.0, -3.5, float("inf"))


def varied(launch: _launch.Launch, pool: torch.Tensor) -> Iterator[_launch.Launch]:
    """The launch with another value for one argument, every one in turn."""
    for parameter in launch.kernel.params:
        if not parameter.is_constexpr:
            for value in others_like(launch.arguments[parameter.name], pool):
                arguments = {**launch.arguments, parameter.name: value}
                yield dataclasses.replace(launch, arguments=arguments)


@pytest.mark.parametrize("op", OPS)
def test_launches_of_one_key_run_one_kernel(op):
    """That which Triton would look up itself, wherever in memory tensors are and whatever holds."""
    pool = torch.zeros(256, dtype=torch.uint8)
    launches = launches_of(op, "every_form") + launches_of(op, "one_training_run")
    forms = {}
    for launch in launches:
        absent = [name for name, value in launch.arguments.items() if value is None]
        forms[(launch.kernel.__name__, *absent)] = launch
    launches += [other for launch in forms.values() for other in varied(launch, pool)]
    found: dict[tuple[object, ...], str] = {}
    for launch in launches:
        key = _launch.compiled_of(launch.kernel).key_of(launch.arguments)
        expected = specialise(launch, 90)[0]
        assert found.setdefault((launch.kernel.__name__, *key), expected) == expected
    assert len(forms) < len(found) < len(launches)


@pytest.mark.slow
@pytest.mark.parametrize("op", ["gather_logprobs", "logits_grpo_loss"])
def test_a_row_of_any_vocabulary_is_summed_16_bytes_at_a_time(op):
    calls = importlib.import_module(f"launches.{op}")
    for vocab in (151_936, 151_674, 50_257):
        with _launch.record() as launches:
            if op == "gather_logprobs":
                calls.call(64, vocab, torch.bfloat16)
            else:
                calls.call(64, LossParams(), vocab=vocab)
        launch = next(x for x in launches if x.kernel.__name__.startswith("_row_"))
        _, source, options = specialise(launch, 90)
        target = GPUTarget("cuda", 90, 32)
        ptx = triton.compile(source, target=target, options=options.__dict__).asm["ptx"]
        assert re.search(r"ld\.global\S*\.v4\.b32", ptx), vocab


@pytest.mark.slow
@pytest.mark.parametrize("architecture", [80, 90])
@pytest.mark.parametrize("op", ["flow_policy_loss", "flow_step", "guided_velocity"])
def test_latents_are_read_16_bytes_at_a_time_by_many_threads(op, architecture):
    variants = {}
    for launch in launches_of(op, "every_form", architecture):
        read = [x for name, x in launch.arguments.items() if name in LATENTS and x is not None]
        if read and read[0].shape[-1] % 16 == 0:
            key, source, options = specialise(launch, architecture)
            variants[key] = launch.kernel.__name__, read, source, options
    assert variants
    for name, read, source, options in variants.values():
        target = GPUTarget("cuda", architecture, 32)
        compiled = triton.compile(source, target=target, options=options.__dict__)
        wide = re.findall(r"ld\.global\S*\.v(?:4\.b32|2\.b64)", compiled.asm["ptx"])
        assert len(wide) >= len(read), name
        used = resources(compiled.asm["cubin"])["REG"]
        budget = LATENT_REGISTERS.get(name, OTHER_LATENT_REGISTERS)
        assert used <= budget, (name, used, source.signature)


def misaligned(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.new_empty(tensor.numel() + 1)[1:].view(tensor.shape)


@pytest.mark.parametrize("op", [op for op in OPS if op != "packed_attention"])
def test_a_slice_of_a_batch_compiles_nothing_anew(op):
    """Whatever is given for tokens, rows or sequences may begin anywhere in memory.

    Logits and latents may not: loads of 16 bytes are what their kernels live on. Attention has its
    tables from the mask, which are whole.
    """
    several = set()
    for launch in launches_of(op, "one_training_run"):
        key = specialise(launch, 90)[0]
        for name, value in launch.arguments.items():
            if not isinstance(value, torch.Tensor) or "logits" in name or name in OWN | LATENTS:
                continue
            changed = {**launch.arguments, name: misaligned(value)}
            if specialise(dataclasses.replace(launch, arguments=changed), 90)[0] != key:
                several.add(f"{launch.kernel.__name__}: {name}")
    assert not several
