"""Each flash attention is called as its version takes it, and only where it can do the work."""

from __future__ import annotations

import importlib.metadata
import inspect
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lvrpo import info
from lvrpo.backends.flash import varlen
from lvrpo.backends.flash.attention import gather_attention
from lvrpo.masks import SpanMask

FA4, FA3, FA2, TORCH = varlen.IMPLEMENTATIONS


def flash_attn_2(  # 2.8.3; since 2.6
    q,
    k,
    v,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    alibi_slopes=None,
    deterministic=False,
    return_attn_probs=False,
    block_table=None,
): ...


def flash_attn_3(  # 3.0.0, hopper/
    q,
    k,
    v,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    seqused_q=None,
    seqused_k=None,
    softmax_scale=None,
    causal=False,
    qv=None,
    q_descale=None,
    k_descale=None,
    v_descale=None,
    window_size=(-1, -1),
    attention_chunk=0,
    softcap=0.0,
    num_splits=1,
    pack_gqa=None,
    deterministic=False,
    sm_margin=0,
    return_attn_probs=False,
): ...


def flash_attn_4(  # 4.0.0b36
    q,
    k,
    v,
    qv=None,
    cu_seqlens_q=None,
    cu_seqlens_k=None,
    max_seqlen_q=None,
    max_seqlen_k=None,
    min_seqlen_k=None,
    seqused_q=None,
    seqused_k=None,
    gather_kv_indices=None,
    page_table=None,
    softmax_scale=None,
    causal=False,
    window_size=(None, None),
    learnable_sink=None,
    softcap=0.0,
    num_splits=1,
    pack_gqa=None,
    deterministic=False,
    score_mod=None,
    score_mod_bwd=None,
    mask_mod=None,
    block_sparse_tensors=None,
    aux_tensors=None,
    aux_scalars=None,
    return_lse=False,
    scheduler_metadata=None,
    seqlen_k_per_split=None,
    disable_scheduler_metadata=False,
    gather_bwd_recompute_p=False,
    gather_bwd_token_chunk=None,
): ...


def torch_2_11(
    query,
    key,
    value,
    cu_seq_q,
    cu_seq_k,
    max_q,
    max_k,
    *,
    return_aux=None,
    scale=None,
    window_size=(-1, -1),
): ...


def torch_2_12(
    query,
    key,
    value,
    cu_seq_q,
    cu_seq_k,
    max_q,
    max_k,
    *,
    return_aux=None,
    scale=None,
    window_size=(-1, -1),
    enable_gqa=False,
    seqused_k=None,
    block_table=None,
    num_splits=None,
): ...


def recorded(signature: inspect.Signature, result: Any, calls: list[dict[str, Any]]) -> Any:
    """A function of this signature that keeps its arguments."""

    def function(*arguments: Any, **options: Any) -> Any:
        calls.append(signature.bind(*arguments, **options).arguments)
        return result

    function.__signature__ = signature
    return function


ARGUMENTS = [torch.zeros(2, 2, 8), *torch.zeros(2, 3, 1, 8), torch.tensor([0, 2]).int()]
ARGUMENTS += [torch.tensor([0, 3]).int(), 2, 3]


@pytest.mark.parametrize("version", [flash_attn_2, flash_attn_3, flash_attn_4])
@pytest.mark.parametrize("with_lse", [False, True])
@pytest.mark.parametrize(
    ("causal", "window", "size"),
    [(True, None, None), (False, None, None), (True, 2, (1, 0)), (False, 1, (0, 3))],
)
def test_arguments_of_flash_attn(version, with_lse, causal, window, size):
    calls: list[dict[str, Any]] = []
    result = (torch.ones(1), torch.zeros(1)) if with_lse else torch.ones(1)
    function = recorded(inspect.signature(version), result, calls)
    assert varlen.call_flash_attn(function, *ARGUMENTS, causal, 0.3, 5.0, window) == 1
    names = ("q", "k", "v", "cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k")
    expected = dict(zip(names, ARGUMENTS, strict=True))
    expected |= {"softmax_scale": 0.3, "causal": causal, "softcap": 5.0, "deterministic": True}
    assert calls == [expected if size is None else expected | {"window_size": size}]


@pytest.mark.parametrize("version", [torch_2_11, torch_2_12, "installed"])
@pytest.mark.parametrize(
    ("causal", "window", "size"),
    [(True, None, (-1, 0)), (False, None, (-1, -1)), (True, 2, (1, 0)), (False, 1, (0, 3))],
)
def test_arguments_of_torch(version, causal, window, size):
    if version == "installed":
        version = pytest.importorskip("torch.nn.attention.varlen").varlen_attn
    calls: list[dict[str, Any]] = []
    function = recorded(inspect.signature(version), torch.ones(1), calls)
    assert varlen.call_torch(function, *ARGUMENTS, causal, 0.3, 0.0, window) == 1
    names = ("query", "key", "value", "cu_seq_q", "cu_seq_k", "max_q", "max_k")
    expected = dict(zip(names, ARGUMENTS, strict=True)) | {"scale": 0.3, "window_size": size}
    if version is not torch_2_11:
        expected["enable_gqa"] = True
    assert calls == [expected]


@pytest.mark.parametrize("window", [None, 3])
def test_torch_accepts_the_calls_of_a_whole_pass(window):
    if TORCH.version() is None:
        pytest.skip(f"torch is {torch.__version__}, its varlen attention is used from 2.11 on")
    mask = SpanMask.from_groups([([(9, "full"), (5, "causal")], [[(3, "causal")], [(4, "full")]])])
    shapes = [(mask.length, heads, 64) for heads in (4, 2, 2)]
    leaves = [
        torch.empty(shape, dtype=torch.bfloat16, device="meta", requires_grad=True)
        for shape in shapes
    ]
    mask = mask.with_window(window)
    varlen = TORCH.load()
    out = gather_attention(*leaves, mask.to("meta"), varlen=varlen, scale=0.1, softcap=0.0)
    gradients = torch.autograd.grad(out.sum(), leaves)
    assert [x.shape for x in (out, *gradients)] == [torch.Size(s) for s in (shapes[0], *shapes)]


@pytest.mark.parametrize(
    ("implementation", "major", "width", "softcap", "message"),
    [
        (FA4, 8, 64, 0.0, "flash-attn 4 is not for compute capability 8.x"),
        (FA4, 9, 256, 0.0, "flash-attn 4 has heads up to 128 wide, got 256"),
        (FA3, 10, 64, 0.0, "flash-attn 3 is not for compute capability 10.x"),
        (FA3, 9, 192, 5.0, ""),
        (FA2, 7, 64, 0.0, "flash-attn 2 is not for compute capability 7.x"),
        (FA2, 12, 256, 5.0, ""),
        (TORCH, 9, 64, 5.0, "torch's varlen_attn has no softcap"),
    ],
)
def test_limits(implementation, major, width, softcap, message):
    assert implementation.why_not(major, width, softcap, backward=False) == message


@pytest.mark.parametrize(("mode", "deterministic"), [("error", True), ("warn", False)])
def test_gradients_of_torch_need_its_flag(mode, deterministic):
    before = torch.get_deterministic_debug_mode()
    torch.set_deterministic_debug_mode(mode)
    try:
        assert (TORCH.why_not(9, 64, 0.0, backward=True) == "") is deterministic
    finally:
        torch.set_deterministic_debug_mode(before)
    assert "torch.use_deterministic_algorithms(True)" in TORCH.why_not(9, 64, 0.0, backward=True)
    assert TORCH.why_not(9, 64, 0.0, backward=False) == ""


@pytest.fixture
def environment(monkeypatch):
    """Sets the versions that are installed."""

    def install(**versions: str) -> None:
        def version(package: str) -> str:
            if package.replace("-", "_") not in versions:
                raise importlib.metadata.PackageNotFoundError(package)
            return versions[package.replace("-", "_")]

        monkeypatch.setattr(importlib.metadata, "version", version)
        varlen.installed.cache_clear()

    yield install
    monkeypatch.undo()
    varlen.installed.cache_clear()


def test_the_first_that_can_is_chosen(environment):
    environment(flash_attn="2.8.3.post2", flash_attn_4="4.0.0b36", torch="2.13.0+cu130")
    assert list(varlen.installed()) == [FA4, FA2, TORCH]
    assert varlen.choose(9, 128, 0.0, backward=True) == (FA4, "")
    assert varlen.choose(9, 256, 0.0, backward=True) == (FA2, "")
    assert varlen.choose(8, 64, 5.0, backward=True) == (FA2, "")


def test_why_none_can(environment):
    environment(flash_attn="2.5.9", flash_attn_3="3.0.0", torch="2.11.0")
    assert list(varlen.installed()) == [FA3, TORCH]
    assert varlen.choose(8, 64, 5.0, backward=False) == (
        None,
        "flash-attn 3 is not for compute capability 8.x; torch's varlen_attn has no softcap",
    )


def test_what_is_missing(environment, monkeypatch):
    environment(torch="2.10.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    missing = "no flash attention is installed (pip install lvrpo[flash], or torch >= 2.11)"
    assert varlen.why_unavailable() == missing
    environment(flash_attn="2.8.3")
    assert varlen.why_unavailable() == ""
    assert "\n  flash    available: flash-attn 2 (2.8.3)\n" in info.describe()
    monkeypatch.setattr(torch.version, "cuda", None)
    assert varlen.why_unavailable() == "torch sees no NVIDIA GPU"


def test_either_module_of_flash_attn_3_is_loaded(monkeypatch):
    calls: list[dict[str, Any]] = []
    function = recorded(inspect.signature(flash_attn_3), torch.ones(1), calls)
    module = SimpleNamespace(flash_attn_varlen_func=function)
    varlen._import.cache_clear()
    monkeypatch.setitem(sys.modules, "flash_attn_3", SimpleNamespace(__path__=[]))
    monkeypatch.setitem(sys.modules, "flash_attn_3.flash_attn_interface", module)
    assert FA3.load()(*ARGUMENTS, True, 0.3, 0.0, None) == 1
    assert len(calls) == 1
    varlen._import.cache_clear()


def test_one_that_does_not_load_is_not_replaced_by_another(monkeypatch):
    varlen._import.cache_clear()
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    with pytest.raises(ImportError):
        FA2.load()
