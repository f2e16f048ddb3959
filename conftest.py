"""Shared by tests/ and bench/: quiet libraries, and an error instead of a fallback to slower code."""

import os

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("SPECDEC_STRICT", "1")  # see specdec/runtime/fallbacks.py
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
