"""A backend is one object in one list: then it is known everywhere, and refused with a reason."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch._subclasses import FakeTensorMode

from lvrpo import backends, flow_step, gather_logprobs, info, linear_logprobs
from lvrpo.backends import Backend
from lvrpo.backends.bound import bind
from lvrpo.params.advantages import AdvantageParams
from lvrpo.params.flow import StepCoefficients
from lvrpo.reference.normalize_advantages import normalize_advantages as reference

STEP = StepCoefficients(*(torch.full((1,), 0.5) for _ in range(5)))


class Counting(Backend):
    """Runs one op by its reference, and counts."""

    name = "counting"
    device = "cpu"
    calls = 0

    def has_kernels(self, op: str) -> bool:
        return op == "flow_step"

    def functional(self, op: str, reference: Any) -> Any:
        def run(*arguments: Any, **options: Any) -> Any:
            self.calls += 1
            return reference(*arguments, **options)

        return run


class Refusing(Backend):
    """Has kernels for everything, and never what they need."""

    name = "refusing"
    device = "cuda"
    names: Mapping[str, tuple[str, ...]] = {}

    def has_kernels(self, op: str) -> bool:
        return True

    def known(self, op: str, choice: str) -> tuple[str, ...] | None:
        return self.names.get(choice)

    def limit(self, op: str, arguments: Mapping[str, Any]) -> str:
        return arguments["too_much"]

    def why_not_dtype(self, dtype: torch.dtype) -> str:
        return f"it cannot add {dtype}"


@pytest.fixture
def counting(monkeypatch):
    found = Counting()
    monkeypatch.setattr(backends, "ALL", (found, *backends.ALL))
    return found


def inputs():
    torch.manual_seed(0)
    return torch.randn(2, 5), torch.randn(2, 5), STEP, torch.randn(2, 5)


def test_the_list_gains_a_backend_by_one_object(counting):
    expected = flow_step(*inputs(), backend="torch")
    assert counting.calls == 0
    for backend in (None, "counting"):
        for ours, theirs in zip(flow_step(*inputs(), backend=backend), expected, strict=True):
            assert torch.equal(ours, theirs)
    assert counting.calls == 2
    assert backends.named("counting") is counting


def test_info_knows_it(counting):
    assert info.backends_of("flow_step")[0] == "counting"
    assert "counting" not in info.backends_of("gather_logprobs")
    assert "\n  counting available\n" in info.describe()


def test_the_environment_names_it(counting, monkeypatch):
    monkeypatch.setenv("LVRPO_BACKEND", "counting")
    flow_step(*inputs())
    assert counting.calls == 1
    with pytest.raises(ValueError, match="backend 'counting' cannot run these inputs"):
        gather_logprobs(torch.randn(2, 3), torch.tensor([0, 1]))


def test_a_refusal_lists_the_reasons_of_every_backend(counting):
    with pytest.raises(ValueError, match="counting") as refusal:
        gather_logprobs(torch.randn(2, 3), torch.tensor([0, 1]), backend="counting")
    first, *table = str(refusal.value).splitlines()
    assert first == "gather_logprobs: backend 'counting' cannot run these inputs"
    assert [line.split(":")[0].strip() for line in table] == [x.name for x in backends.ALL]
    assert table[0] == "  counting: gather_logprobs has no counting kernel"
    assert "  torch: can run" in table
    assert "  flash: gather_logprobs has no flash kernel" in table


def test_an_unknown_name():
    known = ", ".join(backend.name for backend in backends.ALL)
    expected = re.escape(f"gather_logprobs: backend is 'cud', expected one of {known}")
    with pytest.raises(ValueError, match=expected):
        gather_logprobs(torch.randn(2, 3), torch.tensor([0, 1]), backend="cud")


def test_every_reason_is_told():
    backend = Refusing()
    backend.names = {"surrogate": ("clip", "none")}
    reasons = backend.why_not(
        "grpo_loss",
        [torch.zeros(1), torch.zeros(2)],
        {"surrogate": "spo", "kl": "k4"},
        {"too_much": "it has run out of luck"},
    )
    assert reasons == [
        "surrogate 'spo' has no refusing kernel; known: clip, none",
        "it has run out of luck",
        "it runs on CUDA tensors, got one on cpu",
        "it cannot add torch.float32",
    ]


def test_a_choice_without_a_kernel_goes_to_the_reference(monkeypatch):
    backend = Refusing()
    backend.device, backend.names = "cpu", {"surrogate": ("clip",)}
    monkeypatch.setattr(Refusing, "why_not_dtype", Backend.why_not_dtype)
    monkeypatch.setattr(backends, "ALL", (backend, backends.named("torch")))
    x = [torch.zeros(1)]
    for name, expected in (("clip", "refusing"), ("spo", "torch")):
        assert backends.resolve("grpo_loss", x, None, choices={"surrogate": name}).name == expected
    with pytest.raises(ValueError, match="surrogate 'spo' has no refusing kernel"):
        backends.resolve("grpo_loss", x, "refusing", choices={"surrogate": "spo"})


def test_a_composite_op_has_the_backends_of_its_parts(monkeypatch):
    class Part(Counting):
        def has_kernels(self, op: str) -> bool:
            return op in self.parts

    backend = Part()
    monkeypatch.setattr(backends, "ALL", (backend, *backends.ALL))
    for parts, has in ((("gather_logprobs",), True), (("grpo_loss",), False)):
        backend.parts = parts
        assert ("counting" in info.backends_of("linear_logprobs")) is has
        assert "counting" not in info.backends_of("linear_grpo_loss")
    backend.parts = ("gather_logprobs",)
    linear_logprobs(torch.randn(2, 3), torch.randn(5, 3), torch.tensor([0, 4]))
    assert backend.calls == 1


def test_cuda_has_a_seat_and_says_what_it_lacks():
    cuda = backends.named("cuda")
    if not backends.library.KERNELS["CUDA"]:
        assert cuda.why_unavailable() in (
            "this build of lvrpo._C has no CUDA kernels",
            backends.library.MISSING,
        )
        with pytest.raises(ValueError, match=r"cuda: (gather_logprobs has no cuda|lvrpo)"):
            gather_logprobs(torch.randn(2, 3), torch.tensor([0, 1]), backend="cuda")


@pytest.fixture
def two_kinds_of_kernels(monkeypatch):
    """A GPU that CUDA's and Triton's kernels run on, but for attention, which CUDA lacks."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    for name in ("cuda", "triton"):
        kind = type(backends.named(name))
        monkeypatch.setattr(kind, "why_not", Backend.why_not)
        monkeypatch.setattr(kind, "why_unavailable", lambda self: "")
        has = "packed_attention" if name == "cuda" else ""
        monkeypatch.setattr(kind, "has_kernels", lambda self, op, has=has: op != has)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))


def chosen_on_gpu(op: str) -> str:
    with FakeTensorMode():
        tensors = [torch.empty(4, 2, 64, device="cuda", dtype=torch.float16)] * 3
    given = dict(zip("qkv", tensors, strict=True)) if op == "packed_attention" else None
    return backends.resolve(op, tensors, None, arguments=given).name


def test_on_a_gpu_cuda_goes_before_triton_where_it_has_kernels(two_kinds_of_kernels):
    for op in info.op_names():
        assert chosen_on_gpu(op) == ("triton" if op == "packed_attention" else "cuda")


@pytest.mark.parametrize("name", ["cuda", "triton"])
@pytest.mark.parametrize("op", ["gather_logprobs", "linear_grpo_loss"])
def test_a_gpu_that_no_kernel_was_compiled_for_takes_the_reference(
    monkeypatch, two_kinds_of_kernels, op, name
):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert chosen_on_gpu(op) == "torch"
    with FakeTensorMode():
        tensors = [torch.empty(4, 2, 64, device="cuda", dtype=torch.float16)]
    with pytest.raises(ValueError, match=r"capability 8\.0 and newer, got 7\.5"):
        backends.resolve(op, tensors, name)


def test_attention_without_a_schedule_is_asked_of_the_backend():
    assert [x.name for x in backends.ALL if x.reads_schedule] == ["triton"]


def test_what_is_bound_follows_the_environment_and_the_list(monkeypatch):
    params, like = AdvantageParams(), torch.zeros(3, 1)

    def runs_whole(dtype: torch.dtype = torch.float32, backend: str | None = None) -> bool:
        names = ("normalize_advantages", "normalize_advantages")
        bound = bind(names, reference, params, like.to(dtype), backend)
        return bound.functional is reference

    assert runs_whole(backend="torch")
    first = runs_whole()
    assert first == (not backends.named("cpp").implements("normalize_advantages"))
    assert runs_whole(torch.float8_e5m2)
    monkeypatch.setenv("LVRPO_BACKEND", "torch")
    assert runs_whole()
    monkeypatch.delenv("LVRPO_BACKEND")
    assert runs_whole() == first
    monkeypatch.setattr(backends, "ALL", (backends.named("torch"),))
    assert runs_whole()
