"""Which tokens a reply consists of, and when that is uncertain."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from helpers.tokens import letters, sentencepiece

from specdec import SamplingParams
from specdec.conformance.served.dialects import Question, Reply
from specdec.conformance.served.tokens import TokenRecovery, UnclearTokensError
from specdec.servers.errors import EngineError

TOKENIZER = letters(61)
END = TOKENIZER.eos_token_id
RECOVERY = TokenRecovery(TOKENIZER, 61, {END})
QUESTION = Question("model", (3, 4), "ab", 5, 4, SamplingParams(), (END,))


def ids(text: str) -> tuple[int, ...]:
    return tuple(TOKENIZER(text, add_special_tokens=False).input_ids)


def recovered(**reply: Any) -> tuple[int, ...]:
    return RECOVERY.tokens(QUESTION, replace(Reply(None, None, "length"), **reply))


def test_ids_are_taken_as_they_are() -> None:
    assert recovered(token_ids=(3, 4, 5, 6), text="abcd") == (3, 4, 5, 6)
    assert recovered(token_ids=(3, 4, 5, 6)) == (3, 4, 5, 6)  # without a text to compare with


def test_ids_that_are_not_canonical_are_taken_too() -> None:
    pair = ids("an")
    assert len(pair) == 1
    assert recovered(token_ids=(*ids("a"), *ids("n"), 5, 6), text="ancd") == (*ids("a"), *ids("n"), 5, 6)


def test_a_stop_token_may_be_left_out_of_ids_and_of_the_text() -> None:
    for text in ("abc", "abc</s>"):
        assert recovered(token_ids=(3, 4, 5, END), text=text, finish_reason="stop") == (3, 4, 5, END)
        assert recovered(token_ids=(3, 4, 5), text=text[:3], finish_reason="stop") == (3, 4, 5, END)
    assert recovered(token_ids=(3, 4, 5), finish_reason="stop", num_tokens=4) == (3, 4, 5, END)
    assert recovered(text="abc", finish_reason="stop", num_tokens=4) == (3, 4, 5, END)
    assert recovered(text="", finish_reason="stop", num_tokens=1) == (END,)


def test_which_of_several_stop_tokens_ended_it_must_be_known() -> None:
    several = replace(RECOVERY, stop_token_ids={END, 7})
    reply = Reply((3, 4), None, "stop")
    assert several.tokens(QUESTION, replace(reply, stop_token=7)) == (3, 4, 7)
    for stop in (None, 8):
        with pytest.raises(EngineError, match=r"must stop at one of the target's stop tokens, \[2, 7\]"):
            several.tokens(QUESTION, replace(reply, stop_token=stop))


def test_a_text_is_encoded_if_it_comes_back() -> None:
    assert recovered(text="abcd") == (3, 4, 5, 6)
    with pytest.raises(UnclearTokensError, match="encodes to tokens of another text"):
        recovered(text="ab?d")
    with pytest.raises(UnclearTokensError, match="ended one after 3 of 4"):
        recovered(text="ancd", num_tokens=4)
    with pytest.raises(UnclearTokensError, match="but sent 5 tokens"):
        recovered(text="abcde", num_tokens=4)


def test_a_text_that_ends_within_a_character_agrees_with_its_ids() -> None:
    tokenizer = sentencepiece()
    recovery = TokenRecovery(tokenizer, len(tokenizer), {tokenizer.eos_token_id})
    tokens = tuple(tokenizer("é", add_special_tokens=False).input_ids)
    question = replace(QUESTION, prompt=tuple(tokenizer("so").input_ids), max_tokens=len(tokens) - 1)
    for text in ("", " ", "\ufffd", " \ufffd"):
        assert recovery.tokens(question, Reply(tokens[:-1], text, "length")) == tokens[:-1]


def test_a_space_at_the_start_may_be_dropped_or_kept() -> None:
    tokenizer = sentencepiece()
    recovery = TokenRecovery(tokenizer, len(tokenizer), {tokenizer.eos_token_id})
    tokens = tuple(tokenizer("so", add_special_tokens=False).input_ids)
    question = replace(QUESTION, prompt=tokens, max_tokens=len(tokens))
    for text in ("so", " so"):
        assert recovery.tokens(question, Reply(tokens, text, "length")) == tokens
    with pytest.raises(UnclearTokensError, match="the token ids are decoded to"):
        recovery.tokens(question, Reply(tokens, "os", "length"))


@pytest.mark.parametrize(
    ("reply", "error", "message"),
    [
        ({"token_ids": (3, 61, 5, 6)}, EngineError, "must be below 61, the target's vocabulary, but .* 61"),
        ({"token_ids": (3, 4, 5)}, EngineError, "must not truncate completions, but ended one after 3 of 4"),
        ({"token_ids": (3, 4, 5, 6, 7)}, EngineError, "must stop at max_tokens=4, but sent 5"),
        ({"token_ids": (3, 4, 5, 6), "num_tokens": 5}, UnclearTokensError, "has 4 tokens, but the server counts 5"),
        ({"token_ids": (3, 4, 5, 6), "text": "abce"}, UnclearTokensError, "are decoded to 'abcd', but the text is"),
        ({"token_ids": (3, 4, 5, 6), "num_prompt_tokens": 3}, EngineError, "as 2 tokens, but read 3"),
        ({}, EngineError, "must reply with token ids or a text"),
    ],
)
def test_other_replies_are_errors(reply: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        recovered(**reply)
