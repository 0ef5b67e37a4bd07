"""Choices go by name: no order of a list matters, and a name that a backend lacks is refused."""

from __future__ import annotations

import ast
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from loss_inputs import make_inputs
from torch import Tensor

import lvrpo
from lvrpo import backends
from lvrpo.backends import library
from lvrpo.backends.triton import INSTALLED
from lvrpo.ops.grpo_loss import LossParams, grpo_loss
from lvrpo.params.advantages import ADVANTAGE_CHOICES
from lvrpo.params.flow import FLOW_CHOICES, GUIDANCE_CHOICES
from lvrpo.params.loss_metrics import STATISTICS
from lvrpo.params.policy_loss import LOSS_CHOICES, LOSS_NUMBERS, SURROGATE_RATIOS
from lvrpo.reference import _policy_terms

ROOT = Path(__file__).parents[1]
#: Prints what every name of every choice makes of the same inputs, on the backends in argv.
SCRIPT = """
import json, sys
import torch
import lvrpo
from lvrpo.params.advantages import ADVANTAGE_CHOICES, AdvantageParams
from lvrpo.params.flow import (
    FLOW_CHOICES, GUIDANCE_CHOICES, FlowLossParams, GuidanceParams, StepCoefficients
)
from lvrpo.params.policy_loss import LOSS_CHOICES, SURROGATE_RATIOS, LossParams

torch.manual_seed(0)
logprobs = -torch.rand(9) - 0.1
old, ref = logprobs + 0.4 * torch.randn(9), logprobs + 0.4 * torch.randn(9)
advantages, offsets = torch.randn(3), [0, 2, 6, 9]
rewards, lengths = torch.rand(6, 2), torch.arange(1, 7)
velocity, velocity_old, noise, velocity_ref = torch.randn(4, 2, 3)
step = StepCoefficients(*(torch.full((1,), x) for x in (0.9, -0.1, 0.3, 0.5, -0.1)))


def loss(name, chosen, backend):
    settings = {"beta": 0.1, name: chosen}
    if name == "surrogate":
        settings["ratio"] = "token" if chosen == "clip" else SURROGATE_RATIOS[chosen][0]
    if chosen == "seq_mean_token_sum_norm":
        settings["max_length"] = 7
    params = LossParams(**settings)
    inputs = logprobs.clone().requires_grad_(), old, advantages, offsets
    ours = lvrpo.grpo_loss(*inputs, ref_logprobs=ref, params=params, backend=backend)
    ours.loss.backward()
    metrics = {name: float(value) for name, value in ours.metrics.as_dict().items()}
    return ours.loss.item(), inputs[0].grad.tolist(), sorted(metrics.items())


def advantage(name, chosen, backend):
    settings = {"combine": "sum", name: chosen}
    if (name, chosen) == ("baseline", "none"):
        settings["scale"] = "none"
    params = AdvantageParams(**settings)
    ours = lvrpo.normalize_advantages(rewards, 3, lengths=lengths, params=params, backend=backend)
    stats = {name: value.tolist() for name, value in vars(ours.stats).items()}
    return ours.values.tolist(), sorted(stats.items())


def flow(name, chosen, backend):
    params = FlowLossParams(beta=0.1, **{name: chosen})
    ours = lvrpo.flow_policy_loss(
        velocity, velocity_old, noise, step, [1.0, -2.0],
        velocity_ref=velocity_ref, params=params, backend=backend,
    )
    return ours.loss.item(), sorted((k, float(v)) for k, v in ours.metrics.as_dict().items())


def guide(name, chosen, backend):
    params = GuidanceParams(**{name: chosen})
    branches = velocity, velocity_old, velocity_ref
    return lvrpo.guided_velocity(*branches, params=params, backend=backend).tolist()


results = {}
for backend in sys.argv[1:]:
    for run, choices in (
        (loss, LOSS_CHOICES), (advantage, ADVANTAGE_CHOICES), (flow, FLOW_CHOICES),
        (guide, GUIDANCE_CHOICES),
    ):
        for name, names in choices.items():
            for chosen in names:
                key = f"{backend} {run.__name__} {name} {chosen}"
                results[key] = run(name, chosen, backend)
print(json.dumps(results))
"""


def reversed_literals(source: str) -> tuple[str, int]:
    """The source with the names of every `X = Literal["a", "b"]` in the opposite order."""
    spans = []
    for node in ast.parse(source).body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Subscript):
            called = node.value.value
            several = isinstance(node.value.slice, ast.Tuple)  # one name has no order
            if isinstance(called, ast.Name) and called.id == "Literal" and several:
                names = [ast.literal_eval(x) for x in node.value.slice.elts]
                spans.append((node.value, f"Literal[{', '.join(map(repr, names[::-1]))}]"))
    return replaced(source, spans)


def reversed_lists(source: str) -> tuple[str, int]:
    """The source with every tuple in a dict of choices in the opposite order."""
    spans = []
    for node in ast.parse(source).body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "").endswith("CHOICES"):
            for x in ast.walk(node.value):
                if isinstance(x, ast.Dict):
                    spans += [(y, f"({ast.unparse(y)})[::-1]") for y in x.values]
    return replaced(source, spans)


def replaced(source: str, spans: list[tuple[ast.expr, str]]) -> tuple[str, int]:
    lines = source.splitlines(keepends=True)
    starts = [sum(map(len, lines[:i])) for i in range(len(lines))]
    for node, text in sorted(spans, key=lambda x: -x[0].lineno):
        begin = starts[node.lineno - 1] + node.col_offset
        end = starts[node.end_lineno - 1] + node.end_col_offset
        source = source[:begin] + text + source[end:]
    return source, len(spans)


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """A copy of what Python imports."""
    copy = tmp_path_factory.mktemp("tree")
    for folder in ("lvrpo", "kernels"):
        ignore = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / folder, copy / folder, symlinks=True, ignore=ignore)
    return copy


def results(tree: Path) -> dict[str, object]:
    names = ["torch"] + ["cpp"] * (not library.MISSING) + ["triton"] * INSTALLED
    environment = os.environ | {"PYTHONPATH": str(tree), "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-W", "ignore", "-c", SCRIPT, *names]
    run = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tree)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


@pytest.mark.slow
def test_the_order_of_no_list_of_choices_matters(tree):
    expected = results(tree)
    for folder, change, lists in (
        ("lvrpo/params", reversed_literals, 17),
        ("kernels", reversed_lists, 13),
    ):
        originals = {path: path.read_text() for path in (tree / folder).glob("*.py")}
        changed = {path: change(source) for path, source in originals.items()}
        assert sum(count for _, count in changed.values()) == lists
        for path, (text, _) in changed.items():
            path.write_text(text)
        assert results(tree) == expected
        for path, source in originals.items():
            path.write_text(source)
    for name, chosen in (("surrogate", "binary_kl"), ("kl", "abs"), ("aggregation", "token_sum")):
        assert expected[f"torch loss {name} {chosen}"] != expected["torch loss ratio token"]


@pytest.mark.skipif(bool(library.MISSING), reason=library.MISSING)
@pytest.mark.parametrize(
    ("op", "choices"),
    [
        ("grpo_loss", LOSS_CHOICES),
        ("normalize_advantages", ADVANTAGE_CHOICES),
        ("flow_policy_loss", FLOW_CHOICES),
        ("guided_velocity", GUIDANCE_CHOICES),
    ],
)
def test_every_name_has_a_kernel(op, choices):
    for backend in (backends.named("cpp"), *([backends.named("triton")] if INSTALLED else ())):
        if backend.has_kernels(op):
            for choice, names in choices.items():
                assert set(backend.known(op, choice)) == set(names), backend.name


@pytest.mark.skipif(bool(library.MISSING), reason=library.MISSING)
def test_a_table_of_another_order_is_an_extension_of_other_sources():
    library.check_table("grpo_loss", "numbers", LOSS_NUMBERS)
    for name, columns in (("numbers", LOSS_NUMBERS), ("statistics", STATISTICS)):
        with pytest.raises(ImportError, match=rf"has the {name} \[.*build it again"):
            library.check_table("grpo_loss", name, columns[::-1])


@pytest.fixture
def spo(monkeypatch):
    """A surrogate that the parameters and the reference know, and no kernel."""

    def surrogate(x: _policy_terms.Tokens, params: LossParams) -> Tensor:
        ratio = x.level.exp()
        return x.advantage.abs() / (2 * params.clip_high) * (ratio - 1) ** 2 - x.advantage * ratio

    monkeypatch.setitem(LOSS_CHOICES, "surrogate", (*LOSS_CHOICES["surrogate"], "spo"))
    monkeypatch.setitem(SURROGATE_RATIOS, "spo", ("token",))
    monkeypatch.setitem(_policy_terms.SURROGATES, "spo", surrogate)
    return LossParams(surrogate="spo")


def test_a_name_without_a_kernel_goes_to_the_reference(spo):
    inputs = make_inputs([3, 4])
    expected = grpo_loss(**inputs, params=spo, backend="torch").loss
    assert torch.equal(grpo_loss(**inputs, params=spo).loss, expected)
    assert expected != grpo_loss(**inputs, params=LossParams()).loss
    hidden, weight, ids = torch.randn(2, 3), torch.randn(5, 3), torch.tensor([0, 4])
    fused = lvrpo.linear_grpo_loss(hidden, weight, ids, None, [1.0], [0, 2], params=spo)
    assert fused.loss.isfinite()


@pytest.mark.parametrize("name", ["cpp", "triton"])
def test_a_name_without_a_kernel_is_refused_by_name(spo, name):
    if backends.named(name).why_unavailable():
        pytest.skip(backends.named(name).why_unavailable())
    refusal = f"{name}: surrogate 'spo' has no {name} kernel; known: clip, detached, "
    with pytest.raises(ValueError, match=refusal):
        grpo_loss(**make_inputs([3, 4]), params=spo, backend=name)
    with pytest.raises(ValueError, match=refusal):
        lvrpo.logits_grpo_loss(
            *(torch.randn(2, 5), torch.tensor([0, 4]), None, [1.0], [0, 2]),
            params=spo,
            backend=name,
        )


@pytest.mark.skipif(not backends.triton_interprets(), reason="TRITON_INTERPRET is not 1")
def test_a_name_that_a_kernel_lists_and_has_no_branch_for_does_not_run(spo, monkeypatch):
    from lvrpo.kernels import grpo_loss as kernels

    monkeypatch.setitem(kernels.CHOICES, "surrogate", LOSS_CHOICES["surrogate"])
    with pytest.raises(Exception, match="has no formula"):
        grpo_loss(**make_inputs([3, 4]), params=spo, backend="triton")
