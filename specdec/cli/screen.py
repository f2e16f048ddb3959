"""Emitted text that shows where each of its tokens came from: by colour on a terminal, by marks anywhere."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TextIO

from specdec.requests import Chunk, TokenSource

# underlined, too: colours alone are not for everybody
ANSI: dict[TokenSource, str] = {"accepted": "32", "recovered": "4;35", "bonus": "36"}
MARKS: dict[TokenSource, str] = {"accepted": "+", "recovered": "~", "bonus": "*"}
SOURCES: tuple[TokenSource, ...] = (*ANSI, "plain")


@dataclass(frozen=True, slots=True)
class Paint:
    """How a token's text is shown. colours: as ANSI escapes. marks: as [+accepted][~recovered][*bonus].

    Plain text is that of steps without a draft.
    """

    colours: bool = False
    marks: bool = False

    def __call__(self, text: str, source: TokenSource) -> str:
        if source == "plain":
            return text
        shown = f"[{MARKS[source]}{text}]" if self.marks else text
        return f"\033[{ANSI[source]}m{shown}\033[0m" if self.colours and shown else shown

    @property
    def shows(self) -> bool:
        """Whether sources can be told apart."""
        return self.colours or self.marks

    def legend(self, texts: Mapping[TokenSource, str] | None = None) -> str:
        """The four sources, each as its tokens are shown. texts: what stands for a source instead of its name."""
        return ", ".join(self((texts or {}).get(source, source), source) for source in SOURCES)


def has_colours(stream: TextIO, environment: Mapping[str, str] = os.environ) -> bool:
    """Whether a stream is a terminal that takes colours, and the user wants them (https://no-color.org)."""
    return stream.isatty() and not environment.get("NO_COLOR") and environment.get("TERM") != "dumb"


def pieces(chunks: Iterable[Chunk], decode: Callable[[Sequence[int]], str]) -> Iterator[tuple[str, TokenSource]]:
    """What each token of a stream adds to the text, and its source.

    A character of several tokens comes with the last of them, the others are empty, as are special tokens.
    decode: token ids -> their text, of which the text of the first of them is the beginning.
    """
    tokens: list[int] = []
    text = ""
    for chunk in chunks:
        for at, (token, source) in enumerate(zip(chunk.token_ids, chunk.sources, strict=True), 1):
            tokens.append(token)
            longer = decode(tokens)
            is_last = chunk.completion is not None and at == len(chunk.token_ids)
            if longer.endswith("\N{REPLACEMENT CHARACTER}") and not is_last:
                longer = text  # the end of a character is still to come
            yield longer[len(text) :], source
            text = longer
