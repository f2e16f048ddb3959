"""Draft models with a different tokenizer: the shared tokens, and the text in the draft's own tokens.

The draft's distribution is restricted to the tokens that both vocabularies share, matched by their text, and
renormalized. It is then a distribution over the target's tokens like any other, so verification stays lossless. The
draft model reads the target's text re-encoded in its own tokens; how that is done affects the draft's quality, never
its verification.

Source: Timor et al. 2025 (arXiv:2502.05202), token-level intersection (TLI).
"""

from __future__ import annotations

import codecs
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

Piece = bytes | str  # a token's text; a str is a special token, which is not text
Encode = Callable[[str], list[int]]

MIN_COVERAGE = 0.5  # see `check_coverage`
SAMPLE = """\
The old lighthouse keeper climbed the stairs slowly, counting each step as he went: one hundred and twelve, as always.
"You're late again," said his daughter, without looking up from her book. It was 7:45 on a cold Friday in November 1987,
and the wind had been rising since noon. Why do storms form over warm water? Because evaporation carries energy upwards,
where it condenses; the pressure falls, and more air is drawn in. First, heat the oven to 200 degrees. Then mix 3 cups
of flour with a pinch of salt, and add the butter, sugar and two eggs. Researchers at the University of Toronto reported
on Monday that the new vaccine reduced infections by 64%, although larger studies are needed. Dear Dr. Williams, thank
you for your interest in our company; please find attached the revised agreement. Let x be the number of apples: 3x + 5
= 20, so x = 5. In 1492 Columbus sailed west. Der Vertrag wurde gestern in Berlin unterzeichnet. La réunion commence à
neuf heures, mais le président n'est pas encore arrivé. El equipo ganó el partido por dos goles a uno.

def mean(values: list[float]) -> float:
    \"\"\"Return the average of the values.\"\"\"
    if not values:
        raise ValueError("values must not be empty")
    return sum(values) / len(values)

{"name": "example", "version": "1.0.3", "tags": ["a", "b"], "active": true}
<div class="item"><a href="https://www.example.com/index.html">Read more</a></div>
"""


class SharedVocabulary:
    """The tokens shared by a target and a draft.

    tokens: int64 [n], ascending, the target's ids. draft_tokens: int64 [n], the draft's ids of the same tokens.
    target_pieces: the text of the target's tokens by id; missing ones are dropped. encode: encodes a text in the
    draft's vocabulary without special tokens. prefix: the tokens with which the draft's texts begin.
    beginning: the target's token to drop at the start of a text, or None.
    Raises ValueError if no token is shared.
    """

    def __init__(
        self,
        target_pieces: Mapping[int, Piece],
        draft_pieces: Mapping[int, Piece],
        encode: Encode,
        prefix: Sequence[int] = (),
        beginning: int | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        self.target_pieces, self.encode = target_pieces, encode
        self.prefix, self.beginning = tuple(prefix), beginning
        ids = _by_piece(draft_pieces)
        pairs = sorted((token, ids[piece]) for piece, token in _by_piece(target_pieces).items() if piece in ids)
        if not pairs:
            raise ValueError(
                "the draft's tokenizer must share tokens with the target's, but has none of them; use a draft of the "
                "same family"
            )
        tokens, draft_tokens = zip(*pairs, strict=True)
        self.tokens = torch.tensor(tokens, device=device)
        self.draft_tokens = torch.tensor(draft_tokens, device=device)
        self.split = _splitting(encode)

    def of(self, logits: Tensor) -> Tensor:
        """The draft's logits [..., draft_vocab] at the shared tokens, [..., n]."""
        return logits.index_select(-1, self.draft_tokens)

    def to_draft(self, tokens: Tensor) -> Tensor:
        """Convert shared tokens from the target's ids to the draft's, int64 [...]."""
        places = torch.searchsorted(self.tokens, tokens.contiguous()).clamp(max=len(self.tokens) - 1)
        return self.draft_tokens.index_select(0, places.flatten()).view(tokens.shape)

    def coverage(self, tokens: Sequence[int]) -> float:
        """The fraction of a text's tokens that is shared. Raises ValueError for an empty text."""
        if not tokens:
            raise ValueError("tokens=[] must not be empty; use a text that the target might generate")
        return float(torch.isin(torch.tensor(list(tokens)), self.tokens.cpu()).double().mean())


class Rewritten:
    """A growing text, re-encoded from the target's tokens to the draft's.

    tokens: the draft's tokens. num_settled: the number of leading ones that can no longer change. Only the last word is
    re-encoded, so a token takes constant time, however long the text is.
    """

    def __init__(self, shared: SharedVocabulary) -> None:
        self._shared = shared
        self.tokens = list(shared.prefix)
        self.num_settled = len(self.tokens)
        self._num_read, self._rest, self._is_first = 0, "", True
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def follow(self, tokens: list[int]) -> None:
        """Process the tokens appended since the last call, given all of the target's tokens."""
        begins = self._num_read == 0 and tokens[:1] == [self._shared.beginning]
        new = tokens[self._num_read + begins :]
        self._num_read = len(tokens)
        self._rest += "".join(map(self._text, new))
        del self.tokens[self.num_settled :]
        place = self._shared.split.place(self._rest)
        if place:
            self.tokens += self._encode(self._rest[:place])
            self._rest, self.num_settled, self._is_first = self._rest[place:], len(self.tokens), False
        self.tokens += self._encode(self._rest)

    def _text(self, token: int) -> str:
        """The text a token adds; the bytes of an incomplete character are held back."""
        piece = self._shared.target_pieces.get(token, "")
        return self._utf8.decode(piece) if isinstance(piece, bytes) else self._utf8.decode(b"", final=True) + piece

    def _encode(self, text: str) -> list[int]:
        return self._shared.encode(text if self._is_first else self._shared.split.later(text))


@dataclass(frozen=True, slots=True)
class _Splitting:
    """How a text can be encoded in parts. cuts: whether it can. drops_space: the tokenizer adds a leading space."""

    cuts: bool
    drops_space: bool = False

    def place(self, text: str) -> int:
        """Start of the last word, at the space between two non-space characters; 0 if there is none."""
        end = len(text)
        while self.cuts and (place := text.rfind(" ", 1, end)) > 0:
            around = text[place - 1] + text[place + 1 : place + 2]
            if len(around) == 2 and not any(map(str.isspace, around)):
                return place
            end = place
        return 0

    def later(self, text: str) -> str:
        """A part other than the first, as it must be encoded."""
        return text[1:] if self.drops_space else text


def _splitting(encode: Encode) -> _Splitting:
    """How to split texts such that the parts of the sample encode to the tokens of the whole, if possible."""
    whole = encode(SAMPLE)
    for split in (_Splitting(True), _Splitting(True, drops_space=True)):
        text, parts = SAMPLE, list[int]()
        while place := split.place(text):
            text, last = text[:place], text[place:]
            parts = encode(split.later(last)) + parts
        if encode(text) + parts == whole:
            return split
    return _Splitting(False)


def _by_piece(pieces: Mapping[int, Piece]) -> dict[Piece, int]:
    """Tokens by their text; the first of several with the same text, so that none is used twice."""
    found: dict[Piece, int] = {}
    for token, piece in pieces.items():
        found.setdefault(piece, token)
    return found


# ---- tokenizers


def share(target: Any, draft: Any, sizes: tuple[int, int], device: torch.device | str = "cpu") -> SharedVocabulary:
    """The tokens shared by two transformers tokenizers. sizes: of the models' vocabularies, which bound token ids.

    Raises ValueError if they share nothing, or if the text of a tokenizer's tokens cannot be determined.
    """
    target_pieces, draft_pieces = (pieces_of(*pair) for pair in zip((target, draft), sizes, strict=True))
    probe = draft("a").input_ids
    prefix = probe[:1] if probe and probe[0] == draft.bos_token_id else []
    # keep the target's BOS for a draft whose vocabulary has that token and whose tokenizer adds no BOS itself
    keeps_bos = not prefix and target_pieces.get(target.bos_token_id) in draft_pieces.values()
    beginning = None if keeps_bos else target.bos_token_id

    def encode(text: str) -> list[int]:
        return list(draft(text, add_special_tokens=False).input_ids)

    return SharedVocabulary(target_pieces, draft_pieces, encode, prefix, beginning, device)


def check_coverage(shared: SharedVocabulary, tokenizer: Any, sizes: tuple[int, int]) -> None:
    """Raise ValueError unless the shared tokens cover most of a sample text; log the coverage once.

    tokenizer: the target's. A token that is not shared can never be accepted, so at coverage c even a perfect draft
    emits at most about 1 / (1 - c) tokens per target call: two at 0.5. Measured with SmolLM2-135M as its own draft,
    restricted to its first n tokens, gamma 4: 4.3 at a coverage of 0.96, 2.7 at 0.71, 2.0 at 0.52, 1.7 at 0.41. The
    share of tokens is no guide: the tokenizers of SmolLM2 (49,152), Mistral 7B (32,000), Tekken (130,072) and Claude 2
    (65,000) share 22 to 91 % of their tokens, which cover 89 to 99 % of the sample.
    """
    coverage = shared.coverage(tokenizer(SAMPLE, add_special_tokens=False).input_ids)
    summary = (
        f"the draft's tokenizer, of {sizes[1]} tokens, shares {len(shared.tokens)} of the target's {sizes[0]}, which "
        f"make up {coverage:.0%} of a sample text"
    )
    if coverage < MIN_COVERAGE:
        raise ValueError(
            f"{summary} and must make up at least {MIN_COVERAGE:.0%} of it; use a draft with a more similar tokenizer, "
            'or method="ngram", which needs none'
        )
    _warn_once(summary)


@cache
def _warn_once(summary: str) -> None:
    logging.getLogger("specdec").warning(
        "%s: only shared tokens are drafted; the output distribution is unchanged", summary
    )


_PURPOSE = "a draft with another vocabulary; use a draft of the same family"


def pieces_of(tokenizer: Any, vocab_size: int, purpose: str = _PURPOSE) -> dict[int, Piece]:
    """The text of each token of a transformers tokenizer, by id; single-byte tokens come last.

    Raises ValueError for a tokenizer that is neither byte-level nor SentencePiece-like: its texts are not simply the
    concatenation of its tokens' texts. purpose: what needs them, with a remedy, for the message.
    """
    spelled = _spelling(tokenizer, purpose)
    added = {token: _added(entry) for token, entry in tokenizer.added_tokens_decoder.items()}
    ordinary = {token: text for text, token in tokenizer.get_vocab().items() if token not in added}
    pieces: dict[int, Piece] = {token: piece for token, text in sorted(ordinary.items()) if (piece := spelled(text))}
    pieces |= added
    alone = {token: pieces.pop(token) for token, text in ordinary.items() if _is_byte(text) and token in pieces}
    return {token: piece for token, piece in (pieces | alone).items() if token < vocab_size}


def _spelling(tokenizer: Any, purpose: str) -> Callable[[str], bytes]:
    decoder = getattr(getattr(tokenizer, "backend_tokenizer", None), "decoder", None)
    kinds = _types(json.loads(decoder.__getstate__())) if decoder is not None else set()
    if "ByteLevel" in kinds:
        alphabet = _byte_alphabet()
        return lambda text: bytes(alphabet[char] for char in text if char in alphabet)
    if kinds & {"Metaspace", "Replace"}:
        return lambda text: bytes([int(text[3:5], 16)]) if _is_byte(text) else text.replace("▁", " ").encode()
    raise ValueError(f"the tokenizer {type(tokenizer).__name__} must be byte-level or SentencePiece-like for {purpose}")


def _added(token: Any) -> Piece:
    """The text of a token that was added to a tokenizer, unless it is a special token."""
    return str(token) if token.special else str(token).encode()


def _types(decoder: Mapping[str, Any]) -> set[str]:
    """The types of a decoder and of the decoders nested in it."""
    return {decoder["type"]}.union(*(_types(each) for each in decoder.get("decoders", ())))


def _is_byte(text: str) -> bool:
    """Whether a SentencePiece token is a single byte, such as <0x0A>."""
    return len(text) == 6 and text.startswith("<0x") and text.endswith(">")


def _byte_alphabet() -> dict[str, int]:
    """Byte-level tokenizers' printable character for each byte: the byte's own, or one from 256 up."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}
