"""Mistakes in how tokens are drawn and answers end: the test that is named for each notices it."""

from __future__ import annotations

import pytest
from mistakes import Mistake
from models import test_answer_sampler as answers
from models import test_drawn_tokens as tokens

from lvrpo.models.answer_sampler import AnswerSampler
from lvrpo.models.sampling import (
    draw_tokens,
    penalize_repetition,
    process_logits,
    truncate_logits,
)

FREQUENCIES = tokens.test_frequencies_are_probabilities
TOLD = tokens.test_what_was_sampled_from_is_told
ENDS, BATCH = answers.test_what_ends_an_answer, answers.test_a_batch_is_its_answers_one_by_one
ALL_ON = {
    "temperature": 0.3,
    "top_k": 7,
    "top_p": 0.9,
    "min_p": 0.03,
    "repetition_penalty": 1.8,
}
OFF = {"temperature": 0.8, "top_k": 0, "top_p": 1.0, "repetition_penalty": 1.0}
OFF |= {"min_tokens": 0, "stop_token_ids": (), "logit_processors": ()}


def answer(text: str, options: dict, found: str, ids: str, reason: str) -> dict:
    return {"text": text, "options": options, "answer": found, "tokens": ids, "reason": reason}


MISTAKES = {
    "the temperature multiplies": Mistake(
        draw_tokens,
        "plain = logits[:, low:high].double() / temperature",
        "plain = logits[:, low:high].double() * temperature",
        FREQUENCIES,
        {"chosen": {}, "temperature": 0.5},
    ),
    "a token of probability 0 can be drawn": Mistake(
        draw_tokens,
        "right=True",
        "right=False",
        tokens.test_a_token_that_is_left_out_is_never_drawn,
        {"seed": 0, "chosen": ALL_ON | {"top_k": 1}},
    ),
    "ids are counted from the range": Mistake(
        draw_tokens,
        "ids, are_possible = at.squeeze(1) + low,",
        "ids, are_possible = at.squeeze(1),",
        tokens.test_tokens_outside_the_range_do_not_count,
        {"seed": 0, "low": 3, "width": 5, "chosen": ALL_ON},
    ),
    "greedy takes the last of equal ones": Mistake(
        draw_tokens,
        "scores.argmax(dim=-1) + low",
        "high - 1 - scores.flip(1).argmax(dim=-1)",
        tokens.test_greedy_is_the_first_of_the_likeliest,
        {"seed": 3, "chosen": ALL_ON, "ties": True},
    ),
    "the log-prob is the policy's": Mistake(
        draw_tokens,
        "kept.log_softmax(dim=-1)",
        "plain.log_softmax(dim=-1)",
        TOLD,
        {"seed": 0, "chosen": ALL_ON},
    ),
    "the kept mass is of the changed distribution": Mistake(
        draw_tokens,
        "before.where(kept > -math.inf, 0.0)",
        "probs.where(kept > -math.inf, 0.0)",
        TOLD,
        {"seed": 0, "chosen": ALL_ON},
    ),
    "only what is left out differs": Mistake(
        draw_tokens,
        "(kept != plain).any(dim=-1)",
        "(kept == -math.inf).any(dim=-1)",
        TOLD,
        {
            "seed": 0,
            "chosen": ALL_ON | {"top_k": 0, "top_p": 1.0, "min_p": 0.0},
        },
    ),
    "the prompt is not penalized": Mistake(
        process_logits,
        "torch.cat([prompts, generated], dim=1)",
        "generated",
        FREQUENCIES,
        {"chosen": {"repetition_penalty": 2.0}, "temperature": 1.0},
    ),
    "a negative logit is divided": Mistake(
        penalize_repetition,
        "torch.where(seen < 0, seen * penalty, seen / penalty)",
        "seen / penalty",
        tokens.test_a_token_that_stands_twice_is_penalized_once,
    ),
    "a token is penalized each time it stands": Mistake(
        penalize_repetition,
        "scores.scatter(1, ids, torch.where(seen < 0, seen * penalty, seen / penalty))",
        "scores.scatter_add(1, ids, torch.where(seen < 0, seen * penalty, seen / penalty) - seen)",
        tokens.test_a_token_that_stands_twice_is_penalized_once,
    ),
    "top-k leaves out what is as likely as the last": Mistake(
        truncate_logits,
        "scores < last",
        "scores <= last",
        tokens.test_top_k_keeps_what_is_as_likely_as_the_last,
        {"seed": 0, "k": 4},
    ),
    "top-p leaves out the token that reaches it": Mistake(
        truncate_logits,
        "before = probs.cumsum(dim=-1) - probs",
        "before = probs.cumsum(dim=-1)",
        tokens.test_top_p_keeps_no_token_too_many,
        {"seed": 0, "top_p": 0.9},
    ),
    "min-p is of the whole": Mistake(
        truncate_logits,
        "probs.amax(dim=-1, keepdim=True)",
        "probs.sum(dim=-1, keepdim=True)",
        FREQUENCIES,
        {"chosen": {"min_p": 0.1}, "temperature": 1.0},
    ),
    "min-p keeps nothing": Mistake(
        truncate_logits,
        "probs < least",
        "probs <= least",
        tokens.test_what_is_kept_is_nested,
        {"seed": 0, "ties": False, "low": 30, "more": 30},
    ),
    "the end stands in the text": Mistake(
        AnswerSampler._ends,
        "self.decode(ids[:-1])",
        "self.decode([token or 1 for token in ids])",
        ENDS,
        answer("abc_", {}, "abc", "abc_", "end"),
    ),
    "a stop token is an end": Mistake(
        AnswerSampler._ends,
        '"end" if token in self.end_ids else "stop"',
        '"end"',
        ENDS,
        answer("abcde_", {"stop_token_ids": (3,)}, "ab", "abc", "stop"),
    ),
    "a stop string may be among the first tokens": Mistake(
        AnswerSampler._before_stop,
        "max(0, early - len(stop) + 1)",
        "0",
        ENDS,
        answer("abac_", {"stop": ("a",), "min_tokens": 1}, "ab", "aba", "stop"),
    ),
    "the last stop string cuts": Mistake(
        AnswerSampler._before_stop,
        "min(at for at in found if at >= 0)",
        "max(found)",
        ENDS,
        answer("abcde_", {"stop": ("xyz", "d", "cd")}, "ab", "abcd", "stop"),
    ),
    "an answer may end a token early": Mistake(
        AnswerSampler.draw,
        "position < sampling.min_tokens",
        "position + 1 < sampling.min_tokens",
        BATCH,
        {"seed": 5, "chosen": OFF | {"min_tokens": 2, "temperature": 1.5}},
    ),
    "every token has the first one's number": Mistake(
        AnswerSampler.draw,
        "self._uniform[at, position]",
        "self._uniform[at, 0]",
        BATCH,
        {"seed": 0, "chosen": OFF},
    ),
    "numbers go by the place in the batch": Mistake(
        AnswerSampler.draw,
        "self._uniform[at, position]",
        "self._uniform[: len(at), position]",
        BATCH,
        {"seed": 1, "chosen": OFF},
    ),
    "answers so far stay with the samples that ended": Mistake(
        AnswerSampler.draw,
        "torch.cat([self._generated, drawn.ids[:, None]], dim=1)[there]",
        "torch.cat([self._generated, drawn.ids[:, None]], dim=1)[: len(there)]",
        BATCH,
        {"seed": 1, "chosen": OFF | {"repetition_penalty": 1.7}},
    ),
    "log-probs stand in the order they were drawn": Mistake(
        AnswerSampler.answers,
        "torch.cat(self._places).argsort()",
        "torch.arange(len(torch.cat(self._places)))",
        BATCH,
        {"seed": 0, "chosen": OFF},
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_noticed(mistake):
    assert mistake.is_noticed()
