"""Words that no text of the project may use: they belong to a private dialect, not to the field."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SUFFIXES = {".py", ".md", ".html", ".css", ".toml", ".cpp", ".h", ".sh", ".ipynb"}
BANNED = {  # pattern -> what to write instead
    r"laws?": "distribution, the target's distribution",
    r"amiss": "invalid, missing",
    r"manieth": "n-th",
    r"as many (?:\w+ )?as pay": "as many as are worth verifying",
    r"none included": "possibly none",
    r"(?:gives?|has|have|had) the bits": "is bit-identical to",
    r"the tree of so many": "the tree of that size",
    r"others came before": "earlier requests",
    r"what people call": "public entry point",
    r"what may speak for": "draft sources",
    r"beside other work": "on a busy machine",
    r"told": "reported, logged, given",
    r"(?:is|are|was|were) said(?! to)": "is logged, is documented",
    r"ours|theirs": "the thing: candidate and baseline, first and second",
    r"(?:of|in|by|than) so many": "of n, of the given number",
    r"gone on with": "continued by",
    r"lets? go of": "frees, releases",
    r"what became of": "the outcome, the result of",
    r"(?:can|may|cannot|must|could) be had|is had|are had": "is available, can be downloaded",
    r"anew": "again, from scratch",
    r"roads?": "path, implementation",
    r"whoever": "a user who, a process that",
    r"(?:its|their) kin": "its variants, related models",
    r"as people (?:call|load|see)": "as documented, as printed",
}
EXCEPTIONS = {"tests/project/test_language.py": "it holds the patterns"}  # path -> why its words stay


def violations(text: str) -> list[str]:
    """Messages naming each banned phrase of a text, its line and the replacement; names are read as words."""
    found, text = [], text.replace("_", " ")
    for pattern, instead in BANNED.items():
        for match in re.finditer(rf"\b(?:{pattern})\b", text, re.IGNORECASE):
            line = text.count("\n", 0, match.start()) + 1
            found.append(f"line {line}: {match[0]!r} must be written as: {instead}")
    return found


def files() -> Iterator[Path]:
    """The texts of the library, the benchmark, the tests and the documentation, without measured results."""
    yield ROOT / "README.md"
    for folder in ("specdec", "bench", "docs", "tests"):
        for path in sorted((ROOT / folder).rglob("*")):
            if path.suffix in SUFFIXES and not {"baselines", "recorded"} & set(path.parts):
                yield path


def test_no_banned_words() -> None:
    found = {
        str(path.relative_to(ROOT)): messages
        for path in files()
        if (messages := violations(path.read_text(encoding="utf-8")))
    }
    assert not {path: messages for path, messages in found.items() if path not in EXCEPTIONS}
    assert not set(EXCEPTIONS) - set(found), "these exceptions are no longer needed"


@pytest.mark.parametrize(
    "text",
    ["the law of the target", "every so manieth step", "what is amiss", "as many tokens as pay", "has_the_bits_of"],
)
def test_banned_words_are_found(text: str) -> None:
    assert len(violations(f"first line\n{text}")) == 1
    assert violations(f"first line\n{text}")[0].startswith("line 2: ")


def test_parts_of_words_are_not_banned() -> None:
    assert not violations("a lawn, an outlaw and a claw")
