"""Shared by tests/ and bench/: Hypothesis profiles, quiet libraries, and no slower way that is taken unnoticed."""

import os

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("SPECDEC_STRICT", "1")  # see specdec/runtime/fallbacks.py
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


def pytest_configure() -> None:
    try:
        from hypothesis import settings
    except ModuleNotFoundError:  # bench/ does not need it
        return
    # no deadline: the machine may be busy. derandomize: CI shows the same examples to everybody
    settings.register_profile("dev", deadline=None, max_examples=100)
    settings.register_profile("ci", deadline=None, max_examples=200, derandomize=True, print_blob=True)
    settings.load_profile("ci" if os.environ.get("CI") else "dev")
