from __future__ import annotations

import functools
import math
from typing import Any

import pytest
import torch
from mutants.guided_velocity import MUTANTS
from torch import Tensor

from lvrpo.ops.guided_velocity import guided_velocity
from lvrpo.params.flow import RENORMS, GuidanceParams
from lvrpo.reference.guided_velocity import guided_velocity as reference
from lvrpo.testing import check_op

pytestmark = pytest.mark.usefixtures("poison_empty")

SHAPES = {
    "one scalar": (1, 1),
    "odd sizes": (3, 5, 7),
    "4 tokens of 12": (6, 4, 12),
    "rows of several turns": (2, 3, 270),
    "more than one block per image": (2, 8192 + 130),
}
BRANCHES = ["velocity", "without_text", "without_image"]


def make_inputs(
    shape: tuple[int, ...], dtype: torch.dtype, *, has_image: bool = True, **params: Any
) -> dict[str, Any]:
    """Some rows are brought back, some held at the smallest factor, some at 1."""
    generator = torch.Generator().manual_seed(len(shape))
    velocity, text, image = (torch.randn(shape, generator=generator) for _ in range(3))
    apart = torch.linspace(-1.5, 1.5, shape[0]).reshape(-1, *[1] * (len(shape) - 1))
    # Guidance grows a velocity that points away from its branches, and shrinks the others.
    inputs = {
        "velocity": velocity,
        "without_text": 0.3 * text - apart * velocity,
        "without_image": 0.3 * image if has_image else None,
    }
    return {k: None if x is None else x.to(dtype) for k, x in inputs.items()} | {
        "guided": torch.arange(shape[0]) % 4 != 2,
        "params": GuidanceParams(**{"text_scale": 2.5, "renorm_min": 0.3} | params),
    }


def published(inputs: dict[str, Any]) -> Tensor:
    """What BAGEL computes, one image at a time and in its own words; fp64."""
    params, out = inputs["params"], []
    for n in range(len(inputs["velocity"])):
        v_t = inputs["velocity"][n].double()
        guided = inputs["guided"]
        if guided is not None and not guided[n]:
            out.append(v_t)
            continue
        cfg_text_v_t = inputs["without_text"][n].double()
        v_t_ = cfg_text_v_t + params.text_scale * (v_t - cfg_text_v_t)
        rows = {"dim": -1, "keepdim": True}

        def scale(v: Tensor, of: dict[str, Any], v_t: Tensor = v_t) -> Tensor:
            if of:
                norm = v_t.square().sum(**of).sqrt() / (v.square().sum(**of).sqrt() + 1e-8)
            else:
                norm = v_t.square().sum().sqrt() / (v.square().sum().sqrt() + 1e-8)
            return norm.clamp(min=params.renorm_min, max=1.0)

        if params.renorm == "text_channel":
            v_t_ = v_t_ * scale(v_t_, rows)
        if inputs["without_image"] is not None:
            cfg_img_v_t = inputs["without_image"][n].double()
            v_t_ = cfg_img_v_t + params.image_scale * (v_t_ - cfg_img_v_t)
        if params.renorm == "global":
            v_t_ = v_t_ * scale(v_t_, {})
        elif params.renorm == "channel":
            v_t_ = v_t_ * scale(v_t_, rows)
        out.append(v_t_)
    return torch.stack(out)


def scales(inputs: dict[str, Any]) -> dict[str, Tensor | float]:
    """Sizes of the summands, which cancel."""
    present = [inputs[name].double().abs() for name in BRANCHES if inputs[name] is not None]
    params = inputs["params"]
    grown = (1 + params.text_scale) * (1 + params.image_scale)
    size = float(torch.stack(present).max())
    # The quotient's gradient is along the velocity, whose elements stand out from its norm.
    norms = [x.flatten(1).square().mean(dim=1).sqrt().clamp(min=1e-3).min() for x in present]
    slope = 10 * grown / inputs["velocity"].numel() * size / float(min(norms))
    return {"out0": grown * size} | {f"d{name}": slope for name in BRANCHES}


def differentiable(inputs: dict[str, Any]) -> list[str]:
    return [name for name in BRANCHES if inputs[name] is not None]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
@pytest.mark.parametrize("renorm", RENORMS)
@pytest.mark.parametrize("has_image", [True, False])
def test_matches_reference(backend, shape, dtype, renorm, has_image):
    inputs = make_inputs(shape, dtype, renorm=renorm, has_image=has_image)
    op = functools.partial(guided_velocity, backend=backend)
    check_op(op, reference, inputs, differentiable=differentiable(inputs), scales=scales(inputs))


@pytest.mark.parametrize("renorm", RENORMS)
@pytest.mark.parametrize("has_image", [True, False])
def test_is_what_bagel_computes(backend, renorm, has_image):
    inputs = make_inputs((6, 4, 12), torch.float64, renorm=renorm, has_image=has_image)
    names = differentiable(inputs)
    ours = inputs | {name: inputs[name].clone().requires_grad_() for name in names}
    theirs = inputs | {name: inputs[name].clone().requires_grad_() for name in names}
    out, expected = guided_velocity(**ours, backend=backend), published(theirs)
    assert (out - expected).abs().max() < 1e-12
    upstream = torch.randn_like(expected)
    for x, y in zip(
        torch.autograd.grad(out, [ours[name] for name in names], upstream),
        torch.autograd.grad(expected, [theirs[name] for name in names], upstream),
        strict=True,
    ):
        assert (x - y).abs().max() < 1e-11


@pytest.mark.parametrize("renorm", RENORMS)
def test_gradcheck(backend, renorm):
    inputs = make_inputs((3, 2, 5), torch.float64, renorm=renorm)

    def function(*branches: Tensor) -> Tensor:
        arguments = inputs | dict(zip(BRANCHES, branches, strict=True))
        return guided_velocity(**arguments, backend=backend)

    torch.autograd.gradcheck(function, [inputs[name].requires_grad_() for name in BRANCHES])


@pytest.mark.parametrize("renorm", RENORMS)
def test_a_scale_of_1_leaves_the_velocity(backend, renorm):
    inputs = make_inputs((6, 4, 12), torch.float32, renorm=renorm, text_scale=1.0, image_scale=1.0)
    ours = guided_velocity(**inputs, backend=backend)
    # BAGEL's 1e-8 beside a norm.
    assert (ours - inputs["velocity"]).abs().max() <= 1e-6 * inputs["velocity"].abs().max()


@pytest.mark.parametrize("renorm", ["global", "channel"])
def test_no_norm_grows(backend, renorm):
    inputs = make_inputs((6, 4, 12), torch.float64, renorm=renorm, renorm_min=0.0, text_scale=9.0)
    ours = guided_velocity(**inputs, backend=backend)
    dims = (1, 2) if renorm == "global" else (-1,)
    grown = ours.square().sum(dims) / inputs["velocity"].square().sum(dims)
    assert grown.max() < 1 + 1e-12
    assert grown[0].max() > 1 - 1e-6  # a row that guidance had grown is as long as before


@pytest.mark.parametrize("junk", [math.nan, math.inf])
@pytest.mark.parametrize("renorm", RENORMS)
def test_a_sample_that_is_not_guided_keeps_its_velocity_whatever_its_branches_hold(
    backend, renorm, junk
):
    inputs = make_inputs((6, 4, 12), torch.float32, renorm=renorm)
    off = ~inputs["guided"]
    for name in ("without_text", "without_image"):
        inputs[name] = inputs[name].masked_fill(off[:, None, None], junk)
    leaves = {name: inputs[name].clone().requires_grad_() for name in BRANCHES}
    out = guided_velocity(**inputs | leaves, backend=backend)
    upstream = torch.randn_like(out)
    dvelocity, *branches = torch.autograd.grad(out, list(leaves.values()), upstream)
    assert torch.equal(out[off], inputs["velocity"][off])
    assert torch.equal(dvelocity[off], upstream[off])
    assert all(torch.equal(d[off], torch.zeros_like(d[off])) for d in branches)
    assert all(d.isfinite().all() for d in (out, dvelocity, *branches))


@pytest.mark.parametrize("renorm", RENORMS)
@pytest.mark.parametrize("zero", [("velocity",), ("velocity", "without_text", "without_image")])
def test_gradients_at_norms_of_0_are_finite(backend, renorm, zero):
    inputs = make_inputs((3, 2, 5), torch.float32, renorm=renorm) | {"guided": None}
    inputs |= {name: torch.zeros(3, 2, 5) for name in zero}
    leaves = {name: inputs[name].requires_grad_() for name in BRANCHES}
    out = guided_velocity(**inputs | leaves, backend=backend)
    gradients = torch.autograd.grad(out.sum(), list(leaves.values()))
    assert all(x.isfinite().all() for x in (out, *gradients))


@pytest.mark.parametrize("size", [1e-36, 1e36])
@pytest.mark.parametrize("renorm", RENORMS)
def test_norms_of_any_size(backend, renorm, size):
    """Squares of such numbers are no floats."""
    inputs = make_inputs((3, 2, 5), torch.float32, renorm=renorm, renorm_min=0.0)
    inputs |= {name: inputs[name] * size for name in BRANCHES}
    op = functools.partial(guided_velocity, backend=backend)
    sizes = {"out0": 30 * size} | {f"d{name}": 3.0 for name in BRANCHES}
    check_op(op, reference, inputs, differentiable=BRANCHES, scales=sizes)


@pytest.mark.parametrize("renorm", RENORMS)
@pytest.mark.parametrize("shape", [(5, 3, 7), (3, 9001)])
def test_a_sample_alone_equals_the_sample_in_a_batch(backend, shape, renorm):
    inputs = make_inputs(shape, torch.float32, renorm=renorm)
    batch = guided_velocity(**inputs, backend=backend)
    for n in range(shape[0]):
        tensors = {k: x[n : n + 1] for k, x in inputs.items() if isinstance(x, Tensor)}
        alone = guided_velocity(**inputs | tensors, backend=backend)
        assert torch.equal(alone[0], batch[n]) or backend == "torch"


def test_the_number_of_threads_does_not_matter():
    inputs = make_inputs((2, 50_000), torch.float32)
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(guided_velocity(**inputs, backend="cpp"))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(results[0], other) for other in results[1:])


def test_branches_of_any_dtype_and_layout(backend):
    inputs = make_inputs((6, 4, 12), torch.float32)
    inputs["without_text"] = inputs["without_text"].bfloat16()
    inputs["without_image"] = inputs["without_image"].double()
    strided = {name: inputs[name].transpose(1, 2).contiguous().transpose(1, 2) for name in BRANCHES}
    leaves = {name: x.detach().requires_grad_() for name, x in strided.items()}
    out = guided_velocity(**inputs | leaves, backend=backend)
    out.backward(torch.ones(1, 1, 1).expand(6, 4, 12))
    assert out.dtype == torch.float32
    assert all(x.grad.dtype == x.dtype for x in leaves.values())
    expected = published(inputs)
    assert (out - expected).abs().max() < 1e-5 * expected.abs().max()


@pytest.mark.parametrize("wanted", BRANCHES)
def test_a_gradient_of_one_input_alone(backend, wanted):
    inputs = make_inputs((6, 4, 12), torch.float64)
    leaves = {name: inputs[name].clone().requires_grad_() for name in BRANCHES}
    upstream = torch.randn(6, 4, 12, dtype=torch.float64)
    every = guided_velocity(**inputs | leaves, backend=backend)
    one = guided_velocity(**inputs | {wanted: leaves[wanted]}, backend=backend)
    expected = torch.autograd.grad(every, leaves[wanted], upstream)[0]
    alone = torch.autograd.grad(one, leaves[wanted], upstream)[0]
    assert (alone - expected).abs().max() < 1e-12


@pytest.mark.parametrize("shape", [(0, 3), (0, 0)])
@pytest.mark.parametrize("renorm", RENORMS)
def test_empty_input(backend, shape, renorm):
    empty = torch.zeros(shape, requires_grad=True)
    params = GuidanceParams(renorm=renorm)
    out = guided_velocity(empty, torch.zeros(shape), params=params, backend=backend)
    out.sum().backward()
    assert out.shape == empty.grad.shape == shape


def test_opcheck():
    inputs = make_inputs((4, 5), torch.float32)
    numbers = torch.tensor([2.5, 1.5, 0.3], dtype=torch.float64)
    for image, guided in ((inputs["without_image"], inputs["guided"]), (None, None)):
        saved = inputs["velocity"], inputs["without_text"], image, guided, numbers
        torch.library.opcheck(torch.ops.lvrpo.guided_velocity_fwd.default, (*saved, 1))
        for with_branches in (True, False):
            torch.library.opcheck(
                torch.ops.lvrpo.guided_velocity_bwd.default,
                (torch.randn(4, 5), *saved, with_branches, 1),
            )


@pytest.mark.parametrize("mutant", MUTANTS.values(), ids=MUTANTS.keys())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rule_rejects_mutant(mutant, dtype):
    inputs = make_inputs((8, 4, 12), dtype)
    with pytest.raises(AssertionError):
        check_op(mutant, reference, inputs, differentiable=BRANCHES, scales=scales(inputs))


BAD = {
    "other shape": ({"without_text": torch.zeros(2, 4)}, r"without_text has shape \(2, 4\)"),
    "integer branch": (
        {"without_image": torch.zeros(2, 3, dtype=torch.int64)},
        "without_image is torch.int64",
    ),
    "one dimension": ({"velocity": torch.zeros(2)}, r"velocity has shape \(2,\)"),
    "three samples guided": ({"guided": [True] * 3}, r"guided has shape \(3,\)"),
    "guided by a negative number": ({"guided": [1.0, -1.0]}, r"guided\[1\] is -1.0"),
    "unknown backend": ({"backend": "cudnn"}, "backend is 'cudnn'"),
}


@pytest.mark.parametrize(("change", "message"), BAD.values(), ids=BAD.keys())
def test_bad_input(backend, change, message):
    arguments = {"velocity": torch.zeros(2, 3), "without_text": torch.zeros(2, 3)}
    with pytest.raises(ValueError, match=message):
        guided_velocity(**arguments | {"backend": backend} | change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"renorm": "rows"}, "renorm is 'rows'"),
        ({"text_scale": math.inf}, "text_scale is inf, expected finite and >= 0"),
        ({"image_scale": -1.0}, "image_scale is -1.0, expected finite and >= 0"),
        ({"renorm_min": 1.5}, r"renorm_min is 1.5, expected \[0, 1\]"),
    ],
)
def test_bad_parameters(change, message):
    with pytest.raises(ValueError, match=message):
        GuidanceParams(**change)
