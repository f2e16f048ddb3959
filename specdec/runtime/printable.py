"""Untrusted text, made safe to print."""

from __future__ import annotations

import re

# control characters except tabs and line ends, which may control a terminal; characters that reverse or break lines;
# and lone surrogates
UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str) -> str:
    """A text with Python's escapes for characters that must not reach a terminal."""
    return UNPRINTABLE.sub(lambda found: found[0].encode("unicode_escape").decode(), text)
