"""Compare a model's logits for the same text under different step widths, batches, chunks and caches."""

from __future__ import annotations

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `rows`."""
    parser.add_argument("--target", default="smollm2-135m", help="bundled model name, hub id, folder or GGUF file")


def run(arguments: argparse.Namespace) -> int:
    """Run `rows`; returns the exit status."""
    raise ValueError(f"rows of {arguments.target} are not compared yet")
