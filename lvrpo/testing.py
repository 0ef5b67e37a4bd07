"""The tolerance rule every backend is held to, shipped so that you can hold your own kernels to it.

Three results are compared, all from the same rounded inputs:

    gold   the reference in fp64
    plain  the reference in the op's compute dtype (fp32), rounded to the op's output dtype
    ours   the backend under test

A fixed `atol` lets an all-zero gradient pass once the loss is a mean over thousands of tokens. Here
the error of `ours` may be at most twice the error of `plain`, in RMS and for every element, plus a
few units in the last place.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

#: Units in the last place that a result may be off where `plain` happens to be exact.
DEFAULT_ULPS = 8.0


def check_against_plain(
    ours: Tensor,
    gold: Tensor,
    plain: Tensor,
    *,
    scale: Tensor | float | None = None,
    ulps: float = DEFAULT_ULPS,
    name: str = "output",
) -> None:
    """Assert that `ours` is as close to `gold` as `plain` is, up to a factor of two.

    Args:
        ours: the result under test, in the op's output dtype.
        gold: fp64, same shape.
        plain: same shape and dtype as `ours`.
        scale: magnitude of the intermediate values, broadcastable to `gold`; None means |gold|.
            Give the size of the summands where a result is a difference.
        ulps: units in the last place, of the dtype that the op computes in (fp32, or fp64 for fp64
            outputs) and at `scale`, allowed per element. An fp16 or bf16 output may also be one of
            its own units off.
        name: for the message.

    Raises:
        AssertionError: shape, dtype, non-finite values or an error above the bound; the message
            shows the worst element and both ratios.
    """
    assert ours.shape == gold.shape == plain.shape, (
        f"{name}: shapes differ: ours {tuple(ours.shape)}, gold {tuple(gold.shape)}, "
        f"plain {tuple(plain.shape)}"
    )
    assert ours.dtype == plain.dtype, f"{name}: ours is {ours.dtype}, expected {plain.dtype}"
    if ours.numel() == 0:
        return
    gold, wide_ours, wide_plain = gold.double(), ours.double(), plain.double()
    same_infinities = torch.equal(
        torch.where(gold.isfinite(), 0.0, gold), torch.where(gold.isfinite(), 0.0, wide_ours)
    )
    assert same_infinities, f"{name}: infinities of ours and gold are at different places"
    finite = gold.isfinite()
    if not bool(finite.any()):
        return
    assert bool(wide_ours[finite].isfinite().all()), f"{name}: ours holds NaN or inf, gold does not"

    magnitude = gold.abs() if scale is None else torch.as_tensor(scale).to(gold)
    inside = min(torch.finfo(ours.dtype).eps, torch.finfo(torch.float32).eps)
    slack = (magnitude.expand_as(gold) * (ulps * inside))[finite]
    rounding = torch.zeros_like(slack)
    if torch.finfo(ours.dtype).eps > inside:
        rounding = gold[finite].abs() * torch.finfo(ours.dtype).eps
    error = (wide_ours - gold)[finite].abs()
    plain_error = (wide_plain - gold)[finite].abs()
    tiny = torch.finfo(ours.dtype).tiny
    bound = 2 * plain_error + rounding + slack + tiny
    rms_bound = 2 * _rms(plain_error) + _rms(slack) / 2 + tiny
    worst = int((error / bound).argmax())
    where = tuple(finite.nonzero()[worst].tolist())
    message = (
        f"{name}: worst element {where}: ours {wide_ours[finite][worst]:.9g}, "
        f"gold {gold[finite][worst]:.9g}, plain {wide_plain[finite][worst]:.9g}; "
        f"error/bound {float(error[worst] / bound[worst]):.3g} elementwise, "
        f"{_rms(error) / rms_bound:.3g} in RMS"
    )
    assert _rms(error) <= rms_bound, message
    assert bool((error <= bound).all()), message


def _rms(x: Tensor) -> float:
    return float(x.square().mean().sqrt()) if x.numel() else 0.0


def check_op(
    op: Callable[..., Any],
    reference: Callable[..., Any],
    inputs: Mapping[str, Any],
    *,
    differentiable: Iterable[str] = (),
    scales: Mapping[str, Tensor | float] | None = None,
    ulps: float = DEFAULT_ULPS,
    seed: int = 0,
) -> None:
    """Hold every output and every gradient of `op` to the rule, against `reference`.

    Args:
        op: called as op(**inputs); returns a tensor or a tuple of tensors.
        reference: same signature and results, in any float dtype, differentiable by autograd.
        inputs: keyword arguments; floating tensors are widened to fp64 for gold and to fp32 for
            plain (fp64 inputs stay fp64).
        differentiable: names of the inputs whose gradients are compared. The upstream gradients
            are random and of order 1 / (number of outputs), as after a mean.
        scales: by output ("out0", "out1", ...) or gradient ("d" + name), see `check_against_plain`.
        ulps: see `check_against_plain`.
        seed: of the upstream gradients.
    """
    scales = scales or {}
    names = list(differentiable)

    # An upstream gradient arrives in the dtype of the op's output; all runs get what it can hold.
    output_dtypes: list[torch.dtype] = []

    def run(function: Callable[..., Any], dtype: torch.dtype | None) -> dict[str, Tensor]:
        arguments = {}
        for name, value in inputs.items():
            if isinstance(value, Tensor) and value.is_floating_point():
                value = value.detach()
                if dtype is not None and value.dtype != torch.float64:
                    value = value.to(dtype)
                value.requires_grad_(name in names)
            arguments[name] = value
        outputs = function(**arguments)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        results = {f"out{i}": out.detach() for i, out in enumerate(outputs)}
        if names:
            generator = torch.Generator().manual_seed(seed)
            output_dtypes.extend(out.dtype for out in outputs if dtype is None)
            upstream = [
                (
                    torch.randn(out.shape, generator=generator, dtype=torch.float64, device="cpu")
                    / out.numel()
                )
                .float()
                .to(held)
                .to(out)
                for out, held in zip(outputs, output_dtypes, strict=True)
            ]
            pairs = [
                (out, g) for out, g in zip(outputs, upstream, strict=True) if out.requires_grad
            ]
            total = sum((out * g).sum() for out, g in pairs)
            gradients = torch.autograd.grad(
                total,  # type: ignore[arg-type]
                [arguments[name] for name in names],
                allow_unused=True,
            )
            for name, gradient in zip(names, gradients, strict=True):
                value = torch.zeros_like(arguments[name]) if gradient is None else gradient
                results[f"d{name}"] = value.detach()
        return results

    ours = run(op, None)
    gold = run(reference, torch.float64)
    plain = run(reference, torch.float32)
    for name, value in ours.items():
        check_against_plain(
            value,
            gold[name],
            plain[name].to(value.dtype),
            scale=scales.get(name),
            ulps=ulps,
            name=name,
        )
        if name.startswith("d"):
            expected = inputs[name[1:]].dtype
            assert value.dtype == expected, f"{name}: is {value.dtype}, expected {expected}"


_bf16_repairs = 0


def interpreter_has_bf16() -> bool:
    """Whether `interpreter_with_bf16` is in force."""
    return _bf16_repairs > 0


@contextlib.contextmanager
def interpreter_with_bf16() -> Iterator[None]:
    """Inside, Triton's interpreter (TRITON_INTERPRET=1) computes with bf16 as a GPU does.

    By itself it truncates to bf16 and multiplies bit patterns, which is why `backend="triton"`
    refuses bf16 there otherwise. For tests: it replaces functions of `triton`, for all threads,
    and puts them back at the end. Needs Triton.
    """
    global _bf16_repairs
    from triton.runtime import interpreter as triton

    bf16, fp32 = triton.tl.bfloat16, triton.tl.float32
    convert, dot = triton._convert_float, triton.InterpreterBuilder.create_dot

    def rounding(data: Any, source: Any, target: Any, mode: Any) -> Any:
        if (source, target) == (fp32, bf16):
            return torch.from_numpy(data.copy()).bfloat16().view(torch.uint16).numpy()
        return convert(data, source, target, mode)

    def widened(x: Any) -> Any:
        if x.dtype != bf16:
            return x
        data = convert(x.data, bf16, fp32, None).view("float32").reshape(x.data.shape)
        return triton.TensorHandle(data, fp32)

    def of_values(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        return dot(self, widened(a), widened(b), *rest)

    triton._convert_float, triton.InterpreterBuilder.create_dot = rounding, of_values
    _bf16_repairs += 1
    try:
        yield
    finally:
        _bf16_repairs -= 1
        triton._convert_float, triton.InterpreterBuilder.create_dot = convert, dot
