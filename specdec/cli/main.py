"""Answer or continue a prompt with speculative decoding, showing which tokens were drafted and accepted.

python -m specdec "Repeat this twice: def mean(values): return sum(values) / len(values)" --method hybrid --gamma auto
echo "Why is the sky blue?" | python -m specdec - --method hybrid --temperature 0.8 --marks
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from specdec.methods import DRAFT_SAMPLING_NAMES, METHODS, VERIFICATION_NAMES, is_method
from specdec.models.files.formats import DTYPE_NAMES, LOAD_FORMATS, OWN_QUANTIZATIONS, QUANTIZATIONS
from specdec.prompts import encode, encode_bytes, encode_raw, whole
from specdec.runtime.command_line import Parser
from specdec.runtime.progress import doing, replace_unencodable
from specdec.sampling_params import SamplingParams

if TYPE_CHECKING:  # importing torch takes seconds; report argument errors first
    from specdec.cli.screen import Paint
    from specdec.engine import Engine
    from specdec.requests import Chunk, Completion

INTERRUPTED, PIPE_CLOSED = 130, 141  # shell exit statuses for SIGINT and SIGPIPE
WARM_UP_TOKENS = 4


def parser() -> Parser:
    """The command-line parser."""
    assert __doc__
    top = Parser("specdec", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    top.add_argument("prompt", help="question, or with --raw a text to continue; - reads standard input")
    _model_options(top.add_argument_group("models and method"))
    _sampling_options(top.add_argument_group("sampling"))
    top.add_argument("--raw", action="store_true", help="do not apply the model's chat template")
    top.add_argument("--marks", action="store_true", help="mark tokens as [+accepted][~recovered][*bonus]plain")
    top.add_argument("--no-plain", action="store_true", help="skip the comparison with plain decoding")
    return top


def _model_options(group: Any) -> None:
    group.add_argument(
        "--target",
        default="smollm2-135m",
        help="bundled model name, hub id, folder or GGUF file (default: %(default)s)",
    )
    group.add_argument("--draft", help="draft model or head, for methods that need one (default: the packaged one)")
    methods = "; ".join(f"{spec.name}: {spec.summary}" for spec in METHODS.values())
    group.add_argument(
        "--method",
        type=_method,
        default="ngram",
        metavar="NAME",
        help=f"{methods}; or module:attribute of your own (default: %(default)s)",
    )
    group.add_argument(
        "--gamma", type=_gamma, default=4, help="tokens drafted per step, or auto (default: %(default)s)"
    )
    group.add_argument(
        "--verification", default="token", choices=VERIFICATION_NAMES, help="verification rule (default: %(default)s)"
    )
    group.add_argument(
        "--draft-sampling",
        default="probabilistic",
        choices=DRAFT_SAMPLING_NAMES,
        help="how a draft model or head chooses tokens above temperature 0 (default: %(default)s)",
    )
    group.add_argument("--dtype", default="bfloat16", choices=DTYPE_NAMES, help="default: %(default)s")
    group.add_argument(
        "--quantization",
        choices=(*OWN_QUANTIZATIONS, *QUANTIZATIONS),
        help="keep weights in fewer bits; auto: as the GGUF file has them (default: in the dtype)",
    )
    group.add_argument(
        "--draft-quantization",
        choices=("none", *OWN_QUANTIZATIONS, *QUANTIZATIONS),
        help="likewise for the draft (default: a draft model as the target, a head in the dtype)",
    )
    group.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: %(default)s)")
    group.add_argument(
        "--allow-pickle", action="store_true", help="read a head from .bin or .pt files; no code in them is run"
    )
    group.add_argument("--load-format", default="auto", choices=LOAD_FORMATS, help="auto, or dummy for random weights")


def _sampling_options(group: Any) -> None:
    group.add_argument("--temperature", type=float, default=0.0, help="0 is greedy (default: %(default)s)")
    group.add_argument("--top-p", type=float, default=1.0, help="1 keeps all tokens (default: %(default)s)")
    group.add_argument("--top-k", type=int, default=0, help="0 keeps all tokens (default: %(default)s)")
    group.add_argument("--min-p", type=float, default=0.0, help="0 keeps all tokens (default: %(default)s)")
    group.add_argument(
        "--max-tokens", type=int, default=128, help="maximum number of tokens to emit (default: %(default)s)"
    )
    group.add_argument("--seed", type=int, default=0, help="random seed (default: %(default)s)")
    group.add_argument("--ignore-eos", action="store_true", help="do not stop at the model's end-of-sequence token")


def _method(text: str) -> str:
    """Checked without an import of the method, which may take as long as torch."""
    if not is_method(text):
        raise argparse.ArgumentTypeError(f"invalid choice: {text!r} (choose from {', '.join(METHODS)})")
    return text


def _gamma(text: str) -> int | str:
    try:
        return text if text == "auto" else int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"gamma={text!r} must be an integer of at least 1, or auto") from None


def _sampling(options: argparse.Namespace) -> SamplingParams:
    names = ("temperature", "top_p", "top_k", "min_p", "max_tokens", "seed", "ignore_eos")
    return SamplingParams(**{name: getattr(options, name) for name in names})


def _load(options: argparse.Namespace) -> Engine:
    with doing("importing torch"):
        from specdec.engine import Engine

    return Engine.load(
        options.target,
        draft=options.draft,
        method=options.method,
        num_speculative_tokens=options.gamma,
        verification=options.verification,
        draft_sampling=options.draft_sampling,
        dtype=options.dtype,
        device=options.device,
        quantization=options.quantization,
        draft_quantization=options.draft_quantization,
        load_format=options.load_format,
        allow_pickle=options.allow_pickle,
    )


def _prompt(options: argparse.Namespace) -> str:
    text: str = sys.stdin.read() if options.prompt == "-" else options.prompt
    if not text.strip():
        raise ValueError(f"prompt={text!r} must not be empty; pass a text, or - to read standard input")
    return whole(text, "prompt")


class _Clocked:
    """Times a stream: counts seconds spent producing chunks, not consuming them."""

    def __init__(self, chunks: Iterator[Chunk]) -> None:
        self._chunks, self.seconds = chunks, 0.0
        self.completion: Completion | None = None

    def __iter__(self) -> Iterator[Chunk]:
        return self

    def __next__(self) -> Chunk:
        start_s = time.perf_counter()
        chunk = next(self._chunks)
        self.seconds += time.perf_counter() - start_s
        self.completion = chunk.completion
        return chunk


@dataclass(frozen=True, slots=True)
class Decoded:
    """A completion and the seconds it took."""

    completion: Completion
    seconds: float


def show(chunks: Iterator[Chunk], tokenizer: Any, paint: Paint) -> Decoded:
    """Write the tokens of one prompt to standard output as they are emitted."""
    from specdec.cli.screen import pieces

    stream = _Clocked(chunks)
    for text, source in pieces(stream, _decoder(tokenizer)):
        print(paint(text, source), end="", flush=True)
    print(flush=True)
    assert stream.completion is not None
    return Decoded(stream.completion, stream.seconds)


def decode_plainly(target: Any, prompt: Sequence[int], sampling: SamplingParams, verification: str) -> Decoded:
    """Decode the same prompt with the same target and no drafts."""
    from specdec.engine import Engine
    from specdec.runtime.progress import bar

    plain = Engine(target, method="autoregressive", verification=verification)
    _warm_up(plain, prompt, sampling)
    stream = _Clocked(plain.stream([prompt], sampling))
    with bar(sampling.max_tokens, "token", "plain decoding for comparison") as done:
        for chunk in stream:
            done.update(len(chunk.token_ids))
    assert stream.completion is not None
    return Decoded(stream.completion, stream.seconds)


def _warm_up(engine: Engine, prompt: Sequence[int], sampling: SamplingParams) -> None:
    """Run the first, slower calls before timing, on another prompt of the same length."""
    short = SamplingParams(temperature=sampling.temperature, max_tokens=min(WARM_UP_TOKENS, sampling.max_tokens))
    engine.generate([[prompt[0]] * len(prompt)], short)


def _decoder(tokenizer: Any) -> Callable[[Sequence[int]], str]:
    if tokenizer is None:
        return lambda tokens: "".join(f"{token} " for token in tokens)
    return lambda tokens: str(tokenizer.decode(tokens, skip_special_tokens=True))


def summary(completion: Completion, paint: Paint) -> list[str]:
    """A summary of the tokens' sources, as lines of text."""
    from specdec.cli.screen import SOURCES

    counts = completion.counts
    by_source = {source: completion.sources.count(source) for source in SOURCES}
    legend = paint.legend({source: f"{number} {source}" for source, number in by_source.items()})
    rate = "no tokens drafted"
    if counts.acceptance_rate is not None:
        rate = f"{counts.num_accepted} of {counts.num_drafted} draft tokens accepted ({counts.acceptance_rate:.1%})"
    per_call = f", {counts.mean_acceptance_length:.2f} tokens per target call" if counts.num_steps else ""
    return [f"{len(completion.token_ids)} tokens: {legend}", f"{rate}{per_call}"]


def comparison(decoded: Decoded, plain: Decoded, *, must_agree: bool) -> list[str]:
    """Speed-up per token over plain decoding, and whether the outputs are equal.

    must_agree: whether they should be equal: at temperature 0, and with coupled verification.
    """
    ids, plain_ids = decoded.completion.token_ids, plain.completion.token_ids
    speedup = (plain.seconds / len(plain_ids)) / (decoded.seconds / len(ids))
    lines = [
        f"{speedup:.2f}x the speed of plain decoding (one prompt, timed once; not a benchmark)",
        f"{decoded.seconds:.2f} s for {len(ids)} tokens, plain decoding {plain.seconds:.2f} s for {len(plain_ids)}",
    ]
    return lines + ([_agreement(ids, plain_ids)] if must_agree else [])


def _agreement(ids: Sequence[int], plain_ids: Sequence[int]) -> str:
    if ids == plain_ids:
        return "same tokens as plain decoding"
    both = list(zip(ids, plain_ids, strict=False))
    at = next((at for at, (one, other) in enumerate(both) if one != other), len(both))
    return (
        f"tokens differ from plain decoding from token {at + 1} on: 16-bit rounding can flip a near tie; "
        "with --dtype float32 it should not"
    )


def run(options: argparse.Namespace) -> None:
    """Decode a prompt: print the text to standard output and statistics to standard error."""
    text, sampling = _prompt(options), _sampling(options)
    engine = _load(options)
    from specdec.cli.screen import Paint, has_colors

    tokenizer = engine.tokenizer
    prompt = _encoded(text, tokenizer, options)
    engine.stream([prompt], sampling).close()  # validates the arguments before decoding
    with doing("warming up"):
        _warm_up(engine, prompt, sampling)
    chunks = engine.stream([prompt], sampling)
    about = Paint(has_colors(sys.stderr), options.marks)
    if about.shows:
        _say([about.legend()])
    decoded = show(chunks, tokenizer, Paint(has_colors(sys.stdout), options.marks))
    _say(["", *summary(decoded.completion, about)])
    if options.method != "autoregressive" and not options.no_plain:
        plain = decode_plainly(engine.target, prompt, sampling, options.verification)
        must_agree = sampling.temperature == 0 or options.verification == "coupled"
        _say(comparison(decoded, plain, must_agree=must_agree))


def _encoded(text: str, tokenizer: Any, options: argparse.Namespace) -> tuple[int, ...]:
    if tokenizer is None and options.load_format == "dummy":
        return encode_bytes(text)
    return encode_raw(text, tokenizer) if options.raw else encode(text, tokenizer)


def _say(lines: Sequence[str]) -> None:
    print("\n".join(lines), file=sys.stderr, flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line. Exit status: 0; 2 for user errors, reported in one line; 130 or 141 for signals."""
    options = parser().parse_args(arguments)
    replace_unencodable(sys.stdout, sys.stderr)
    try:
        run(options)
    except KeyboardInterrupt:
        print()
        return INTERRUPTED
    except BrokenPipeError:
        _leave_pipes()
        return PIPE_CLOSED
    except (ValueError, OSError, ImportError, FloatingPointError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not _is_load_error(error):
            raise
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _is_load_error(error: RuntimeError) -> bool:
    from specdec.runtime.artifacts import LoadError

    return isinstance(error, LoadError)


def _leave_pipes() -> None:
    """Redirect output to devnull, so that the interpreter's final flush does not fail again."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (sys.stdout, sys.stderr):
        os.dup2(nowhere, stream.fileno())


if __name__ == "__main__":
    sys.exit(main())
