"""The names that an engine takes: drafting methods and verification rules. Nothing here needs torch."""

from __future__ import annotations

from typing import Literal, get_args

Method = Literal[
    "autoregressive",
    "draft_model",
    "eagle",
    "early_exit",
    "ngram",
    "ngram_store",
    "ngram_table",
    "suffix",
    "hybrid",
    "tree",
]
METHODS: tuple[Method, ...] = get_args(Method)
VERIFICATION_NAMES = ("token", "block", "coupled")
DTYPE_NAMES = ("bfloat16", "float16", "float32", "float64")
LOAD_FORMATS = ("auto", "dummy")
