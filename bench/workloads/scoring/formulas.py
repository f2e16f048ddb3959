r"""Whether a formula in an output equals the expected one, such as \frac{1}{2} and 0.5.

An output answers what is in its last \boxed{}, or without one what `math-verify` (Kydlíček 2024, Apache-2.0) finds in
it. That package also compares formulas, by sympy and within time limits of its own; it is an optional dependency.
"""

from __future__ import annotations

import importlib.util
import re

PACKAGE = "math_verify"
BRACE = re.compile(r"\\f?boxed\s*\{|[{}]")


def why_not() -> str | None:
    """Why formulas cannot be compared here; None if they can."""
    if importlib.util.find_spec(PACKAGE):
        return None
    return "formulas are compared by math-verify, which is not installed; pip install math-verify"


def is_equal(text: str, expected: str) -> bool:
    """Whether an output's formula equals the expected one. It raises for no output. expected: LaTeX without \\boxed."""
    from math_verify import parse, verify

    boxed = last_boxed(text)
    try:
        return bool(verify(parse(rf"\boxed{{{expected}}}"), parse(text if boxed is None else rf"\boxed{{{boxed}}}")))
    except Exception:  # its parsers have many; an output that is no formula is wrong
        return False


def last_boxed(text: str) -> str | None:
    r"""What the last \boxed{} of a text holds, with the braces inside; None without one that is closed."""
    opened: list[tuple[int, bool]] = []  # where the contents of open braces begin, and whether they are boxed
    last = (-1, -1)
    for brace in BRACE.finditer(text):
        if brace[0] != "}":
            opened.append((brace.end(), len(brace[0]) > 1))
        elif opened:
            begin, is_boxed = opened.pop()
            last = max(last, (begin, brace.start())) if is_boxed else last
    return text[slice(*last)] if last[0] >= 0 else None
