"""The packed model against an oracle that computes one sample at a time from the formulas."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest
import torch
from models.bagel import oracle
from models.bagel.shapes import SHAPE
from models.bagel.tiny import CONFIG, builder, tiny_bagel

from lvrpo.models.unified.cache import CachedPass

#: Relative to the largest number of the oracle's.
BOUNDS = {torch.float32: 1e-5, torch.float64: 1e-10}


def assert_near(ours, theirs, name=""):
    error = (ours - theirs).abs().max() / theirs.abs().max()
    assert error < BOUNDS[ours.dtype], f"{name}: {error:.2e} of the largest"


def random_prompt(generator: np.random.Generator) -> list[oracle.Split]:
    """Texts, pictures to read and clean latents in any order, of any size; a text first or not."""
    splits: list[oracle.Split] = []
    for _ in range(generator.integers(1, 5)):
        kind = generator.choice(["text", "read", "clean"])
        if kind == "text":
            splits.append((kind, generator.integers(7, 48, generator.integers(1, 6)).tolist()))
        elif kind == "read":
            rows, columns = generator.integers(1, 5, 2)
            # Pixels are laid out in fp32; of these none is rounded.
            pixels = generator.integers(0, 257, (3, 4 * rows, 4 * columns)) / 256
            splits.append((kind, torch.from_numpy(pixels)))
        else:
            splits.append((kind, random_latents(generator)))
    return splits


def random_latents(generator: np.random.Generator) -> torch.Tensor:
    rows, columns = generator.integers(1, 4, 2)
    return torch.from_numpy(generator.standard_normal((rows, columns, CONFIG.latent_dim)))


def random_groups(seed: int) -> list[tuple[list[oracle.Split], list[oracle.Split]]]:
    """Prompts, and the completions of each: answers and noisy pictures, mixed."""
    generator = np.random.default_rng(seed)
    groups = []
    for _ in range(generator.integers(1, 4)):
        completions: list[oracle.Split] = []
        for _ in range(generator.integers(1, 4)):
            if generator.random() < 0.5:
                ids = generator.integers(7, 48, generator.integers(1, 5)).tolist()
                completions.append(("text", ids))
            else:
                time = float(generator.random())
                completions.append(("noise", random_latents(generator), time))
        groups.append((random_prompt(generator), completions))
    return groups


def add(into, split, parent):
    if split[0] == "text":
        return into.text(split[1], parent)
    if split[0] == "read":
        return into.read(split[1].numpy(), parent)
    height, width, _ = split[1].shape
    if split[0] == "clean":
        return into.clean(split[1].flatten(0, 1), height, width, parent)
    return into.noise(height, width, parent)


def packed(groups, dtype):
    """The whole of `groups` in one buffer, its prompts once; and spans of prompts, completions."""
    into, spans = builder(), []
    latents, times = [], []
    for prompt, completions in groups:
        parent, own = -1, []
        for split in prompt:
            parent = add(into, split, parent)
            own.append(parent)
        children = []
        for completion in completions:
            children.append(add(into, completion, parent))
            if completion[0] == "noise":
                latents.append(completion[1].flatten(0, 1))
                times.append(torch.full((len(latents[-1]),), completion[2], dtype=dtype))
        spans.append((own, children))
    none = torch.zeros(0, CONFIG.latent_dim, dtype=dtype)
    batch = into.build(torch.cat([none, *latents]).to(dtype), torch.cat([none[:, 0], *times]))
    return into, batch, spans


def of_spans(rows, values, into, spans):
    """Values of the rows that are in some spans, in the order of the rows."""
    chosen = torch.zeros(into.rows, dtype=torch.bool)
    for span in spans:
        chosen[into.start(span) : into.end(span)] = True
    return values[chosen[rows]]


def pairs(model, groups, state):
    """(ours, oracle's) logits and velocities of every completion with its prompt."""
    dtype = model.vae2llm.weight.dtype
    into, batch, spans = packed(groups, dtype)
    text, latent = model(batch, backend="torch")
    logits, velocity = model.logits(text), model.velocity(latent)
    for (prompt, completions), (own, children) in zip(groups, spans, strict=True):
        for completion, child in zip(completions, children, strict=True):
            expected = oracle.run(state, SHAPE, [*prompt, completion])
            path = [*own, child]
            yield of_spans(batch.text_rows, logits, into, path), expected[0], "logits"
            found = of_spans(batch.latent_rows, velocity, into, path)
            if len(found):
                yield found, expected[1], "velocity"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("seed", range(12))
def test_groups_equal_the_oracle_sample_by_sample(seed, dtype):
    model = tiny_bagel(dtype, seed)
    for ours, theirs, name in pairs(model, random_groups(seed), model.state_dict()):
        assert ours.shape == theirs.shape
        assert_near(ours, theirs, name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("seed", range(4))
def test_gradients_equal_the_oracles(seed, dtype):
    model = tiny_bagel(dtype, seed)
    state = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    for name, _ in model.named_parameters():
        state[name].requires_grad_()
    ours = theirs = torch.zeros((), dtype=dtype)
    for found, expected, _ in pairs(model, random_groups(seed), state):
        upstream = torch.randn_like(found)
        ours = ours + (found * upstream).sum()
        theirs = theirs + (expected * upstream).sum()
    ours.backward()
    theirs.backward()
    largest = max(x.grad.abs().max() for x in state.values() if x.grad is not None)
    for name, parameter in model.named_parameters():
        expected = state[name].grad
        if parameter.grad is None:
            assert expected is None or not expected.any(), name
            continue
        if expected is None:
            assert not parameter.grad.any(), name
            continue
        # A key's bias moves all scores of a row alike: its true gradient is 0, up to RoPE.
        scale = largest if "k_proj.bias" in name else expected.abs().max()
        if scale:
            assert (parameter.grad - expected).abs().max() < 10 * BOUNDS[dtype] * scale, name


def test_layers_computed_again_give_the_same_gradients():
    def gradients(again):
        model, calls = tiny_bagel(), []
        model.gradient_checkpointing = again
        first = model.language_model["model"].layers[0]
        first.register_forward_pre_hook(lambda *_: calls.append(1))
        found = [x.square().sum() for x, _, _ in pairs(model, groups, model.state_dict())]
        sum(found).backward()
        assert len(calls) == 1 + again
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    groups = random_groups(1)
    kept, again = gradients(False), gradients(True)
    assert kept.keys() == again.keys()
    assert all(torch.equal(gradient, again[name]) for name, gradient in kept.items())


@pytest.mark.parametrize("seed", range(4))
def test_cached_pieces_equal_the_oracle(seed):
    model = tiny_bagel(seed=seed)
    groups = random_groups(seed)
    into, batch, spans = packed(groups, torch.float64)
    prompts = [
        row for own, _ in spans for span in own for row in range(into.start(span), into.end(span))
    ]
    with torch.no_grad():
        cached = CachedPass(model, batch, torch.tensor(prompts), "torch")
        for (prompt, completions), (_, children) in zip(groups, spans, strict=True):
            for completion, child in zip(completions, children, strict=True):
                expected = oracle.run(model.state_dict(), SHAPE, [*prompt, completion])
                first, last = into.start(child), into.end(child)
                if completion[0] == "text":
                    for position, row in enumerate(range(first, last)):
                        hidden, _ = cached.run(*cached.part(torch.tensor([row])))
                        wanted = expected[0][position - (last - first)]
                        assert_near(model.logits(hidden)[0], wanted, "cached logits")
                    continue
                for _ in range(2):  # a second denoising step overwrites the first
                    part, rows = cached.part(torch.arange(first, last))
                    _, hidden = cached.run(part, rows)
                    wanted = expected[1][-len(hidden) :]
                    assert_near(model.velocity(hidden), wanted, "cached velocity")


def test_markers_of_a_drawing_go_through_the_understanding_expert():
    model = tiny_bagel()
    groups = [([("text", [9, 10])], [("noise", torch.randn(2, 2, 8).double(), 0.5)])]
    _, batch, _ = packed(groups, torch.float64)
    velocity = model.velocity(model(batch, backend="torch")[1])
    changed = dataclasses.replace(batch, token_ids=batch.token_ids.clone())
    changed.token_ids[-1] += 1
    assert not torch.equal(velocity, model.velocity(model(changed, backend="torch")[1]))
    assert batch.position_ids.tolist() == [0, 1, 2, 2, 2, 2, 2, 2]


def test_tables_are_saved_and_never_trained():
    model = tiny_bagel()
    names = {"vit_pos_embed.pos_embed", "latent_pos_embed.pos_embed"}
    assert names <= set(model.state_dict())
    assert not names & {name for name, _ in model.named_parameters()}
    for side, table in ((7, model.vit_pos_embed), (5, model.latent_pos_embed)):
        for row, column in itertools.product(range(side), repeat=2):
            expected = oracle.position_row(row, column, 16, torch.float64)
            found = table(torch.tensor([[row, column]]))[0]
            torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(
    ("add", "message"),
    [
        (lambda b: b.noise(6, 1), "6 x 1 patches, the model has positions for 5 x 5"),
        (lambda b: b.read(np.zeros((3, 32, 4))), "8 x 1 patches, the model has positions for 7"),
        (lambda b: b.read(np.zeros((1, 4, 4))), "expected 3 channels"),
        (lambda b: b.read(np.zeros((3, 6, 4))), "multiples of 4"),
        (lambda b: b.clean(torch.zeros(3, 8), 2, 2), r"\(3, 8\), expected \(4, 8\)"),
        (lambda b: b.text([1], b.noise(1, 1)), "nothing can follow"),
    ],
)
def test_what_cannot_be_laid_out_is_refused(add, message):
    with pytest.raises(ValueError, match=message):
        add(builder())


def test_noise_of_another_count_is_refused():
    into = builder()
    into.noise(2, 2, into.clean(torch.zeros(1, 8), 1, 1))
    with pytest.raises(ValueError, match="3 noisy latents with 3 times, expected 4"):
        into.build(torch.zeros(3, 8), torch.zeros(3))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"heads": 3}, "heads is 3, expected a multiple of 2"),
        ({"head_dim": 7}, "head_dim is 7"),
        ({"vision_heads": 5}, "vision_hidden is 12"),
        ({"hidden": 18}, "hidden is 18"),
        ({"layers": 0}, "layers is 0"),
    ],
)
def test_bad_shape(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CONFIG, **change)
