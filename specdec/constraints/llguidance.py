"""Constraints of JSON schemas, regular expressions and grammars, by llguidance (https://github.com/guidance-ai/llguidance).

A grammar is over bytes; llguidance determines which tokens of a vocabulary may continue a text. Where the next bytes
are forced, it allows only the tokens that the tokenizer itself would split them into.
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

_FURTHER = 500  # tokens beyond max_tokens to search for a sufficient length
_KEPT = 64  # compiled constraints to cache
_SHOWN = 60  # characters of a constraint to show in a message


@dataclass(frozen=True, slots=True)
class TokenGrammar:
    """A `Constraint` whose states are llguidance matchers.

    name: the sampling parameter and its value, for messages. matcher: in its initial state. stop_token_ids: at least
    one; allowed exactly where the text is complete, whatever their bytes. eos_token_ids: llguidance's end tokens; never
    allowed unless they are stop tokens. vocab_size: the model's; tokens beyond it, which some tokenizers have, are
    never allowed.
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
        if state.is_error():  # its mask would be the end token
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
    """Compiles constraints for one model and caches the most recent ones.

    tokenizer: a fast transformers tokenizer, byte-level or with byte fallback. vocab_size: the model's, which may
    differ from the tokenizer's.
    Raises ValueError for other tokenizers, and if llguidance is not installed.
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
                f"tokenizer={kind} must be supported by llguidance: {error}; use a byte-level tokenizer"
            ) from None
        self._vocab_size = vocab_size
        self._compiled = lru_cache(_KEPT)(self._compile)

    def compile(self, sampling: SamplingParams, stop_token_ids: frozenset[int]) -> TokenGrammar:
        """Compile the constraint of `sampling`, which must have one.

        Raises ValueError naming the constraint if it does not compile, if no text matches it, if there is no stop
        token, or if max_tokens is known to be too small, which a bounded search checks.
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
            raise ValueError(f"{name} must have a stop token; set stop_token_ids, or ignore_eos=False")
        matcher = self._matcher(name, field, text)
        eos = frozenset(token for token in self._tokenizer.eos_tokens if token < self._vocab_size)
        grammar = TokenGrammar(name, matcher, stop_token_ids, eos, self._vocab_size)
        if not grammar.allowed(matcher.deep_copy()).any():
            raise ValueError(f"{name} must match at least one text, but matches none; correct it")
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
            raise ValueError(f"{name} must compile with llguidance; correct it: {reason.strip()}")
        return matcher


def _size(tokenizer: Any) -> int:
    return len(tokenizer) if hasattr(tokenizer, "__len__") else 0  # llguidance reports non-tokenizers itself


def _too_few(grammar: TokenGrammar, stop_token_ids: frozenset[int], max_tokens: int) -> str:
    """The message for max_tokens within which no output can end: raise it if that is known to help."""
    limit = max_tokens + _FURTHER
    needed, is_enough = least_length(grammar, stop_token_ids, limit)
    if is_enough or needed <= limit:  # known to help, or the search ran out of states
        return f"max_tokens={max_tokens} must be at least {needed}, including the stop token, for {grammar}; raise it"
    return (
        f"max_tokens={max_tokens} must be enough for {grammar}, which cannot end within {limit} tokens; raise "
        f"max_tokens, or correct the constraint if it cannot end at all"
    )


def _as_json(name: str, schema: Any) -> str:
    try:
        return json.dumps(dict(schema))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name}={schema!r} must be JSON ({error}); correct it") from None
