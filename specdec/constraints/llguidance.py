"""Constraints of JSON schemas, regular expressions and grammars, by llguidance (https://github.com/guidance-ai/llguidance).

A grammar is about bytes; llguidance knows which tokens of a vocabulary may go on with a text. Where the next bytes are
certain it allows but the tokens that the tokenizer itself would split them into.
"""

from __future__ import annotations

import importlib.util
import json
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from specdec.constraints.progress import fewest_tokens, least_length
from specdec.sampling_params import CONSTRAINTS, SamplingParams

_FURTHER = 500  # tokens beyond max_tokens that are tried to say how many are enough
_KEPT = 64  # constraints that are kept compiled
_SHOWN = 60  # characters of a constraint that a message repeats


@dataclass(frozen=True, slots=True)
class TokenGrammar:
    """A `Constraint` whose states are matchers of llguidance.

    name: the sampling parameter and its value, for messages. matcher: at the start. stop_token_ids: at least one; they
    are allowed where the text is complete, whatever the grammar says of their bytes. eos_token_ids: what llguidance
    takes for an end; those that are no stop tokens are never allowed. vocab_size: of the model; tokens beyond it, which
    some tokenizers have, are never allowed.
    """

    name: str
    matcher: Any
    stop_token_ids: frozenset[int]
    eos_token_ids: frozenset[int]
    vocab_size: int

    def __str__(self) -> str:
        return self.name

    def start(self) -> Any:
        return self.matcher

    def allowed(self, state: Any) -> Tensor:
        bits = np.frombuffer(state.compute_bitmask(), np.uint8)
        mask = torch.from_numpy(np.unpackbits(bits, bitorder="little", count=self.vocab_size)).bool()  # pads with zeros
        if state.is_error():  # llguidance's mask is then its end token
            return torch.zeros_like(mask)
        mask[list(self.eos_token_ids)] = False
        mask[list(self.stop_token_ids)] = state.is_accepting()
        return mask

    def advance(self, state: Any, token: int) -> Any:
        if token in self.stop_token_ids:
            return None
        following = state.deep_copy()
        following.consume_token(token)
        return following


class GrammarCompiler:
    """Compiles the constraints of sampling parameters for one model, and keeps what it compiled last.

    tokenizer: a fast transformers tokenizer, byte-level or with bytes to fall back on. vocab_size: of the model, below
    or above the tokenizer's.
    Raises ValueError for another tokenizer, and without llguidance.
    """

    def __init__(self, tokenizer: Any, vocab_size: int) -> None:
        if importlib.util.find_spec("llguidance") is None:
            raise ValueError(f"{', '.join(CONSTRAINTS)} need the package llguidance; pip install llguidance")
        from llguidance.hf import from_tokenizer

        try:
            self._tokenizer = from_tokenizer(tokenizer, n_vocab=max(vocab_size, _size(tokenizer)))
        except ValueError as error:
            kind = type(tokenizer).__name__
            raise ValueError(
                f"tokenizer={kind} must be one that llguidance reads: {error}; use a byte-level one"
            ) from None
        self._vocab_size = vocab_size
        self._compiled = lru_cache(_KEPT)(self._compile)

    def compile(self, sampling: SamplingParams, stop_token_ids: frozenset[int]) -> TokenGrammar:
        """The constraint of `sampling`, which has one.

        Raises ValueError naming it where it does not compile, where nothing fits it, where there is no stop token, and
        where it is certain that max_tokens are too few, for which but so much is tried.
        """
        name = sampling.constraint
        assert name is not None
        value = getattr(sampling, name)
        if not isinstance(value, str):
            value = _as_json(name, value)
        return self._compiled(name, value, stop_token_ids, sampling.max_tokens)

    def _compile(self, field: str, text: str, stop_token_ids: frozenset[int], max_tokens: int) -> TokenGrammar:
        name = f"{field}={text if len(text) <= _SHOWN else text[:_SHOWN] + '...'!r}"
        if not stop_token_ids:
            raise ValueError(f"{name} must have a token to end with; give stop_token_ids, or ignore_eos=False")
        matcher = self._matcher(name, field, text)
        eos = frozenset(token for token in self._tokenizer.eos_tokens if token < self._vocab_size)
        grammar = TokenGrammar(name, matcher, stop_token_ids, eos, self._vocab_size)
        if not grammar.allowed(matcher.deep_copy()).any():
            raise ValueError(f"{name} must be met by some text, but is met by none; correct it")
        if fewest_tokens(grammar, stop_token_ids, max_tokens) > max_tokens:
            raise ValueError(_too_few(grammar, stop_token_ids, max_tokens))
        return grammar

    def _matcher(self, name: str, field: str, text: str) -> Any:
        from llguidance import LLMatcher, grammar_from

        try:
            matcher = LLMatcher(self._tokenizer, grammar_from(cast("Any", field), text), log_level=0)
            reason = matcher.get_error()
        except ValueError as error:
            reason = str(error)
        if reason:
            raise ValueError(f"{name} must be one that llguidance compiles; correct it: {reason.strip()}")
        return matcher


def _size(tokenizer: Any) -> int:
    return len(tokenizer) if hasattr(tokenizer, "__len__") else 0  # what is no tokenizer is refused in its own words


def _too_few(grammar: TokenGrammar, stop_token_ids: frozenset[int], max_tokens: int) -> str:
    """What to do about max_tokens within which no output ends: raise it if that is known to help."""
    most = max_tokens + _FURTHER
    needed, is_enough = least_length(grammar, stop_token_ids, most)
    if is_enough or needed <= most:  # known to help, or more states than are looked at: there is hope
        return (
            f"max_tokens={max_tokens} must be at least {needed}, the stop token included, to meet {grammar}; raise it"
        )
    return (
        f"max_tokens={max_tokens} must be enough to meet {grammar}, but within {most} tokens it has no "
        f"end: correct it if it cannot end at all, else raise max_tokens"
    )


def _as_json(name: str, schema: Any) -> str:
    try:
        return json.dumps(dict(schema))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name}={schema!r} must be JSON ({error}); correct it") from None
