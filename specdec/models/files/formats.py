"""Names of number formats and of ways to load weights. Nothing here needs torch."""

from __future__ import annotations

DTYPE_NAMES = ("bfloat16", "float16", "float32", "float64")
LOAD_FORMATS = ("auto", "dummy")
