"""Train drafts for a target model. The steps that take long go on where they were stopped.

python -m specdec.distill corpus --target smollm2-135m --prompts sharegpt --folder work
python -m specdec.distill score  --target smollm2-135m --folder work
python -m specdec.distill head   --target smollm2-135m --folder work --out my-head
python -m specdec.distill draft  --target smollm2-135m --folder work --out my-draft
python -m specdec.distill table  --target smollm2-135m --folder work --out my-table
python -m specdec.distill compare --target smollm2-135m --folder work --head my-head
python -m specdec.distill tree   --target smollm2-135m --prompts held_out.jsonl --out my-tree
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from specdec.distill import commands
from specdec.runtime.progress import show_what_can_be_shown


def parser() -> argparse.ArgumentParser:
    """The command line."""
    assert __doc__
    top = argparse.ArgumentParser("python -m specdec.distill", description=__doc__.splitlines()[0])
    verbs = top.add_subparsers(dest="verb", required=True)
    for name, run in commands.VERBS.items():
        verb = verbs.add_parser(name, help=(run.__doc__ or "").splitlines()[0])
        verb.set_defaults(run=run)
        verb.add_argument("--target", required=True, help="a bundled name, a hub id or a folder")
        if name != "tree":
            verb.add_argument("--folder", type=Path, required=True, help="where the corpus is")
        verb.add_argument("--device", default="cpu")
        verb.add_argument("--seed", type=int, default=0)
        if name == "corpus":
            _corpus_options(verb)
        if name == "tree":
            _tree_options(verb)
        if name in ("head", "draft", "table", "tree"):
            verb.add_argument("--out", type=Path, required=True, help="where the result is written")
        if name == "compare":
            verb.add_argument("--head", type=Path, required=True, help="a head that was trained")
        if name == "head":
            verb.add_argument("--vocabulary", type=int, default=16384, help="tokens that the head drafts")
        if name == "table":
            verb.add_argument("--max-ngram", type=int, default=3, help="longest context, in tokens")
            verb.add_argument("--min-count", type=int, default=2, help="how often a continuation must have been seen")
        if name in ("head", "draft"):
            _training_options(verb)
    return top


def _corpus_options(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("--prompts", default="sharegpt", help="sharegpt, or a file of JSON lines with prompt and reply")
    verb.add_argument("--evaluation", type=Path, nargs="*", default=[], help="files whose text must not be learnt")
    verb.add_argument("--num-prompts", type=int, default=3072, help="that the target answers")
    verb.add_argument("--num-replies", type=int, default=0, help="further answers that are taken as they are")
    verb.add_argument("--num-about-texts", type=int, default=0, help="questions about a text, that the target answers")
    verb.add_argument("--temperatures", type=float, nargs="+", default=[0.0, 0.7, 1.0])
    verb.add_argument("--max-tokens", type=int, default=256, help="of an answer")
    verb.add_argument("--batch-size", type=int, default=64)


def _tree_options(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("--draft", help="a head or a draft model (default: the head that comes with the target)")
    verb.add_argument("--prompts", default="sharegpt", help="sharegpt, or a file of JSON lines with prompt")
    verb.add_argument("--num-prompts", type=int, default=32)
    verb.add_argument("--max-tokens", type=int, default=64, help="of an answer")
    verb.add_argument("--temperatures", type=float, nargs="+", default=[0.0, 1.0])
    verb.add_argument("--widths", type=int, nargs="+", default=[6, 3, 2, 1], help="children by level, to measure with")
    verb.add_argument("--nodes", type=int, help="of the tree (default: as many as pay by costs measured here)")
    verb.add_argument("--batch-size", type=int, default=1)


def _training_options(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("--steps", type=int, default=2000)
    verb.add_argument("--tokens-per-batch", type=int, default=4096)
    verb.add_argument("--learning-rate", type=float, default=3e-3)
    verb.add_argument("--cost-ratio", type=float, help="time of a draft step over a target step (default: measured)")
    verb.add_argument("--evaluate-every", type=int, default=200, help="in steps")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one step; what a user got wrong is said in one line."""
    options = parser().parse_args(arguments)
    show_what_can_be_shown(sys.stdout, sys.stderr)
    try:
        options.run(options)
    except (ValueError, OSError, commands.LoadError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
