"""From the rows of a step to what each rank needs for it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lvrpo.models.transformer import Parameters, Transformer
from lvrpo.planning import flops, memory, wire
from lvrpo.planning.memory import Numerics
from lvrpo.planning.rows import Rows


@dataclass(frozen=True)
class Sampled:
    """What is sampled at once: one layout whose prompts are computed first.

    Attributes:
        layout: all rows, the completions at their longest.
        prompts: of these, the prompts.
        samples: texts or pictures.
        passes: of the model after the prompts: positions of a text, or denoising steps.
    """

    layout: Rows
    prompts: Rows
    samples: int
    passes: int

    @property
    def completions(self) -> Rows:
        """Rows of the completions."""
        return self.layout - self.prompts


@dataclass(frozen=True)
class Work:
    """What a rank does in one step of the policy phase.

    Attributes:
        texts: the answers of a rollout.
        pictures: the drawings of a rollout.
        picture: latent tokens of one, and numbers of each.
        trained: denoising steps that are trained.
        buffers: packed buffers of one pass over the rollout, minibatch by minibatch.
        minibatches: updates of a pass.
        passes: over the rollout.
        reference: whether a KL asks for a pass of the frozen reference.
        separate: rows of `buffers` if every completion had a prompt of its own; None: not asked.
    """

    texts: Sampled
    pictures: Sampled
    picture: tuple[int, int]
    trained: int
    buffers: Sequence[Rows] = ()
    minibatches: int = 1
    passes: int = 1
    reference: bool = True
    separate: Rows | None = None

    @property
    def updated(self) -> Rows:
        """Rows of one pass over the rollout."""
        return sum(self.buffers, Rows())


@dataclass(frozen=True)
class Plan:
    """A model, how it is computed, and by how many ranks."""

    model: Transformer
    parameters: Parameters
    numerics: Numerics
    ranks: int = 1
    on_gpu: bool = False

    def state(self, work: Work) -> dict[str, int]:
        """Bytes of a rank by what they hold, for the whole policy phase."""
        kept = work.minibatches * work.passes > 1
        return memory.state(self.parameters, self.numerics, self.ranks, kept=kept)

    def rollout(self, work: Work) -> dict[str, int]:
        """Bytes that sampling adds; gradients and the kept step are not there then."""
        pictures = work.pictures
        tokens, latent = work.picture
        each = [
            {
                "keys and values": memory.cache(self.model, sampled.layout, self.numerics),
                "working set": max(
                    memory.working(self.model, rows, self.numerics)
                    for rows in (sampled.prompts, Rows(latents=sampled.completions.latents))
                ),
            }
            for sampled in (work.texts, pictures)
        ]
        each[0]["keys and values"] *= 2  # answers that outgrow their layout are copied to another
        each[0]["logits"] = memory.sampling(self.model, work.texts.samples, self.numerics)
        drawn = self.model, pictures.samples, tokens, latent
        each[1]["trajectories"] = memory.trajectory(*drawn, work.trained)
        each[1]["noise"] = memory.noise(*drawn, pictures.passes)
        return max(each, key=lambda parts: sum(parts.values()))

    def update(self, rows: Rows, *, reference: bool) -> dict[str, int]:
        """Bytes that the update of one packed buffer adds."""
        found = {"activations": memory.saved(self.model, rows, self.numerics)}
        found |= memory.head(self.model, rows, self.numerics, on_gpu=self.on_gpu)
        logits = found.pop("logits") + found.pop("head")
        passing = [logits, memory.unsaved(self.model, rows, self.numerics)]
        if reference:
            passing.append(memory.working(self.model, rows, self.numerics))
        if self.numerics.checkpointing:
            passing.append(memory.saved_again(self.model, rows, self.numerics))
        return found | {"working set": max(passing)}

    def peak_of_update(self, work: Work) -> int:
        """Bytes of a rank at the largest moment of an update.

        That is the end of a forward pass, when no gradient is there yet unless another buffer has
        left one, or the end of the last backward pass.
        """
        tokens, latent = work.picture
        pictures = work.pictures
        experience = memory.trajectory(self.model, pictures.samples, tokens, latent, work.trained)
        state = self.state(work)
        there = sum(state.values()) + experience
        added = max(
            (sum(self.update(rows, reference=work.reference).values()) for rows in work.buffers),
            default=0,
        )
        alone = len(work.buffers) <= work.minibatches
        return max(there, there - (state["gradients"] if alone else 0) + added)

    def peak_of_rollout(self, work: Work) -> int:
        """Bytes of a rank at the largest moment of a rollout."""
        state = self.state(work)
        there = sum(state.values()) - state["gradients"] - state["kept step"]
        return there + sum(self.rollout(work).values())

    def peak_of_warm_start(self, rows: Rows) -> int:
        """Bytes at the largest moment of a supervised step, whose one buffer has these rows.

        What stays is as in the policy phase, a running average in place of the reference.
        """
        state = memory.state(self.parameters, self.numerics, self.ranks, kept=False)
        there = sum(state.values())
        added = sum(self.update(rows, reference=False).values())
        return max(there, there - state["gradients"] + added) if rows.total else 0

    def flops(self, work: Work) -> dict[str, int]:
        """Operations of a rank in one step."""
        found = {"rollout": self._rollout_flops(work)}
        options = {"reference": work.reference, "checkpointing": self.numerics.checkpointing}
        found["update"] = work.passes * flops.update(self.model, work.updated, **options)
        if work.separate is not None:
            separate = flops.update(self.model, work.separate, **options)
            found["update, separate prompts"] = work.passes * separate
        return found

    def _rollout_flops(self, work: Work) -> int:
        texts, pictures = work.texts, work.pictures
        drawn = pictures.prompts + pictures.completions * pictures.passes
        body = sum(
            flops.forward(self.model, dataclasses.replace(rows, predictors=0))
            for rows in (texts.layout, drawn)
        )
        of_head = 2 * texts.layout.tokens * self.model.language.hidden * self.model.vocab
        return body + of_head

    def wire(self, work: Work) -> dict[str, int]:
        """Bytes that a rank receives in one step."""
        passes = sum(
            1 + sampled.passes for sampled in (work.texts, work.pictures) if sampled.samples
        )
        return {
            "rollout": passes * wire.gather(self.parameters, self.numerics, self.ranks),
            "update": work.passes
            * wire.update(
                self.parameters,
                self.numerics,
                self.ranks,
                buffers=len(work.buffers),
                reference=work.reference,
            ),
        }

    def seconds(self, work: Work, rate: float, bandwidth: float) -> dict[str, dict[str, float]]:
        """Seconds of a step at so many operations and bytes a second, each by itself."""
        of_flops, of_wire = self.flops(work), self.wire(work)
        return {
            "flops": {name: count / rate for name, count in of_flops.items()},
            "wire": {name: count / bandwidth for name, count in of_wire.items()},
        }

    def to_dict(self, work: Work) -> dict[str, Any]:
        """All of it: bytes, operations, rows."""
        largest = max(work.buffers, key=lambda rows: rows.total, default=Rows())
        state = self.state(work)
        other = dataclasses.replace(self.numerics, checkpointing=not self.numerics.checkpointing)
        activations = {
            now.checkpointing: memory.saved(self.model, largest, now)
            for now in (self.numerics, other)
        }
        return {
            "parameters": dataclasses.asdict(self.parameters),
            "ranks": self.ranks,
            "rows": {
                "rollout": (work.texts.layout + work.pictures.layout).total,
                "buffers": len(work.buffers),
                "largest buffer": largest.total,
                "pass": work.updated.total,
                "pass, separate prompts": None if work.separate is None else work.separate.total,
            },
            "state": state,
            "rollout": self.rollout(work),
            "update": self.update(largest, reference=work.reference),
            "activations": {
                "kept": activations[False],
                "checkpointed": activations[True],
            },
            "logits": {
                "in chunks": memory.head(self.model, largest, self.numerics, on_gpu=self.on_gpu)[
                    "logits"
                ],
                "plain torch": memory.plain_logits(self.model, largest, self.numerics),
            },
            "peak": {"rollout": self.peak_of_rollout(work), "update": self.peak_of_update(work)},
            "flops": self.flops(work),
            "wire": self.wire(work),
        }
