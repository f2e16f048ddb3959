"""Show the source of each emitted token: by color on a terminal, or by marks."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TextIO

from specdec.requests import Chunk, TokenSource

# underlined as well: color alone is not accessible
ANSI: dict[TokenSource, str] = {"accepted": "32", "recovered": "4;35", "bonus": "36"}
MARKS: dict[TokenSource, str] = {"accepted": "+", "recovered": "~", "bonus": "*"}
SOURCES: tuple[TokenSource, ...] = (*ANSI, "plain")


@dataclass(frozen=True, slots=True)
class Paint:
    """Formats a token's text by its source. colors: with ANSI escapes. marks: as [+accepted][~recovered][*bonus].

    Tokens of steps without a draft are plain text.
    """

    colors: bool = False
    marks: bool = False

    def __call__(self, text: str, source: TokenSource) -> str:
        if source == "plain":
            return text
        shown = f"[{MARKS[source]}{text}]" if self.marks else text
        return f"\033[{ANSI[source]}m{shown}\033[0m" if self.colors and shown else shown

    @property
    def shows(self) -> bool:
        """Whether sources are shown at all."""
        return self.colors or self.marks

    def legend(self, texts: Mapping[TokenSource, str] | None = None) -> str:
        """The four sources, each formatted like its tokens. texts: replaces a source's name."""
        return ", ".join(self((texts or {}).get(source, source), source) for source in SOURCES)


def has_colors(stream: TextIO, environment: Mapping[str, str] = os.environ) -> bool:
    """Whether a stream is a terminal with color support and the user allows colors (https://no-color.org)."""
    return stream.isatty() and not environment.get("NO_COLOR") and environment.get("TERM") != "dumb"


def pieces(chunks: Iterable[Chunk], decode: Callable[[Sequence[int]], str]) -> Iterator[tuple[str, TokenSource]]:
    """The text that each token of a stream adds, and its source.

    A character spanning several tokens comes with the last of them; the others, and special tokens, add nothing.
    decode: token ids -> their text, which must start with the text of any prefix.
    """
    tokens: list[int] = []
    text = ""
    for chunk in chunks:
        for at, (token, source) in enumerate(zip(chunk.token_ids, chunk.sources, strict=True), 1):
            tokens.append(token)
            longer = decode(tokens)
            is_last = chunk.completion is not None and at == len(chunk.token_ids)
            if longer.endswith("\N{REPLACEMENT CHARACTER}") and not is_last:
                longer = text  # an incomplete character
            yield longer[len(text) :], source
            text = longer
