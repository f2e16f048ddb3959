"""How one request is sampled: its parameters, checked."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import Any

CONSTRAINTS = ("json_schema", "regex", "grammar")
_MAX_SHOWN = 80  # characters of a wrong value


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How one request is sampled. Defaults follow vLLM: temperature 1, no truncation, no penalty.

    temperature: float >= 0; 0 is greedy decoding (the argmax; the lowest id wins a tie).
    top_k: keep the k largest logits, ties with the k-th included; 0 keeps all.
    top_p: keep the fewest largest probabilities whose sum reaches top_p, in (0, 1], ties with the last included.
    min_p: drop tokens less probable than min_p times the most probable one, in [0, 1].
    presence_penalty, frequency_penalty: subtracted from the logits of emitted tokens, once or per occurrence.
    repetition_penalty: > 0; logits of prompt and emitted tokens are divided (positive) or multiplied (negative).
    logit_bias: token id -> float added to its logit; -inf forbids the token.
    max_tokens: tokens to emit at the most, the stop token included.
    min_tokens: tokens to emit at the least: until then stop tokens are forbidden and stop strings are passed over.
    stop_token_ids: token ids that end the request; the stop token is emitted.
    stop: texts that end the request, with the token that completes one of them, wherever tokens begin and end.
    include_stop_str_in_output: whether the text keeps the stop string; else it ends before it.
    bad_words: texts that the output must not have: tokens that would complete one of them are forbidden.
    ignore_eos: do not end at the model's own end-of-sequence tokens.
    seed: selects the request's random stream, 0 <= seed < 2**64. Requests with equal seeds share uniforms.
    n: how many samples of a prompt; each is a completion of its own, by a seed of its own, and the first is what n=1
    gives. The target reads the prompt once.
    logprobs: also return the log-probability of each emitted token under the target's unprocessed logits.
    top_logprobs: with logprobs, also those of so many likeliest tokens in each place.
    json_schema, regex, grammar: what the text before the stop token is to be, at most one of them: JSON of a schema,
    given as a mapping or as JSON; a text that a regular expression matches as a whole; a text of a grammar in Lark's or
    GBNF's notation. They are read by the package llguidance, which documents what they may have.

    The order is: logit bias, repetition, frequency and presence penalties, what constraint, bad_words and min_tokens
    allow, temperature, top-k, top-p, min-p.
    Raises ValueError naming the field, its value and the rule.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    max_tokens: int = 128
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    seed: int = 0
    logprobs: bool = False
    n: int = 1
    top_logprobs: int = 0
    json_schema: str | Mapping[str, Any] | None = None
    regex: str | None = None
    grammar: str | None = None
    stop: tuple[str, ...] = ()
    include_stop_str_in_output: bool = False
    min_tokens: int = 0
    bad_words: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        def require(name: str, holds: bool, rule: str) -> None:
            if not holds:
                shown = repr(getattr(self, name))
                raise ValueError(
                    f"{name}={shown if len(shown) <= _MAX_SHOWN else shown[:_MAX_SHOWN] + '...'} must be {rule}"
                )

        def number(name: str, holds: Any, rule: str) -> None:
            value = getattr(self, name)
            is_number = isinstance(value, Real) and not isinstance(value, bool)
            require(name, is_number and math.isfinite(value) and holds(value), rule)
            object.__setattr__(self, name, float(value))

        def integer(name: str, holds: Any, rule: str) -> None:
            value = getattr(self, name)
            require(name, _is_integer(value) and holds(value), rule)
            object.__setattr__(self, name, int(value))

        number("temperature", lambda value: value >= 0, "finite and >= 0; 0 is greedy")
        number("top_p", lambda value: 0 < value <= 1, "in (0, 1]; 1 keeps all tokens")
        number("min_p", lambda value: 0 <= value <= 1, "in [0, 1]; 0 keeps all tokens")
        number("presence_penalty", lambda value: True, "finite; 0 is off")
        number("frequency_penalty", lambda value: True, "finite; 0 is off")
        number("repetition_penalty", lambda value: value > 0, "finite and > 0; 1 is off")
        integer("top_k", lambda value: value >= 0, "an integer >= 0; 0 keeps all tokens")
        integer("max_tokens", lambda value: value >= 1, "an integer >= 1")
        integer(
            "min_tokens",
            lambda value: 0 <= value <= self.max_tokens,
            f"an integer from 0 to max_tokens={self.max_tokens}",
        )
        integer("seed", lambda value: 0 <= value < 2**64, "an integer in [0, 2**64)")
        integer("n", lambda value: value >= 1, "an integer >= 1")
        integer("top_logprobs", lambda value: value >= 0, "an integer >= 0")
        for name in ("ignore_eos", "logprobs", "include_stop_str_in_output"):
            require(name, isinstance(getattr(self, name), bool), "True or False")
        require("top_logprobs", self.logprobs or not self.top_logprobs, "0 without logprobs; set logprobs=True")
        require("logit_bias", _is_bias(self.logit_bias), "a mapping of token ids >= 0 to floats below +inf")
        object.__setattr__(self, "logit_bias", {int(token): float(bias) for token, bias in self.logit_bias.items()})
        rule = "a list or tuple of token ids >= 0, such as (2,)"
        require("stop_token_ids", _is_sequence(self.stop_token_ids), rule)
        require("stop_token_ids", all(_is_integer(token) and token >= 0 for token in self.stop_token_ids), rule)
        object.__setattr__(self, "stop_token_ids", tuple(map(int, self.stop_token_ids)))
        for name in ("stop", "bad_words"):
            texts = getattr(self, name)
            texts = (texts,) if isinstance(texts, str) else texts
            is_right = _is_sequence(texts) and all(isinstance(text, str) and text for text in texts)
            require(name, is_right, 'a text or a list of texts that are not empty, such as ["\\n\\n"]')
            object.__setattr__(self, name, tuple(texts))
        require("json_schema", isinstance(self.json_schema, str | Mapping | None), "a mapping, a text of JSON or None")
        require("regex", isinstance(self.regex, str | None), "a text or None")
        require("grammar", isinstance(self.grammar, str | None), "a text or None")
        given = [name for name in CONSTRAINTS if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} must not be given together; choose one")

    @property
    def constraint(self) -> str | None:
        """Which of the fields that constrain the text is given."""
        return next((name for name in CONSTRAINTS if getattr(self, name) is not None), None)

    @property
    def has_penalties(self) -> bool:
        """Whether the distribution depends on which tokens came before, beyond what the model sees."""
        return (self.presence_penalty, self.frequency_penalty, self.repetition_penalty) != (0.0, 0.0, 1.0)


def _is_integer(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _is_sequence(value: Any) -> bool:
    """Whether it is a list, a tuple or the like; a text is none, though its letters would do."""
    return isinstance(value, Sequence | set | frozenset) and not isinstance(value, str | bytes)


def _is_bias(value: Any) -> bool:
    return isinstance(value, Mapping) and all(
        _is_integer(token) and token >= 0 and isinstance(bias, Real) and bias < math.inf
        for token, bias in value.items()
    )
