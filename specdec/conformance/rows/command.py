"""Compare a model's logits for the same text under different step widths, batches, chunks and caches."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from specdec.models.files.formats import DTYPE_NAMES, LOAD_FORMATS
from specdec.runtime.checks import require
from specdec.runtime.extensions import is_extension

if TYPE_CHECKING:  # importing torch takes seconds; report argument errors first
    from specdec.conformance.rows.report import Record
    from specdec.conformance.rows.run import Subject
    from specdec.conformance.rows.texts import Choice

IMPLEMENTATIONS = ("specdec", "transformers")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `rows`."""
    add = parser.add_argument
    add("--target", default="smollm2-135m", help="bundled model name, hub id, folder or GGUF file")
    add("--dtype", default="bfloat16", choices=DTYPE_NAMES, help="default: %(default)s")
    add("--load-format", default="auto", choices=LOAD_FORMATS, help="auto, or dummy for random weights")
    add(
        "--implementation",
        type=_implementation,
        default="specdec",
        metavar="NAME",
        help="specdec, transformers, or module:function that takes a dtype's name and returns a scorer of the target "
        "(default: %(default)s)",
    )
    add("--no-kernels", action="store_true", help="of specdec: transformers' layers instead of the fused ones")
    add("--gamma", type=int, default=4, help="draft tokens of a speculative step (default: %(default)s)")
    add("--batch-size", type=int, default=4, help="rows of a batch (default: %(default)s)")
    add("--chunk", type=int, default=7, help="tokens per call of a prompt in chunks (default: %(default)s)")
    add("--prompts", default="sharegpt", help="sharegpt, or a JSON lines file with the field prompt")
    add("--num-texts", type=int, default=8, help="texts to compare on (default: %(default)s)")
    add("--num-tokens", type=int, default=32, help="tokens compared after each prompt (default: %(default)s)")
    add("--max-prompt", type=int, default=256, help="longer prompts are not used (default: %(default)s)")
    add("--context", type=int, help="join prompts to this many tokens, to reach beyond a window (default: as they are)")
    add("--seed", type=int, default=0, help="of the choice of prompts (default: %(default)s)")
    add("--no-float32", action="store_true", help="do not run the same code in float32: faster, but misses small bugs")
    add("--require", default="rounding", choices=("bit-equal", "rounding"), help="default: %(default)s")
    add("--json", type=Path, metavar="FILE", help="write the result here, too")


def _implementation(text: str) -> str:
    if text not in IMPLEMENTATIONS and not is_extension("specdec.scorers", text):
        raise argparse.ArgumentTypeError(
            f"invalid choice: {text!r} (choose from {', '.join(IMPLEMENTATIONS)}, or module:function)"
        )
    return text


def run(arguments: argparse.Namespace) -> int:
    """Print the comparison. Exit status: 0 if the verdict is as good as required, else 1."""
    choice = _checked(arguments)
    record = _compare(arguments, choice)
    from specdec.conformance.rows.report import markdown, meets, write_json

    print(markdown(record))
    if arguments.json:
        write_json(record, arguments.json)
    return 0 if meets(record["verdict"], arguments.require) else 1


def _checked(arguments: argparse.Namespace) -> Choice:
    """Raise ValueError for numbers out of range. Returns which texts to use."""
    least = {"gamma": 1, "batch_size": 2, "chunk": 1, "num_texts": 2, "num_tokens": 2, "max_prompt": 2, "context": 2}
    for name, value in least.items():
        given = getattr(arguments, name)
        option = f"--{name.replace('_', '-')}"
        require(given is None or given >= value, f"{option}={given} must be at least {value}")
    folder = arguments.json.parent if arguments.json else Path()
    require(folder.is_dir(), f"--json={arguments.json} must be in a folder that exists; create {folder}")
    from specdec.conformance.rows.texts import Choice

    names = ("prompts", "num_texts", "num_tokens", "max_prompt", "context", "seed")
    return Choice(**{name: getattr(arguments, name) for name in names})


def _compare(arguments: argparse.Namespace, choice: Choice) -> Record:
    import torch

    from specdec.conformance.rows.arrangements import arrangements
    from specdec.conformance.rows.run import compare
    from specdec.conformance.rows.texts import choose_texts

    dtype = getattr(torch, arguments.dtype)
    texts = choose_texts(choice, *_pretrained(arguments, dtype))
    tried = arrangements(arguments.gamma, arguments.batch_size, arguments.chunk)
    subject, description = _subject(arguments)
    found = compare(subject, texts, tried, dtype, in_float32=not arguments.no_float32)
    lengths = [len(text.prompt) for text in texts]
    return {
        **{"target": arguments.target, "implementation": description, "dtype": arguments.dtype},
        **{"prompts": arguments.prompts, "seed": arguments.seed, "num_speculative_tokens": arguments.gamma},
        **{"num_texts": len(texts), "num_tokens": arguments.num_tokens},
        "prompt_tokens": f"{min(lengths)} to {max(lengths)}",
        **found,
    }


def _pretrained(arguments: argparse.Namespace, dtype: Any) -> tuple[Any, Any]:
    from specdec.models.loading import load_pretrained

    return load_pretrained(arguments.target, dtype=dtype, load_format=arguments.load_format)


def _subject(arguments: argparse.Namespace) -> tuple[Subject, str]:
    """What is tested, and its description."""
    from specdec.conformance.rows.run import Subject
    from specdec.conformance.rows.scorers import TransformersScorer, in_float64

    def ordinary(dtype: Any) -> TransformersScorer:
        return TransformersScorer(_pretrained(arguments, dtype)[0])

    def exact(dtype: Any) -> TransformersScorer:
        return TransformersScorer(in_float64(_pretrained(arguments, dtype)[0]))

    if arguments.implementation == "transformers":
        return Subject(ordinary, ordinary, exact), "transformers"
    if arguments.implementation != "specdec":
        return Subject(_of_reference(arguments.implementation), ordinary, exact), arguments.implementation
    kernels = "without kernels" if arguments.no_kernels else "with kernels"
    return Subject(_own(arguments), ordinary, exact), f"specdec {kernels}"


def _own(arguments: argparse.Namespace) -> Any:
    """A function that loads this library's model in a dtype, as an engine does."""
    from specdec.conformance.rows.scorers import ModelScorer
    from specdec.drafts import load_with_drafts
    from specdec.models.causal import CausalLM

    def load(dtype: Any) -> ModelScorer:
        if arguments.no_kernels:
            return ModelScorer(CausalLM(*_pretrained(arguments, dtype)))
        options = {"dtype": dtype, "device": "cpu", "load_format": arguments.load_format}
        return ModelScorer(load_with_drafts(arguments.target, [], **options)[0])

    return load


def _of_reference(name: str) -> Any:
    """A function that loads the scorer of `module:function` in a dtype."""
    from specdec.runtime import extensions

    make = extensions.load("specdec.scorers", name, callable, "a function that takes a dtype's name")
    return lambda dtype: make(str(dtype).removeprefix("torch."))
