"""Log-probs and entropies from hidden states against verl's fused head, in models too."""

from __future__ import annotations

import copy
import types

import pytest
import torch
from torch import Tensor

from lvrpo.integrations import verl as ours
from lvrpo.integrations import versions
from lvrpo.testing import check_against_plain

pytest.importorskip("verl", reason="pip install 'lvrpo[verl]'")
import transformers
from verl.models.transformers.dense_common import forward_with_torch_backend
from verl.utils.experimental.torch_functional import FusedLinearForPPO

SIZES = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def gold(
    hidden: Tensor, weight: Tensor, labels: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    logp = (hidden.double() @ weight.double().T / temperature).log_softmax(-1)
    return logp.gather(-1, labels[..., None])[..., 0], -(logp.exp() * logp).sum(-1)


@pytest.mark.parametrize("shape", [(11,), (3, 5)])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_linear_cross_entropy_is_verls_head(shape, temperature):
    torch.manual_seed(0)
    labels = torch.randint(61, shape)
    upstream = torch.randn(2, *shape)
    results = []
    for dtype, call in (
        (torch.float32, ours.linear_cross_entropy),
        (torch.float64, gold),
        (torch.float32, FusedLinearForPPO()),
    ):
        torch.manual_seed(1)
        hidden = torch.randn(*shape, 16).to(dtype).requires_grad_()
        weight = torch.randn(61, 16).to(dtype).requires_grad_()
        outputs = call(hidden, weight, labels, temperature)
        sum((out * up).sum() for out, up in zip(outputs, upstream, strict=True)).backward()
        results.append((*outputs, hidden.grad, weight.grad))
    for name, *(found, exact, theirs) in zip(
        ("logp", "entropy", "dh", "dw"), *results, strict=True
    ):
        check_against_plain(found.detach(), exact.detach(), theirs.detach(), scale=8.0, name=name)


def model(family: str, **options: object) -> transformers.PreTrainedModel:
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**SIZES, **options)
    return getattr(transformers, f"{family}ForCausalLM")(config).double()


@pytest.mark.parametrize("family", ["Qwen2", "Llama"])
@pytest.mark.parametrize("shifted", [False, True])
def test_the_forward_of_a_model_is_verls(family, shifted):
    theirs = model(family)
    mine = copy.deepcopy(theirs)
    mine.forward = types.MethodType(ours.forward_with_lvrpo_backend, mine)
    ids = torch.randint(61, (2, 9))
    inputs = {"input_ids": ids, "temperature": 0.8, "return_dict": True}
    if shifted:
        inputs["shift_labels"] = torch.randint(61, (2, 9))
    found, expected = mine(**inputs), forward_with_torch_backend(theirs, **inputs)
    for out in (found, expected):
        (out.log_probs.mean() + 0.1 * out.entropy.mean()).backward()
    # verl's head is fp32 inside.
    torch.testing.assert_close(found.log_probs.float(), expected.log_probs)
    torch.testing.assert_close(found.entropy.float(), expected.entropy.float())
    pairs = zip(mine.parameters(), theirs.parameters(), strict=True)
    for ours_of, theirs_of in pairs:
        torch.testing.assert_close(ours_of.grad.float(), theirs_of.grad.float())


def test_a_soft_cap_of_the_model_counts():
    capped = model("Gemma2", head_dim=8, final_logit_softcapping=3.0)
    ids = torch.randint(61, (2, 9))
    logp = capped(ids).logits.log_softmax(-1)[:, :-1].gather(-1, ids[:, 1:, None])[..., 0]
    found = ours.forward_with_lvrpo_backend(capped, ids, return_dict=True).log_probs
    torch.testing.assert_close(found[:, :-1], logp)


REFUSED = {
    "a reduction": (
        lambda h: ours.linear_cross_entropy(h, h, torch.zeros(3).long(), 1.0, "mean"),
        "reduction is 'mean'",
    ),
    "a process group": (
        lambda h: ours.linear_cross_entropy(h, h, torch.zeros(3).long(), 1.0, "none", object()),
        "dist_process_group is given",
    ),
    "a tuple": (lambda h: ours.forward_with_lvrpo_backend(None, h), "return_dict is None"),
    "no tokens": (
        lambda h: ours.forward_with_lvrpo_backend(None, return_dict=True),
        "input_ids, labels and shift_labels are None",
    ),
    "a scale": (
        lambda h: ours.forward_with_lvrpo_backend(
            model("Granite", logits_scaling=3.0), torch.zeros(1, 3).long(), return_dict=True
        ),
        "logits_scaling is 3.0",
    ),
}


@pytest.mark.parametrize(("call", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_what_a_head_of_verl_has_not_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call(torch.rand(3, 4))


def test_another_release_of_verl_is_refused(monkeypatch):
    monkeypatch.setattr(versions.importlib.metadata, "version", lambda package: "0.10.1")
    with pytest.raises(ImportError, match=r"verl is 0.10.1, lvrpo is tested with >=0.9,<0.10"):
        ours.register()
