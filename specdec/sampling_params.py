"""Sampling parameters of a request."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import Any, NoReturn

from specdec.prompts import whole
from specdec.runtime.checks import with_constructor_spelling

CONSTRAINTS = ("json_schema", "regex", "grammar")
_MAX_SHOWN = 80  # characters of a wrong value that a message repeats

_FLOATS: dict[str, tuple[Callable[[float], bool], str]] = {
    "temperature": (lambda value: 0 <= value < math.inf, "finite and >= 0; 0 is greedy"),
    "top_p": (lambda value: 0 < value <= 1, "in (0, 1]; 1 keeps all tokens"),
    "min_p": (lambda value: 0 <= value <= 1, "in [0, 1]; 0 keeps all tokens"),
    "presence_penalty": (math.isfinite, "finite; 0 is off"),
    "frequency_penalty": (math.isfinite, "finite; 0 is off"),
    "repetition_penalty": (lambda value: 0 < value < math.inf, "finite and > 0; 1 is off"),
}
_INTEGERS: dict[str, tuple[Callable[[int], bool], str]] = {
    "top_k": (lambda value: value >= 0, "an integer >= 0; 0 keeps all tokens"),
    "max_tokens": (lambda value: value >= 1, "an integer >= 1"),
    "min_tokens": (lambda value: value >= 0, "an integer >= 0"),
    "seed": (lambda value: 0 <= value < 2**64, "an integer in [0, 2**64)"),
    "n": (lambda value: value >= 1, "an integer >= 1"),
    "top_logprobs": (lambda value: value >= 0, "an integer >= 0"),
}
_FLAGS = ("ignore_eos", "logprobs", "include_stop_str_in_output")
_EMPTY: dict[str, Any] = {"stop": (), "bad_words": (), "stop_token_ids": (), "logit_bias": {}}  # what None means
_TEXTS = {
    "json_schema": (str | Mapping, "a mapping, a JSON string"),
    "regex": (str, "a string"),
    "grammar": (str, "a string"),
}


@with_constructor_spelling
@dataclass(frozen=True, slots=True)
class SamplingParams:
    """Sampling parameters of one request. Names and defaults follow vLLM.

    Where vLLM has None for no stop strings, stop tokens, biases or bad words, None is accepted.
    They are applied in this order: logit bias; repetition, frequency and presence penalties; the constraint,
    `bad_words` and `min_tokens`; temperature; top-k; top-p; min-p.

    Args:
        temperature: float >= 0; 0 is greedy decoding (argmax, ties go to the lowest id).
        top_k: keep the k largest logits, including ties with the k-th; 0 keeps all.
        top_p: keep the fewest most probable tokens whose probabilities sum to at least top_p, in (0, 1], including
            ties with the last.
        min_p: drop tokens less probable than min_p times the most probable one, in [0, 1].
        presence_penalty: subtracted from the logit of every token that was emitted.
        frequency_penalty: subtracted from the logit of a token once per time it was emitted.
        repetition_penalty: > 0; logits of prompt and emitted tokens are divided by it if positive, else multiplied.
        logit_bias: token id -> float added to its logit; -inf forbids the token.
        max_tokens: maximum number of tokens to emit, including the stop token.
        stop_token_ids: token ids that end the request; the stop token is emitted.
        ignore_eos: do not stop at the model's own end-of-sequence tokens.
        seed: selects the request's random stream, 0 <= seed < 2**64. Requests with equal seeds share uniforms.
        logprobs: also return the log-probability of each emitted token under the target's unprocessed logits.
        n: number of samples of the prompt, each a completion with its own seed; the first equals the completion for
            n=1. The target reads the prompt once.
        top_logprobs: with logprobs, also return those of this many most probable tokens at each position.
        json_schema: constrain the text before the stop token to JSON of this schema, a mapping or a JSON string.
        regex: constrain the text to a full match of this regular expression.
        grammar: constrain the text by a grammar in Lark or GBNF notation. Constraints are compiled by the package
            llguidance, which documents their syntax; at most one of the three may be given.
        stop: strings that end the request, wherever token boundaries fall.
        include_stop_str_in_output: whether the text includes the stop string or ends before it.
        min_tokens: minimum number of tokens to emit: until then stop tokens are forbidden and stop strings ignored.
        bad_words: strings that must not occur in the output; tokens that would complete one are forbidden.

    Raises:
        ValueError: naming the field, its value and the rule it breaks.
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
        for name, (holds, rule) in _FLOATS.items():
            self._check_number(name, Real, holds, rule, _as_float)
        for name, (fits, rule) in _INTEGERS.items():
            self._check_number(name, Integral, fits, rule, int)
        for name in _FLAGS:
            if not isinstance(getattr(self, name), bool):
                self._reject(name, "True or False")
        if self.min_tokens > self.max_tokens:
            self._reject("min_tokens", f"an integer from 0 to max_tokens={self.max_tokens}")
        if self.top_logprobs and not self.logprobs:
            self._reject("top_logprobs", "0 without logprobs; set logprobs=True")
        for name, none in _EMPTY.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, none)
        self._check_token_ids()
        self._check_texts()

    def _reject(self, name: str, rule: str) -> NoReturn:
        shown = repr(getattr(self, name))
        shown = shown if len(shown) <= _MAX_SHOWN else f"{shown[:_MAX_SHOWN]}..."
        raise ValueError(f"{name}={shown} must be {rule}")

    def _check_number(
        self, name: str, kind: type, holds: Callable[[Any], bool], rule: str, to: Callable[[Any], float]
    ) -> None:
        value = getattr(self, name)
        if not isinstance(value, kind) or isinstance(value, bool) or not holds(to(value)):
            self._reject(name, rule)
        object.__setattr__(self, name, to(value))

    def _check_token_ids(self) -> None:
        if not _is_bias(self.logit_bias):
            self._reject("logit_bias", "a mapping of token ids >= 0 to floats below +inf")
        object.__setattr__(self, "logit_bias", {int(token): _as_float(bias) for token, bias in self.logit_bias.items()})
        if not _is_sequence(self.stop_token_ids) or not all(map(_is_token_id, self.stop_token_ids)):
            self._reject("stop_token_ids", "a list or tuple of token ids >= 0, such as (2,)")
        object.__setattr__(self, "stop_token_ids", tuple(map(int, self.stop_token_ids)))

    def _check_texts(self) -> None:
        for name in ("stop", "bad_words"):
            texts = getattr(self, name)
            texts = (texts,) if isinstance(texts, str) else texts
            if not _is_sequence(texts) or not all(isinstance(text, str) and text for text in texts):
                self._reject(name, 'a non-empty string or a list of them, such as ["\\n\\n"]')
            object.__setattr__(self, name, tuple(whole(text, name) for text in texts))
        for name, (kinds, rule) in _TEXTS.items():
            if not isinstance(getattr(self, name), kinds | None):
                self._reject(name, f"{rule} or None")
            if isinstance(getattr(self, name), str):
                whole(getattr(self, name), name)
        given = [name for name in CONSTRAINTS if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} must not be given together; choose one")

    @property
    def constraint(self) -> str | None:
        """The name of the constraint field that is set, if any."""
        return next((name for name in CONSTRAINTS if getattr(self, name) is not None), None)

    @property
    def has_penalties(self) -> bool:
        """Whether any penalty is active."""
        return (self.presence_penalty, self.frequency_penalty, self.repetition_penalty) != (0.0, 0.0, 1.0)


def _as_float(value: Any) -> float:
    """An integer beyond the largest float becomes infinite."""
    try:
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf


def _is_token_id(value: Any) -> bool:
    return not isinstance(value, bool) and isinstance(value, Integral) and int(value) >= 0


def _is_sequence(value: Any) -> bool:
    """Whether a value is a list, tuple or set. A string is not, although it is a sequence of its characters."""
    return isinstance(value, Sequence | set | frozenset) and not isinstance(value, str | bytes)


def _is_bias(value: Any) -> bool:
    return isinstance(value, Mapping) and all(
        _is_token_id(token) and isinstance(bias, Real) and _as_float(bias) < math.inf for token, bias in value.items()
    )
