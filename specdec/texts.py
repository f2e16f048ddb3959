"""Incremental detokenization: text that was returned once never changes.

A tokenizer decodes a whole sequence, and more tokens may change the text of earlier ones: a character can span several
tokens, SentencePiece drops the space before the first word, and some decoders remove spaces before punctuation. Here
the text grows token by token, so it does not depend on how many tokens arrive at once, and streamed pieces concatenate
to the full text.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

_CONTEXT = 6  # prompt tokens decoded together with the first tokens of the continuation
_INCOMPLETE = "\N{REPLACEMENT CHARACTER}"


class GrowingText:
    """The text of a continuation, without special tokens.

    tokenizer: a transformers tokenizer. before: the preceding tokens, or (). They preserve the space before the first
    word, which SentencePiece drops at the start of a text.
    text: the final part so far, without an incomplete character at the end.
    """

    def __init__(self, tokenizer: Any, before: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._cleans_up = getattr(tokenizer, "clean_up_tokenization_spaces", False)
        self._tokens = list(before[-_CONTEXT:])
        if self._decode(self._tokens).endswith(_INCOMPLETE):  # ends inside a character: start from scratch
            self._tokens = []
        self._num_final = len(self._tokens)  # tokens with final text
        self._context_start = 0  # first token to decode together with the new ones
        self.num_tokens, self.text = 0, ""

    def append(self, token: int) -> str:
        """Append a token; returns the text that became final."""
        self._tokens.append(token)
        self.num_tokens += 1
        return self._settle(at_end=False)

    def follow(self, tokens: Sequence[int]) -> None:
        """Append the tokens that are new, given all tokens of the continuation."""
        for token in tokens[self.num_tokens :]:
            self.append(token)

    def finish(self) -> str:
        """Return the rest at the end: a character that remained incomplete."""
        return self._settle(at_end=True)

    def _settle(self, *, at_end: bool) -> str:
        context = self._decode(self._tokens[self._context_start : self._num_final])
        longer = self._decode(self._tokens[self._context_start :])
        if longer.endswith(_INCOMPLETE) and not at_end:
            return ""
        if not longer.startswith(context):  # the decoder rewrote earlier text: decode the new tokens alone
            longer = context + self._decode(self._tokens[self._num_final :])
        added = longer[len(context) :]
        if added:  # otherwise special tokens or partial characters: keep the context
            self._context_start, self._num_final = self._num_final, len(self._tokens)
            self.text += added
        return added

    def _decode(self, tokens: Sequence[int]) -> str:
        if not tokens:
            return ""
        # cleaning up would remove spaces that were already returned
        options = {"clean_up_tokenization_spaces": False} if self._cleans_up else {}
        text: str = self._tokenizer.decode(list(tokens), skip_special_tokens=True, **options)
        return text


def continuation(tokenizer: Any, tokens: Sequence[int]) -> str:
    """The text of tokens as the continuation of an arbitrary text."""
    return text_after(tokenizer, tokenizer("a", add_special_tokens=False).input_ids, tokens)


def text_after(tokenizer: Any, before: Sequence[int], tokens: Sequence[int]) -> str:
    """The text of tokens that follow others; see `GrowingText`."""
    text = GrowingText(tokenizer, before)
    text.follow(tokens)
    text.finish()
    return text.text
