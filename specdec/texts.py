"""The text of a token sequence as it grows: what was given once never changes.

A tokenizer's decode is a function of all tokens, and may rewrite what it gave for fewer of them: the bytes of a
character come in several tokens, SentencePiece drops the space before the first word, and some decoders clean up spaces
before punctuation. Here the text is made token by token, so that it is the same however many tokens come at once, and
streamed pieces make up the whole.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

_CONTEXT = 6  # tokens of the prompt that are decoded with the first ones of its continuation
_INCOMPLETE = "\N{REPLACEMENT CHARACTER}"


class GrowingText:
    """The text of tokens that continue others, special tokens left out.

    tokenizer: a transformers tokenizer. before: the tokens that are continued, () where the text stands alone: with
    them the first word keeps its space, which SentencePiece drops at the beginning of a text.
    text: what is certain so far, without the beginning of a character whose end is still to come.
    """

    def __init__(self, tokenizer: Any, before: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._cleans_up = getattr(tokenizer, "clean_up_tokenization_spaces", False)
        self._tokens = list(before[-_CONTEXT:])
        if self._decode(self._tokens).endswith(_INCOMPLETE):  # it ends within a character: this text begins there
            self._tokens = []
        self._known = len(self._tokens)  # tokens whose text is certain
        self._from = 0  # the first token that is decoded with the new ones
        self.num_tokens, self.text = 0, ""

    def append(self, token: int) -> str:
        """What a token adds to what is certain."""
        self._tokens.append(token)
        self.num_tokens += 1
        return self._settle(at_end=False)

    def follow(self, tokens: Sequence[int]) -> None:
        """Append those of the continuation's tokens, given from its first on, that are new."""
        for token in tokens[self.num_tokens :]:
            self.append(token)

    def finish(self) -> str:
        """What is left at the end: a character that stays incomplete."""
        return self._settle(at_end=True)

    def _settle(self, *, at_end: bool) -> str:
        known = self._decode(self._tokens[self._from : self._known])
        longer = self._decode(self._tokens[self._from :])
        if longer.endswith(_INCOMPLETE) and not at_end:
            return ""
        if not longer.startswith(known):  # a decoder that rewrites: the new tokens' own text, as if nothing came before
            longer = known + self._decode(self._tokens[self._known :])
        added = longer[len(known) :]
        if added:  # else special tokens, or bytes: what stands before them is still needed
            self._from, self._known = self._known, len(self._tokens)
            self.text += added
        return added

    def _decode(self, tokens: Sequence[int]) -> str:
        if not tokens:
            return ""
        # cleaning up takes back spaces that were given before
        options = {"clean_up_tokenization_spaces": False} if self._cleans_up else {}
        text: str = self._tokenizer.decode(list(tokens), skip_special_tokens=True, **options)
        return text


def continuation(tokenizer: Any, tokens: Sequence[int]) -> str:
    """The text of tokens that continue some text, whichever it is."""
    return text_after(tokenizer, tokenizer("a", add_special_tokens=False).input_ids, tokens)


def text_after(tokenizer: Any, before: Sequence[int], tokens: Sequence[int]) -> str:
    """The text of tokens that continue others; see `GrowingText`."""
    text = GrowingText(tokenizer, before)
    text.follow(tokens)
    text.finish()
    return text.text
