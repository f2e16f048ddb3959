"""The command line of `pytest bench/`, declared once.

Each option also has an environment variable, SPECDEC_<OPTION>, and a key specdec_<option> in the ini file. The command
line wins over the environment, that over the ini file, and that over the default.
"""

from __future__ import annotations

import json
import math
import os
import shlex
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from bench.campaign.arrivals import PROCESSES, Limits, Process
from bench.catalogue.methods import VLLM_METHODS
from bench.catalogue.pairs import Pair, parse_pairs
from bench.engines.base import VllmOptions
from bench.engines.process import SECRET
from bench.engines.registry import ENGINES, parse_engine, parse_method
from bench.records.schema import MAX_PARTS, Gamma
from bench.workloads.base import Lengths
from bench.workloads.registry import parse_workloads
from specdec.methods import METHODS
from specdec.models.loading import QUANTISATIONS as LOADABLE
from specdec.models.placement import parse as parse_placement

QUANTISATIONS = ("none", *LOADABLE)
DTYPES = ("auto", "bfloat16", "float16", "float32")
VLLM_RESERVED = {  # key of --vllm-options -> what to use instead
    "model": "use --pairs",
    "dtype": "use --dtype",
    "load_format": "use a pair of bench/catalogue/pairs.toml that has one",
    "enable_prefix_caching": "prompts come again in every cell, and no other engine remembers them",
    "disable_log_stats": "without them vLLM counts nothing",
    "speculative_config.model": "use --pairs",
    "speculative_config.method": "use --methods",
    "speculative_config.num_speculative_tokens": "use --gammas",
}
VERIFICATIONS = tuple(dict.fromkeys(rule for kind in ENGINES.values() for rule in kind.verifications))


@dataclass(frozen=True, slots=True)
class BenchConfig:
    """What to measure.

    The fields are the options of the command line by the same names. command: to repeat the run.
    `named`: the options that were given, on the command line or elsewhere; what is named and cannot run is an error,
    what is a default is skipped.
    """

    engines: tuple[str, ...]
    pairs: tuple[Pair, ...]
    methods: tuple[str, ...]
    gammas: tuple[Gamma, ...]
    placements: tuple[str, ...]
    workloads: tuple[str, ...]
    data_dir: Path | None
    malformed: str
    prompt_format: str
    prompt_lengths: tuple[Lengths, ...]
    allow_code_execution: bool
    num_prompts: int
    max_tokens: int
    batch_sizes: tuple[int, ...]
    rate: tuple[float, ...]
    duration: float
    arrivals: Process
    drain: float
    ttft_limit: float
    inter_token_limit: float
    temperature: float
    top_p: float
    top_k: int
    seed: int
    dtype: str
    device: str
    verification: str
    synthetic_acceptance_rates: tuple[float, ...]
    vllm_python: Path | None
    vllm_options: str
    server_url: str | None
    num_draws: int
    max_tv: float
    certificates: Path
    telemetry_hz: float
    quantisation: str
    shard: str | None
    journal: Path
    resume: bool
    smoke: bool
    command: str = ""
    named: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        largest = max(self.batch_sizes)
        if largest > self.num_prompts and not self.rate:
            raise ValueError(
                f"batch_sizes={largest} must be at most num_prompts={self.num_prompts}; "
                "raise --num-prompts or lower --batch-sizes"
            )

    @property
    def vllm(self) -> VllmOptions:
        """How vLLM is had."""
        return VllmOptions(self.vllm_python, self.vllm_options, self.server_url)

    @property
    def limits(self) -> Limits:
        """What a request must keep for the goodput."""
        return Limits(self.ttft_limit, self.inter_token_limit)

    @property
    def reference_engine(self) -> str:
        """The engine that the others are compared with: the first one."""
        return self.engines[0]

    def dtype_of(self, pair: Pair) -> str:
        """The number format of a pair's weights."""
        return pair.dtype if self.dtype == "auto" else self.dtype


Parse = Callable[[str, str], Any]  # (name of the option, its text) -> its value


@dataclass(frozen=True, slots=True)
class Option:
    """One option: its name with dashes, what its text means, its default, its default under --smoke, its help."""

    name: str
    parse: Parse
    default: str
    help: str
    smoke: str | None = None
    is_flag: bool = False

    @property
    def field(self) -> str:
        return self.name.replace("-", "_")

    @property
    def variable(self) -> str:
        return f"SPECDEC_{self.field.upper()}"

    @property
    def key(self) -> str:
        return f"specdec_{self.field}"


def _one_of(allowed: Sequence[str]) -> Parse:
    def parse(name: str, text: str) -> str:
        _require(text in allowed, f"{name}={text!r} must be {' or '.join(allowed)}; no other is implemented")
        return text

    return parse


def _integer(least: int, remedy: str, most: int | None = None) -> Parse:
    """An integer of at least `least`, and below `most`."""

    def parse(name: str, text: str) -> int:
        rule = f"{name}={text} must be an integer of at least {least}" + (f" and below {most}" if most else "")
        try:
            value = int(text)
        except ValueError:
            raise ValueError(f"{rule}; {remedy}") from None
        _require(value >= least and (most is None or value < most), f"{rule}; {remedy}")
        return value

    return parse


def _integers(least: int, remedy: str) -> Parse:
    """A list of distinct integers."""
    parse_one = _integer(least, remedy)
    return lambda name, text: _distinct(name, tuple(parse_one(name, item.strip()) for item in text.split(",")))


def _number(holds: Callable[[float], bool], rule: str) -> Parse:
    """A finite number with a rule."""

    def parse(name: str, text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        _require(math.isfinite(value) and holds(value), f"{name}={text} must be {rule}")
        return value

    return parse


def _device(name: str, text: str) -> str:
    kind, _, index = text.partition(":")
    _require(
        text in ("auto", "cpu") or (kind == "cuda" and (index.isdigit() or text == "cuda")),
        f"{name}={text!r} must be auto, cpu, cuda or cuda:N; check the spelling",
    )
    return text


def _flag(name: str, text: str) -> bool:
    values = {"1": True, "true": True, "yes": True, "0": False, "false": False, "no": False, "": False}
    _require(text.lower() in values, f"{name}={text!r} must be true or false; use 1 or 0")
    return values[text.lower()]


OPTIONS = (
    Option(
        "engines",
        lambda name, text: _distinct(name, tuple(parse_engine(name, item.strip()) for item in text.split(","))),
        "specdec,transformers,vllm",
        "engines to measure; the first is the reference that the others are compared with",
    ),
    Option(
        "pairs",
        lambda name, text: parse_pairs(text),
        "smollm2-135m",
        "model pairs: names of bench/catalogue/pairs.toml, or target=MODEL,draft=MODEL",
        smoke="tiny-random",
    ),
    Option(
        "methods",
        lambda name, text: _distinct(name, tuple(parse_method(name, item.strip()) for item in text.split(","))),
        "autoregressive,ngram,draft_model",
        f"ways to propose tokens; for vllm also {', '.join(VLLM_METHODS)}",
        smoke=",".join(METHODS),
    ),
    Option(
        "gammas",
        lambda name, text: _gammas(name, text),
        "2,4,8",
        "tokens proposed per step; auto: as many as pay",
        smoke="2",
    ),
    Option(
        "placements",
        lambda name, text: _placements(name, text),
        "same",
        "where target and draft run: same, separate (on a GPU each), ratio:T:D (T GPUs for the target's layers, D for "
        "the draft's), auto (as few as hold them)",
    ),
    Option(
        "workloads",
        parse_workloads,
        "humaneval",
        "prompts: humaneval, gsm8k, spec_bench, sharegpt, xsum, cnn_dailymail, wmt14, one category such as "
        "spec_bench:rag, or a file (JSON lines with `prompt`, or one prompt a line)",
        smoke="smoke",
    ),
    Option("data-dir", lambda name, text: _data_dir(name, text), "", "folder with the data sets' files"),
    Option(
        "malformed", _one_of(("refuse", "skip")), "refuse", "what is done about malformed rows; skipped are counted"
    ),
    Option(
        "prompt-format",
        _one_of(("instruct", "raw")),
        "instruct",
        "instruct: a request, by the tokenizer's chat template if it has one; raw: a text to go on with",
    ),
    Option(
        "prompt-lengths",
        lambda name, text: _ranges(name, text),
        "",
        "MIN:MAX, only prompts of so many tokens, template included, in the reference engine's tokenizer; a list gives "
        "each workload a cell for each of these buckets",
    ),
    Option(
        "allow-code-execution",
        _flag,
        "0",
        "run the code that models write, shut in, to see whether it is right (humaneval)",
        is_flag=True,
    ),
    Option("num-prompts", _integer(1, "name how many prompts to measure"), "8", "prompts per cell", smoke="2"),
    Option(
        "max-tokens",
        _integer(2, "the first token comes from the prefill, so speculation needs two"),
        "64",
        "tokens to emit per prompt at the most",
        smoke="8",
    ),
    Option(
        "batch-sizes",
        _integers(1, "use 1 for one prompt at a time"),
        "1",
        "prompts decoded together; with --rate at the most",
    ),
    Option(
        "rate",
        lambda name, text: _arrival_rates(name, text),
        "",
        "open-loop load: so many requests a second, whether or not earlier ones are done; a list is a sweep. Instead "
        "of a fixed number of prompts, for engines specdec and vllm-server",
    ),
    Option(
        "duration",
        _number(lambda value: value > 0, "> 0 seconds and finite"),
        "30",
        "with --rate: seconds in which requests arrive",
        smoke="1",
    ),
    Option(
        "arrivals",
        _one_of(PROCESSES),
        "poisson",
        "with --rate: exponential gaps (poisson), the same for every method, or equal ones (constant)",
    ),
    Option(
        "drain",
        _number(lambda value: value >= 0, ">= 0 seconds and finite"),
        "60",
        "with --rate: seconds after --duration until requests that are not done are given up and counted",
    ),
    Option(
        "ttft-limit",
        _number(lambda value: value > 0, "> 0 seconds and finite"),
        "2",
        "with --rate: seconds to the first token, waiting included, that a request of the goodput takes at the most",
    ),
    Option(
        "inter-token-limit",
        _number(lambda value: value > 0, "> 0 seconds and finite"),
        "0.2",
        "with --rate: likewise seconds from a token to the next, its mean over a request. The defaults of both are "
        "those of MLPerf Inference for Llama 2 70B (server scenario)",
    ),
    Option(
        "temperature",
        _number(lambda value: value >= 0, "finite and >= 0; use 0 for greedy decoding"),
        "0",
        "sampling temperature; 0 is greedy",
    ),
    Option(
        "top-p",
        _number(lambda value: 0 < value <= 1, "in (0, 1]; use 1 to keep all tokens"),
        "1",
        "nucleus sampling; 1 keeps all tokens",
    ),
    Option("top-k", _integer(0, "use 0 to keep all tokens"), "0", "keep the k likeliest tokens; 0 keeps all"),
    Option("seed", _integer(0, "any such number will do", most=2**32), "0", "chooses the prompts and the samples"),
    Option("dtype", _one_of(DTYPES), "auto", f"weights: {', '.join(DTYPES)}; auto is the pair's own"),
    Option("device", _device, "auto", "auto, cpu, cuda or cuda:N"),
    Option(
        "quantisation",
        _one_of(QUANTISATIONS),
        "none",
        f"weights of specdec and transformers in fewer bits: {', '.join(QUANTISATIONS)}; vLLM has options of its own",
    ),
    Option(
        "synthetic-acceptance-rates",
        lambda name, text: _rates(name, text),
        "",
        "accept draft position i with the i-th probability instead of verifying: times of shapes, not a model's output",
    ),
    Option(
        "vllm-python",
        lambda name, text: _interpreter(name, text),
        "",
        "the Python interpreter that has vLLM, of another virtual environment; none is this one",
    ),
    Option(
        "vllm-options",
        lambda name, text: _vllm_options(name, text),
        "{}",
        "JSON object of vLLM's engine arguments such as tensor_parallel_size, enforce_eager, gpu_memory_utilization, "
        "max_model_len, max_num_seqs; its speculative_config is of drafting methods, such as draft_sample_method",
    ),
    Option(
        "server-url",
        lambda name, text: _url(name, text),
        "",
        "a vLLM server that is up, for engine vllm-server; none starts one. Its API key, if it asks for one, is read "
        "from SPECDEC_SERVER_API_KEY",
    ),
    Option("verification", _one_of(VERIFICATIONS), "token", "rule that verifies a draft"),
    Option(
        "num-draws",
        _integer(1, "an audit needs thousands of tokens"),
        "20000",
        "with -m equivalence: tokens of each arm that an audit judges",
        smoke="300",
    ),
    Option(
        "max-tv",
        _number(lambda value: 0 < value < 1, "between 0 and 1, a distance of total variation"),
        "0.05",
        "with -m equivalence: the least distance that an audit must be able to see to call an engine lossless",
    ),
    Option(
        "certificates",
        lambda name, text: Path(text),
        ".benchmarks/certificates",
        "with -m equivalence: folder for a certificate of each cell, as JSON and as a page to read",
    ),
    Option(
        "telemetry-hz",
        _number(lambda value: 0 <= value <= 100, "from 0 to 100; use 0 to sample nothing"),
        "10",
        "samples a second of power, utilisation, memory and temperature; 0 is none",
    ),
    Option(
        "shard",
        lambda name, text: _shard(name, text),
        "",
        "I/N, the I-th of N parts of the cells, each for a machine of its own; a cell's part depends on nothing else",
    ),
    Option(
        "journal",
        lambda name, text: Path(text),
        ".benchmarks/journal.jsonl",
        "file that keeps each finished cell at once",
        smoke=".benchmarks/journal-smoke.jsonl",
    ),
    Option("resume", _flag, "0", "take finished cells from the journal instead of measuring them again", is_flag=True),
    Option("smoke", _flag, "0", "seconds: a tiny random model, two prompts, every method", is_flag=True),
)


def add_options(parser: pytest.Parser) -> None:
    """Declare the options and their ini keys to pytest."""
    group = parser.getgroup("specdec", "speculative decoding benchmarks")
    for option in OPTIONS:
        kind: dict[str, Any] = {"action": "store_const", "const": "1"} if option.is_flag else {"metavar": "VALUE"}
        group.addoption(
            f"--{option.name}",
            dest=option.key,
            default=None,
            help=f"{option.help} (default {option.default or 'none'}; env {option.variable})",
            **kind,
        )
        parser.addini(option.key, f"default of --{option.name}", default=None)


def parse_config(config: pytest.Config, environment: Mapping[str, str] = os.environ) -> BenchConfig:
    """The options of this run. Raises ValueError naming the option, its value, the rule and the remedy."""
    texts = {option: _given(option, config, environment) for option in OPTIONS}
    smoke_option = next(option for option in OPTIONS if option.name == "smoke")
    is_smoke = _flag("smoke", texts[smoke_option] or smoke_option.default)
    values = {}
    for option, text in texts.items():
        default = option.smoke if is_smoke and option.smoke is not None else option.default
        values[option.field] = option.parse(option.field, default if text is None else text)
    named = frozenset(option.field for option, text in texts.items() if text is not None)
    paths = {name: values[name] for name in ("journal", "certificates")}
    values |= {name: path if name in named else config.rootpath / path for name, path in paths.items()}
    return BenchConfig(**values, command=shlex.join(["pytest", *config.invocation_params.args]), named=named)


def _given(option: Option, config: pytest.Config, environment: Mapping[str, str]) -> str | None:
    text = config.getoption(option.key, default=None)
    if text is None:
        text = environment.get(option.variable)
    return text if text is not None else config.getini(option.key) or None


def _gammas(name: str, text: str) -> tuple[Gamma, ...]:
    parse_one = _integer(1, "for plain decoding use --methods autoregressive, for as many as pay auto")
    items = (item.strip() for item in text.split(","))
    return _distinct(name, tuple(item if item == "auto" else parse_one(name, item) for item in items))


def _placements(name: str, text: str) -> tuple[str, ...]:
    placements = _distinct(name, tuple(item.strip() for item in text.split(",")))
    for placement in placements:
        parse_placement(placement)
    return placements


def _rates(name: str, text: str) -> tuple[float, ...]:
    parse_one = _number(lambda value: 0 <= value <= 1, "a list of probabilities")
    rates = tuple(parse_one(name, item.strip()) for item in text.split(",")) if text else ()
    _require(list(rates) == sorted(rates, reverse=True), f"{name}={text} must not rise: a rate counts all steps")
    return rates


def _arrival_rates(name: str, text: str) -> tuple[float, ...]:
    parse_one = _number(lambda value: value > 0, "> 0 requests a second and finite; leave it out for a fixed number")
    return _distinct(name, tuple(parse_one(name, item.strip()) for item in text.split(","))) if text else ()


def _shard(name: str, text: str) -> str | None:
    index, _, number = text.partition("/")
    are_numbers = all(part.isdecimal() and len(part) <= len(str(MAX_PARTS)) for part in (index, number))
    _require(
        not text or (are_numbers and 1 <= int(index) <= int(number) <= MAX_PARTS),
        f"{name}={text!r} must be I/N with 1 <= I <= N <= {MAX_PARTS}; for example 1/3, and 2/3, 3/3 elsewhere",
    )
    return f"{int(index)}/{int(number)}" if text else None


def _ranges(name: str, text: str) -> tuple[Lengths, ...]:
    return _distinct(name, tuple(_range(name, item.strip()) for item in text.split(","))) if text else ()


def _range(name: str, text: str) -> Lengths:
    """MIN:MAX, both included."""
    least, _, most = text.partition(":")
    holds = least.isdecimal() and most.isdecimal() and 1 <= int(least) <= int(most)
    _require(holds, f"{name}={text!r} must be MIN:MAX with 1 <= MIN <= MAX; for example 128:512")
    return int(least), int(most)


def _data_dir(name: str, text: str) -> Path | None:
    folder = Path(text).expanduser() if text else None
    _require(folder is None or folder.is_dir(), f"{name}={text!r} must be an existing folder; check the path")
    return folder


def _interpreter(name: str, text: str) -> Path | None:
    if not text:
        return None
    path = shutil.which(os.path.expanduser(text))
    _require(
        path is not None, f"{name}={text!r} must be a program that can be run; name a virtual environment's python"
    )
    return Path(os.path.abspath(str(path)))  # not resolved: a link into a virtual environment is what makes it one


def _vllm_options(name: str, text: str) -> str:
    """As canonical JSON. What other options say, and what keeps the comparison fair, cannot be said here."""
    try:
        options = json.loads(text)
        holds = isinstance(options, dict) and isinstance(options.get("speculative_config", {}), dict)
    except (ValueError, RecursionError):
        holds = False
    _require(holds, f"{name} must be a JSON object, as is its speculative_config; try '{{\"enforce_eager\": true}}'")
    given = {**options, **{f"speculative_config.{key}": "" for key in options.get("speculative_config", {})}}
    for key in given:
        _require(
            not SECRET.search(key) or not isinstance(given[key], str),
            f"{name}={key} must be left out, as options are printed and kept; set a variable such as HF_TOKEN",
        )
    for key, remedy in VLLM_RESERVED.items():
        _require(key not in given, f"{name}={key} must be left to the harness; {remedy}")
    return json.dumps(options, sort_keys=True)


def _url(name: str, text: str) -> str | None:
    """A server's address without a key in it: it is printed."""
    text = text.strip()
    try:
        parts = urlsplit(text)
        host = f"[{parts.hostname}]" if ":" in (parts.hostname or "") else parts.hostname
        allowed = {f"{host}:{parts.port}", host, f"{host}:"}
        holds = parts.scheme in ("http", "https") and bool(host) and parts.netloc.lower() in allowed
        holds = holds and not (parts.query or parts.fragment or "?" in text or "#" in text)
    except ValueError:  # of the port
        holds = False
    _require(
        not text or holds,
        f"{name} must be http://HOST:PORT or https://HOST:PORT, without a user, a password or a query; an API key goes "
        "into SPECDEC_SERVER_API_KEY",
    )
    return text or None


def _distinct(name: str, values: tuple[Any, ...]) -> tuple[Any, ...]:
    repeated = [value for value in values if values.count(value) > 1]
    _require(not repeated, f"{name} must be distinct, but {(repeated or [''])[0]} is repeated; name each once")
    return values


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise ValueError(message)
