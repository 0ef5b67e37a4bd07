"""The tables of docs/scaling.md: three sizes of a model on three numbers of GPUs."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence

from lvrpo.planning import memory, wire
from lvrpo.planning.forecast import Plan, Sampled, Work
from lvrpo.planning.memory import Numerics
from lvrpo.planning.rows import Group, Rows
from lvrpo.runs.bagel_family import preset_model
from lvrpo.runs.plan_view import amount

MODELS = ("bagel-1.5b", "bagel-7b", "bagel-72b")
RANKS = (8, 64, 1024)
#: Of one GPU: memory in bytes, FLOPs a second that training reaches, bytes a second from others.
MEMORY, RATE, BANDWIDTH = 80e9, 400e12, 50e9
#: As a configuration has it.
MAX_ROWS = 16384
DENOISE_STEPS, TRAINED_STEPS = 10, 3
#: 448 x 448 pixels to be read; 512 x 512 to be drawn, in 16 x 16 of them each.
QUESTION = Group(text=64, patches=32 * 32, completions=8, tokens=256)
DRAWING = Group(text=64, patches=0, completions=8, latents=32 * 32)


def tables() -> str:
    """What a step takes of every GPU, in Markdown.

    Every GPU has one group of either skill, so that a step grows with their number.
    """
    numerics = Numerics(compute=2, fused_norms=True, checkpointing=True)
    models = {name: preset_model(name) for name in MODELS}
    plans = [
        Plan(*model, numerics, ranks, on_gpu=True) for model in models.values() for ranks in RANKS
    ]
    names = [(name, f"{ranks:,}") for name in MODELS for ranks in RANKS]
    each = [plan for plan in plans if plan.ranks == RANKS[0]]
    return "\n\n".join(
        [
            _table(("model", *_OF_MODEL), zip(MODELS, map(_of_model, each), strict=True)),
            _table(("model", "GPUs", *_BYTES), zip(names, map(_bytes, plans), strict=True)),
            _table(("model", "GPUs", *_TIMES), zip(names, map(_times, plans), strict=True)),
        ]
    )


def step() -> Work:
    """What a GPU does in a step: a group of answers and one of drawings."""
    texts, pictures = QUESTION.rows(), DRAWING.rows()
    no_text = dataclasses.replace(QUESTION, completions=1, tokens=1).rows()
    no_picture = dataclasses.replace(DRAWING, completions=1, latents=0, tokens=1).rows()
    trained = dataclasses.replace(DRAWING, completions=DRAWING.completions * TRAINED_STEPS)
    separate = QUESTION.rows(share_prompts=False) + trained.rows(share_prompts=False)
    return Work(
        texts=Sampled(texts, no_text, QUESTION.completions, QUESTION.tokens - 1),
        pictures=Sampled(pictures, no_picture, DRAWING.completions, DENOISE_STEPS),
        picture=(DRAWING.latents, 64),
        trained=TRAINED_STEPS,
        buffers=[texts, *_divided(trained)],
        separate=separate,
    )


def _divided(group: Group) -> list[Rows]:
    """The buffers of a group of pictures that one buffer does not hold."""
    most = (MAX_ROWS - group.text) // group.latents
    starts = range(0, group.completions, most)
    counts = [min(most, group.completions - start) for start in starts]
    return [dataclasses.replace(group, completions=count).rows() for count in counts]


_OF_MODEL = (
    "parameters",
    "whole copy in bf16",
    "activations",
    "checkpointed",
    "logits, in chunks",
    "plain torch",
    "update",
    "with separate prompts",
)


def _of_model(plan: Plan) -> list[str]:
    work = step()
    activations, flops = plan.to_dict(work)["activations"], plan.flops(work)
    answers = work.buffers[0]
    plain = memory.plain_logits(plan.model, answers, plan.numerics)
    chunk = memory.head(plan.model, answers, plan.numerics, on_gpu=True)["logits"]
    return [
        amount(plan.parameters.total),
        amount(plan.numerics.compute * plan.parameters.total, "B"),
        amount(activations["kept"], "B"),
        amount(activations["checkpointed"], "B"),
        amount(chunk, "B"),
        amount(plain, "B"),
        amount(flops["update"], "FLOP"),
        amount(flops["update, separate prompts"], "FLOP"),
    ]


_BYTES = (
    "weights, gradients",
    "AdamW",
    "reference",
    "gathered",
    "update",
    "rollout",
    "fits 80 GB",
)


def _bytes(plan: Plan) -> list[str]:
    work = step()
    state = plan.state(work)
    update, rollout = plan.peak_of_update(work), plan.peak_of_rollout(work)
    sizes = (
        state["weights"] + state["gradients"],
        state["optimizer"],
        state["reference"],
        state["gathered"],
        update,
        rollout,
    )
    return [
        *(amount(size, "B") for size in sizes),
        "yes" if max(update, rollout) < MEMORY else "no",
    ]


_TIMES = (
    "update received",
    "rollout received",
    "all weights once",
    "update computes",
    "update receives",
    "rollout computes",
    "rollout receives",
    "all weights once",
)


def _times(plan: Plan) -> list[str]:
    work = step()
    seconds = plan.seconds(work, RATE, BANDWIDTH)
    whole = wire.gather(plan.parameters, plan.numerics, plan.ranks)
    received = plan.wire(work)
    return [
        amount(received["update"], "B"),
        amount(received["rollout"], "B"),
        amount(whole, "B"),
        *(
            f"{each:.3g} s"
            for each in (
                seconds["flops"]["update"],
                seconds["wire"]["update"],
                seconds["flops"]["rollout"],
                seconds["wire"]["rollout"],
                whole / BANDWIDTH,
            )
        ),
    ]


def _table(
    header: Sequence[str], rows: Iterable[tuple[str | tuple[str, ...], Sequence[str]]]
) -> str:
    lines = [list(header), ["---"] * len(header)]
    for name, cells in rows:
        lines.append([*([name] if isinstance(name, str) else name), *cells])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
