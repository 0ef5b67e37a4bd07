"""One preset for every form of a loss or an estimator: a new preset joins the tests by itself."""

from __future__ import annotations

from lvrpo.params.advantages import ADVANTAGE_PRESETS, AdvantageParams
from lvrpo.params.policy_loss import LOSS_PRESETS, LossParams


def loss_preset(name: str, **changes: object) -> LossParams:
    """With the length that a preset may need."""
    needs_length = LOSS_PRESETS[name].get("aggregation") == "seq_mean_token_sum_norm"
    return LossParams.preset(name, **({"max_length": 64} if needs_length else {}) | changes)


def _loss_forms() -> dict[str, LossParams]:
    first: dict[tuple[str, str], str] = {}
    for name in LOSS_PRESETS:
        params = loss_preset(name)
        first.setdefault((params.ratio, params.surrogate), name)
    return {name: loss_preset(name) for name in first.values()}


def _advantage_forms() -> list[str]:
    seen: set[tuple[str, str]] = set()
    names = []
    for name in ADVANTAGE_PRESETS:
        choices = set(AdvantageParams.preset(name).choices().items())
        if not choices <= seen:
            names.append(name)
        seen |= choices
    return names


#: Those that differ in what is compiled for a token.
LOSS_FORMS = _loss_forms()
#: Every baseline, scale and whitening at least once.
ADVANTAGE_FORMS = _advantage_forms()
