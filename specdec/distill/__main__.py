"""Train draft models, draft heads and n-gram tables for a target model. Long steps resume where they stopped.

python -m specdec.distill corpus --target smollm2-135m --prompts sharegpt --folder work
python -m specdec.distill score  --target smollm2-135m --folder work
python -m specdec.distill head   --target smollm2-135m --folder work --out my-head
python -m specdec.distill head   --target smollm2-135m --folder work --out my-eagle3 --format eagle3
python -m specdec.distill draft  --target smollm2-135m --folder work --out my-draft
python -m specdec.distill table  --target smollm2-135m --folder work --out my-table
python -m specdec.distill compare --target smollm2-135m --folder work --head my-head
python -m specdec.distill tree   --target smollm2-135m --prompts held_out.jsonl --out my-tree
python -m specdec.distill convention --target org/model --draft org/its-eagle3-head
python -m specdec.distill calibration --target org/model --draft org/its-eagle3-head
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from specdec.distill import commands, heads, sources
from specdec.models.files.formats import DTYPE_NAMES
from specdec.runtime.command_line import Parser
from specdec.runtime.progress import replace_unencodable


def parser() -> Parser:
    """The command-line parser."""
    assert __doc__
    top = Parser("python -m specdec.distill", description=__doc__.splitlines()[0])
    verbs = top.add_subparsers(dest="verb", required=True)
    for name, run in commands.VERBS.items():
        verb = verbs.add_parser(name, help=(run.__doc__ or "").splitlines()[0])
        verb.set_defaults(run=run)
        verb.add_argument("--target", required=True, help="bundled model name, hub id or folder")
        if name not in ("tree", "convention", "calibration"):
            verb.add_argument("--folder", type=Path, required=True, help="folder of the corpus")
        verb.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N")
        verb.add_argument("--seed", type=int, default=0, help="random seed")
        if name == "corpus":
            _corpus_options(verb)
        if name == "tree":
            _tree_options(verb)
        if name in ("convention", "calibration"):
            _measured_options(verb)
        if name == "convention":
            verb.add_argument("--batch-size", type=int, default=16, help="prompts decoded at once")
        if name == "calibration":
            _calibration_options(verb)
        if name in ("head", "draft", "table", "tree"):
            verb.add_argument("--out", type=Path, required=True, help="output folder")
        if name == "compare":
            verb.add_argument("--head", type=Path, required=True, help="folder of a trained head")
        if name == "score":
            verb.add_argument(
                "--layers",
                type=int,
                nargs="*",
                help="further hidden states to store, 0 being the embeddings; without numbers: EAGLE-3's usual three",
            )
        if name == "head":
            _head_options(verb)
        if name == "table":
            verb.add_argument("--max-ngram", type=int, default=3, help="maximum context length in tokens")
            verb.add_argument(
                "--min-count", type=int, default=2, help="minimum number of occurrences of a continuation"
            )
        if name in ("head", "draft"):
            _training_options(verb)
    return top


def _corpus_options(verb: argparse.ArgumentParser) -> None:
    verb.add_argument(
        "--prompts", default="sharegpt", help="sharegpt, or a JSON lines file with fields prompt and reply"
    )
    verb.add_argument(
        "--evaluation", type=Path, nargs="*", default=[], help="evaluation files; overlapping training text is excluded"
    )
    verb.add_argument("--num-prompts", type=int, default=3072, help="number of prompts for the target to answer")
    verb.add_argument(
        "--num-replies", type=int, default=0, help="number of further dialogues used with their own reply"
    )
    verb.add_argument(
        "--num-about-texts", type=int, default=0, help="number of questions about a text for the target to answer"
    )
    verb.add_argument(
        "--kinds",
        nargs="*",
        default=[],
        metavar="KIND=N",
        help="further prompts for the target to answer: " + "; ".join(f"{k}: {v}" for k, v in sources.LICENCES.items()),
    )
    verb.add_argument(
        "--temperatures",
        type=float,
        nargs="+",
        default=[0.0, 0.7, 1.0],
        help="sampling temperatures, cycled over prompts",
    )
    verb.add_argument("--max-tokens", type=int, default=256, help="maximum tokens per answer")
    verb.add_argument("--batch-size", type=int, default=64, help="prompts decoded at once")
    verb.add_argument("--url", help="OpenAI-compatible server of the target that answers, such as vLLM's")
    verb.add_argument("--model", help="name of the target on that server (default: that of --target)")


def _tree_options(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("--draft", help="draft head or draft model (default: the head packaged with the target)")
    verb.add_argument("--prompts", default="sharegpt", help="sharegpt, or a JSON lines file with the field prompt")
    verb.add_argument("--num-prompts", type=int, default=32, help="number of prompts to measure on")
    verb.add_argument("--max-tokens", type=int, default=64, help="maximum tokens per answer")
    verb.add_argument("--temperatures", type=float, nargs="+", default=[0.0, 1.0], help="sampling temperatures")
    verb.add_argument(
        "--widths",
        type=int,
        nargs="+",
        default=[6, 3, 2, 1],
        help="children per node, by level, of the tree to measure",
    )
    verb.add_argument("--nodes", type=int, help="tree size (default: the fastest by step costs measured here)")
    verb.add_argument("--batch-size", type=int, default=1, help="prompts decoded at once")


def _measured_options(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("--draft", required=True, help="folder or hub id of a draft")
    verb.add_argument("--prompts", default="sharegpt", help="sharegpt, or a JSON lines file with the field prompt")
    verb.add_argument("--num-prompts", type=int, default=16, help="number of prompts to measure on")
    verb.add_argument("--max-tokens", type=int, default=64, help="maximum tokens per answer")
    verb.add_argument("--dtype", default="bfloat16", choices=DTYPE_NAMES, help="default: %(default)s")
    verb.add_argument(
        "--allow-pickle", action="store_true", help="read a head from .bin or .pt files; no code in them is run"
    )


def _calibration_options(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("--temperatures", type=float, nargs="+", default=[0.0, 1.0], help="sampling temperatures")
    verb.add_argument("--num-speculative-tokens", type=int, default=6, help="tokens per draft, at least 2")


def _head_options(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("--format", choices=heads.FORMATS, default="eagle", help="kind of head (default: %(default)s)")
    verb.add_argument("--dialect", help=f"how it is written: {heads.described_dialects()} (default: the first)")
    verb.add_argument("--vocabulary", type=int, default=16384, help="size of the draft vocabulary; mtp, dflash: all")
    verb.add_argument(
        "--feature-layers",
        type=int,
        nargs="+",
        help="hidden states that eagle3, p_eagle and dflash read (default: all that score stored)",
    )
    verb.add_argument("--num-layers", type=int, help="layers of the head (default: eagle3 1, p_eagle and dflash 2)")
    verb.add_argument(
        "--unroll", type=int, default=4, help="draft tokens that eagle3 and mtp learn (default: %(default)s)"
    )
    verb.add_argument(
        "--num-tokens", type=int, default=7, help="draft tokens of a p_eagle or dflash pass (default: %(default)s)"
    )
    verb.add_argument("--mask-token", type=int, help="token id of masks (default: the rarest in the corpus)")
    verb.add_argument("--train-output", action="store_true", help="train an output head of its own (eagle3, p_eagle)")
    verb.add_argument(
        "--share-output",
        action="store_true",
        help="leave the target's output head out of the folder: smaller, but vLLM needs it",
    )


def _training_options(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("--steps", type=int, default=2000, help="training steps")
    verb.add_argument("--tokens-per-batch", type=int, default=4096, help="tokens per training step")
    verb.add_argument("--learning-rate", type=float, default=3e-3, help="peak learning rate")
    verb.add_argument("--cost-ratio", type=float, help="draft step time / target step time (default: measured)")
    verb.add_argument("--evaluate-every", type=int, default=200, help="steps between evaluations")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one step. User errors are reported in one line, with exit status 2."""
    options = parser().parse_args(arguments)
    replace_unencodable(sys.stdout, sys.stderr)
    try:
        options.run(options)
    except (ValueError, OSError, commands.LoadError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
