"""Mistakes in the policy of transformers: the test that is named for each notices it."""

from __future__ import annotations

import pytest
from integrations import test_huggingface_policy as policies
from mistakes import Mistake

from lvrpo.models.huggingface import decoding, prompts
from lvrpo.models.huggingface.decoding import Decoding
from lvrpo.models.huggingface.layout import PromptBuilder
from lvrpo.models.huggingface.policy import HuggingFacePolicy
from lvrpo.models.huggingface.prompts import PromptReader

ALONE = policies.test_log_probs_and_gradients_are_those_of_separate_sequences
REPLAYED, GREEDY = (
    policies.test_the_update_replays_the_rollout,
    (policies.test_greedy_answers_are_those_of_generate),
)
LLAMA = {"name": "llama", "max_rows": 1 << 20}

MISTAKES = {
    "an answer's first token is of the token before": Mistake(
        Decoding.__init__, "ends - 1", "ends - 2", GREEDY, {"name": "llama"}
    ),
    "answers are read a position late": Mistake(
        Decoding.append,
        "self._position_ids[:, self.cache.rows]",
        "self._position_ids[:, self.cache.rows] + 1",
        REPLAYED,
        {"name": "llama"},
    ),
    "a picture's token that is sampled is read": Mistake(
        Decoding.append,
        "ids.masked_fill(torch.isin(ids, self._placeholders), self._instead)",
        "ids",
        policies.test_a_sampled_picture_token_is_no_picture,
    ),
    "a picture's token that is sampled is trained on": Mistake(
        PromptBuilder.text,
        "self.instead if token in self.placeholders else token",
        "8 if token in self.placeholders else token",
        policies.test_a_sampled_picture_token_is_no_picture,
    ),
    "logits are not capped in the rollout": Mistake(
        decoding.logits_of,
        "states.softcap * torch.tanh(logits / states.softcap)",
        "logits",
        REPLAYED,
        {"name": "gemma2"},
    ),
    "logits are not capped in the update": Mistake(
        HuggingFacePolicy.forward,
        "states.logit_scale, states.softcap",
        "states.logit_scale, None",
        ALONE,
        LLAMA | {"name": "gemma2"},
    ),
    "an answer goes on from its row": Mistake(
        PromptBuilder.text,
        "torch.arange(first, first + count)",
        "torch.arange(self.rows, self.rows + count)",
        ALONE,
        LLAMA,
    ),
    "an answer goes on from the number of tokens, not from the picture's positions": Mistake(
        PromptReader._positions,
        "int(positions[0, 0, count])",
        "count",
        ALONE,
        LLAMA | {"name": "qwen2_5_vl"},
    ),
    "a picture is causal": Mistake(
        PromptBuilder.prompt,
        "types, parent, mode,",
        'types, parent, "causal",',
        ALONE,
        LLAMA | {"name": "gemma3"},
    ),
    "pixels are cut off and not rounded": Mistake(
        prompts.as_image,
        "np.round(picture * 255)",
        "(picture * 255)",
        ALONE,
        LLAMA | {"name": "llava"},
    ),
    "a new layout forgets where prompts are": Mistake(
        Decoding._lay_out,
        "self._prompt_starts[number] = builder.rows",
        "pass",
        policies.test_answers_do_not_depend_on_the_batch_or_its_blocks,
        {"name": "llama"},
    ),
    "a new layout has the answers in the places of others": Mistake(
        Decoding._lay_out,
        "keep(int(self._starts[answer]), self._position)",
        "keep(int(self._starts[active[0]]), self._position)",
        policies.test_answers_do_not_depend_on_the_batch_or_its_blocks,
        {"name": "llama"},
    ),
    "special tokens stand in the text": Mistake(
        HuggingFacePolicy.decode_answer,
        "skip_special_tokens=True",
        "skip_special_tokens=False",
        policies.test_answers_end_as_generate_ends_them,
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_noticed(mistake, monkeypatch):
    if "monkeypatch" in mistake.test.__code__.co_varnames:
        mistake = mistake._replace(arguments=mistake.arguments | {"monkeypatch": monkeypatch})
    assert mistake.is_noticed()
