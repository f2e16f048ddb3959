"""The options of `pytest bench/`, each declared once as a field of `BenchConfig`."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, TypeVar

from bench.campaign import parsers
from bench.campaign.arrivals import PROCESSES, Limits, Process, sweep_rates
from bench.campaign.golden import AcceptanceLength, acceptance_length
from bench.campaign.parsers import Parser
from bench.catalogue.methods import LLAMA_METHODS, SMOKE_METHODS, VLLM_METHODS
from bench.catalogue.pairs import Pair, parse_pairs
from bench.engines.base import LlamaOptions, Peers, RunningServers, Urls, VllmOptions
from bench.engines.registry import ENGINES, is_running, parse_engine, parse_method
from bench.records.schema import Cell, Gamma
from bench.workloads.base import Lengths
from bench.workloads.registry import parse_workloads
from specdec.methods import METHODS
from specdec.models.files.formats import OWN_QUANTIZATIONS, QUANTIZATIONS
from specdec.sampling_params import SamplingParams

T = TypeVar("T")

DTYPES = ("auto", "bfloat16", "float16", "float32")
VERIFICATIONS = tuple(dict.fromkeys(rule for kind in ENGINES.values() for rule in kind.verifications))
SERVERS = tuple(name for name, kind in ENGINES.items() if "running servers" in kind.extras)
SECONDS = parsers.number(lambda value: value > 0, "> 0 seconds and finite")
THINKING = ("enable_thinking", "thinking")  # of Qwen, Gemma, GLM and others; of DeepSeek and Kimi
# what some options need to have an effect
LOAD, EQUIVALENCE, SHARD = "--rate, --sweep or --concurrency", "-m equivalence", "--shard"


@dataclass(frozen=True, slots=True)
class Option:
    """An option of `pytest bench/`.

    parse: its text to its value. default: the text where none is given; "" is none. smoke: that under --smoke, where it
    differs. metavar: of its value in --help; None for a flag, which takes none.
    only_with: what must be given for it to have an effect. changes_results: whether a journal of another value must not
    be resumed. old_name: that of the release before, which is still accepted. name: the field's.
    """

    parse: Parser[Any]
    default: str
    help: str
    metavar: str | None = "VALUE"
    smoke: str | None = None
    only_with: str | None = None
    changes_results: bool = True
    old_name: str | None = None
    name: str = ""

    @property
    def flag(self) -> str:
        return f"--{self.name.replace('_', '-')}"

    @property
    def variable(self) -> str:
        """In the environment."""
        return f"SPECDEC_{self.name.upper()}"

    @property
    def key(self) -> str:
        """In the ini file."""
        return f"specdec_{self.name}"

    @property
    def old(self) -> Option | None:
        """The option under its old name."""
        return replace(self, name=self.old_name) if self.old_name else None


def option(parse: Parser[T], default: str, help: str, **details: Any) -> T:
    """A field of `BenchConfig` that is an option; arguments as for `Option`."""
    declared: T = field(metadata={"option": Option(parse, default, help, **details)})
    return declared


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchConfig:
    """What to measure.

    command: to repeat the run. named: the options that were given, wherever: if one of them cannot run it is an
    error, whereas a default that cannot run is skipped.
    """

    engines: tuple[str, ...] = option(
        parsers.listed(parse_engine),
        "specdec,transformers,vllm",
        f"engines to measure: {', '.join(ENGINES)}; the others are compared with the first",
        metavar="NAME,...",
    )
    pairs: tuple[Pair, ...] = option(
        lambda _, text: parse_pairs(text),
        "smollm2-135m",
        "model pairs: names of bench/catalogue/pairs.toml, or target=MODEL,draft=MODEL",
        metavar="PAIR,...",
        smoke="tiny-random",
    )
    methods: tuple[str, ...] = option(
        parsers.listed(parse_method),
        "autoregressive,ngram,draft_model",
        f"drafting methods: {', '.join(METHODS)}; with vLLM also {', '.join(VLLM_METHODS)}; with "
        f"llama-server also {', '.join(LLAMA_METHODS)}",
        metavar="NAME,...",
        smoke=",".join(SMOKE_METHODS),
    )
    gammas: tuple[Gamma, ...] = option(
        parsers.listed(parsers.gamma),
        "2,4,8",
        "tokens proposed per step; auto adapts the number to what is accepted",
        metavar="N,...",
        smoke="2",
    )
    placements: tuple[str, ...] = option(
        parsers.listed(parsers.placement),
        "same",
        "devices of target and draft: same, separate (one GPU each), ratio:T:D (T GPUs for the target's layers, D for "
        "the draft's), auto (as few as hold both)",
        metavar="PLACEMENT,...",
    )
    workloads: tuple[str, ...] = option(
        parse_workloads,
        "humaneval",
        "prompts: humaneval, mbpp, livecodebench, gsm8k, math500, aime, mt_bench, spec_bench, speed_bench, "
        "speed_bench_1k (2k, 8k, 16k, 32k), sharegpt, xsum, cnn_dailymail, wmt14, random_128 (1k, 2k, 8k, 16k, 32k), "
        "shared_prefix_128 (likewise), one category such as spec_bench:rag, or a file (JSON lines with `prompt` or "
        "`messages`, or one prompt a line)",
        metavar="WORKLOAD,...",
        smoke="smoke",
    )
    data_dir: Path | None = option(
        parsers.optional(parsers.folder),
        "",
        "folder with the data sets' files",
        metavar="FOLDER",
        changes_results=False,
    )
    malformed: str = option(
        parsers.choice("refuse", "skip"),
        "refuse",
        "what to do with malformed rows of a data set: refuse or skip; skipped rows are counted",
    )
    prompt_format: str = option(
        parsers.choice("instruct", "raw"),
        "instruct",
        "instruct: a request, in the tokenizer's chat template if it has one; raw: a text to continue",
    )
    turns: str = option(
        parsers.choice("first", "all"),
        "first",
        "of conversations (mt_bench, spec_bench, speed_bench): only the first question (first), or each turn as a "
        "prompt of its own (all), after the target's own answers to those before, which the reference engine generates "
        "once by plain decoding",
    )
    thinking: str = option(
        parsers.choice("default", "on", "off"),
        "default",
        "thinking of reasoning models, by the chat template's variables enable_thinking and thinking: on, off, or the "
        "template's default",
    )
    chat_template_arguments: str = option(
        parsers.template_arguments,
        "{}",
        "JSON object of other variables of the chat template, such as reasoning_effort",
        metavar="JSON",
    )
    prompt_lengths: tuple[Lengths, ...] = option(
        parsers.possibly_empty(parsers.listed(parsers.lengths)),
        "",
        "use only prompts of this many tokens, including the template, in the reference engine's tokenizer; a list "
        "measures each of these buckets separately",
        metavar="MIN:MAX,...",
    )
    allow_code_execution: bool = option(
        parsers.flag,
        "0",
        "run the code that models write, in a sandbox, to score it (humaneval, mbpp, livecodebench)",
        metavar=None,
    )
    num_prompts: int = option(
        parsers.integer(1, "give the number of prompts to measure"), "8", "prompts per cell", metavar="N", smoke="2"
    )
    max_tokens: int = option(
        parsers.integer(2, "the first token comes from the prefill, so speculation needs two"),
        "64",
        "maximum number of tokens to emit per prompt",
        metavar="N",
        smoke="8",
    )
    batch_sizes: tuple[int, ...] = option(
        parsers.listed(parsers.integer(1, "use 1 for one prompt at a time")),
        "1",
        f"prompts decoded together; with {LOAD} at most this many, with --concurrency by default as many as clients",
        metavar="N,...",
    )
    rate: tuple[float, ...] = option(
        parsers.possibly_empty(
            parsers.listed(
                parsers.number(
                    lambda value: value > 0, "> 0 requests a second and finite; leave it out for a fixed number"
                )
            )
        ),
        "",
        "open-loop load: requests per second, which arrive whether or not earlier ones are finished; a list measures "
        "each. Instead of a fixed number of prompts, for engines that serve; with --turns all, of conversations",
        metavar="RATE,...",
    )
    sweep: bool = option(
        parsers.flag,
        "0",
        "open-loop load at rising rates, each about 1.5 times the one before, from idle until a method is saturated at "
        "two of them in a row",
        metavar=None,
    )
    concurrency: tuple[int, ...] = option(
        parsers.possibly_empty(parsers.listed(parsers.integer(1, "give a number of clients"))),
        "",
        "closed-loop load: clients that each send the next request after the answer to the one before; a list measures "
        "each",
        metavar="N,...",
    )
    think_time: float = option(
        parsers.number(lambda value: value >= 0, ">= 0 seconds and finite"),
        "0",
        "seconds from an answer to a client's next request, and to the next turn of a conversation",
        metavar="SECONDS",
        only_with=LOAD,
    )
    steady_window: tuple[float, float] = option(
        parsers.shares,
        "0.2:0.9",
        "part of --duration that is measured: requests before it warm the server up, and later ones keep it busy",
        metavar="START:END",
        only_with=LOAD,
    )
    duration: float = option(
        SECONDS, "30", "seconds during which requests arrive", metavar="SECONDS", smoke="1", only_with=LOAD
    )
    arrivals: Process = option(
        parsers.choice(*PROCESSES),
        "poisson",
        "exponential gaps between requests (poisson), the same for every method, or equal ones (constant)",
        only_with=LOAD,
    )
    drain: float = option(
        parsers.number(lambda value: value >= 0, ">= 0 seconds and finite"),
        "60",
        "seconds after --duration at which unfinished requests are abandoned and counted as unfinished",
        metavar="SECONDS",
        only_with=LOAD,
    )
    ttft_limit: float = option(
        SECONDS,
        "2",
        "maximum time to first token, including queueing, of a request that counts towards the goodput",
        metavar="SECONDS",
        only_with=LOAD,
    )
    inter_token_limit: float = option(
        SECONDS,
        "0.2",
        "maximum mean inter-token time of a request that counts towards the goodput. The defaults of both limits are "
        "those of MLPerf Inference for Llama 2 70B (server scenario)",
        metavar="SECONDS",
        only_with=LOAD,
    )
    temperature: float = option(
        parsers.number(lambda value: value >= 0, "finite and >= 0; use 0 for greedy decoding"),
        "0",
        "sampling temperature; 0 is greedy",
    )
    top_p: float = option(
        parsers.number(lambda value: 0 < value <= 1, "in (0, 1]; use 1 to keep all tokens"),
        "1",
        "nucleus sampling; 1 keeps all tokens",
    )
    top_k: int = option(
        parsers.integer(0, "use 0 to keep all tokens"), "0", "keep the k most likely tokens; 0 keeps all", metavar="K"
    )
    seed: int = option(
        parsers.integer(0, "any such number will do", below=2**32), "0", "seed of prompt selection and sampling"
    )
    dtype: str = option(
        parsers.choice(*DTYPES), "auto", f"dtype of the weights: {', '.join(DTYPES)}; auto is the pair's own"
    )
    device: str = option(parsers.device, "auto", "auto, cpu, cuda or cuda:N")
    quantization: str = option(
        parsers.choice("none", *QUANTIZATIONS, *OWN_QUANTIZATIONS),
        "none",
        f"weight quantization for specdec and transformers: none, {', '.join(QUANTIZATIONS)}; for specdec alone: "
        f"{', '.join(OWN_QUANTIZATIONS)}, where auto is that of a GGUF file; for vLLM use --vllm-options",
        old_name="quantisation",
    )
    verification: str = option(
        parsers.choice(*VERIFICATIONS), "token", f"rule that verifies a draft: {', '.join(VERIFICATIONS)}"
    )
    synthetic_acceptance_rates: tuple[float, ...] = option(
        parsers.possibly_empty(parsers.falling_rates),
        "",
        "accept draft position i with the i-th probability instead of verifying it: measures timing only, the output "
        "is not the model's",
        metavar="RATE,...",
    )
    synthetic_acceptance_length: AcceptanceLength | None = option(
        parsers.optional(acceptance_length),
        "",
        "as --synthetic-acceptance-rates, with the rates of least variance for this many tokens per target call, as in "
        "vLLM; or a golden file of InferenceX, which has a length for each gamma",
        metavar="LENGTH|FILE[:MODE]",
    )
    vllm_python: Path | None = option(
        parsers.optional(parsers.executable),
        "",
        "Python interpreter of the virtual environment that has vLLM; none is the current one",
        metavar="PROGRAM",
        changes_results=False,
    )
    vllm_options: str = option(
        parsers.vllm_options,
        "{}",
        "JSON object of vLLM engine arguments such as tensor_parallel_size, enforce_eager, gpu_memory_utilization, "
        "max_model_len, max_num_seqs; its speculative_config holds options of drafting methods such as "
        "draft_sample_method",
        metavar="JSON",
    )
    llama_server: Path | None = option(
        parsers.optional(parsers.executable),
        "",
        "llama.cpp's llama-server, with llama-quantize beside it; none is that on PATH",
        metavar="PROGRAM",
        changes_results=False,
    )
    llama_options: str = option(
        parsers.words,
        "",
        "further words of llama-server's command line, such as --flash-attn off",
        metavar="WORDS",
    )
    openvino_python: Path | None = option(
        parsers.optional(parsers.executable),
        "",
        "Python interpreter of the virtual environment that has openvino-genai; none is the current one",
        metavar="PROGRAM",
        changes_results=False,
    )
    server_url: Urls = option(
        parsers.server_urls(SERVERS),
        "",
        "running servers, one URL or ENGINE=URL,...: of SGLang, TensorRT-LLM or any OpenAI-compatible endpoint for the "
        "engines sglang, tensorrt-llm and openai, and of vLLM for vllm-server, which otherwise starts one. An API key, "
        "if they need one, is read from SPECDEC_SERVER_API_KEY",
        metavar="URL",
    )
    plain_server_url: Urls = option(
        parsers.server_urls(SERVERS),
        "",
        "likewise, servers of the same models without speculation, for method autoregressive: a speed-up needs both",
        metavar="URL",
        only_with="--server-url",
    )
    server_quantization: str = option(
        parsers.word,
        "none",
        "quantization of the weights on running servers, as they call it: recorded, and for SGLang checked",
        metavar="NAME",
        only_with="--server-url",
    )
    num_draws: int = option(
        parsers.integer(1, "an audit needs thousands of tokens"),
        "20000",
        "tokens that an audit draws from each arm",
        metavar="N",
        smoke="300",
        only_with=EQUIVALENCE,
    )
    max_tv: float = option(
        parsers.number(lambda value: 0 < value < 1, "between 0 and 1, a distance of total variation"),
        "0.05",
        "total variation distance that an audit must be able to detect before it calls an engine lossless",
        only_with=EQUIVALENCE,
    )
    certificates: Path = option(
        parsers.path,
        ".benchmarks/certificates",
        "folder for a certificate of each cell, as JSON and as Markdown",
        metavar="FOLDER",
        only_with=EQUIVALENCE,
        changes_results=False,
    )
    telemetry_hz: float = option(
        parsers.number(lambda value: 0 <= value <= 100, "from 0 to 100; use 0 to sample nothing"),
        "10",
        "samples per second of power, utilization, memory and temperature; 0 is none",
        metavar="HZ",
    )
    shard: str | None = option(
        parsers.optional(parsers.shard),
        "",
        "run the I-th of N parts of the cells, one part per machine; which part a cell belongs to depends on the cell "
        "alone",
        metavar="I/N",
    )
    shard_by: str = option(
        parsers.choice("cell", "pair"),
        "cell",
        "what the parts are made of: cells; or pairs of models with their placement, which take turns, so that each "
        "part loads as few models as possible",
        only_with=SHARD,
    )
    journal: Path = option(
        parsers.path,
        ".benchmarks/journal.jsonl",
        "file to which each finished cell is written at once",
        metavar="FILE",
        smoke=".benchmarks/journal-smoke.jsonl",
        changes_results=False,
    )
    resume: bool = option(
        parsers.flag,
        "0",
        "take finished cells from the journal instead of measuring them again",
        metavar=None,
        changes_results=False,
    )
    smoke: bool = option(
        parsers.flag, "0", "a run of seconds: a tiny random model, two prompts, every method", metavar=None
    )
    command: str = ""
    named: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        largest = max(self.batch_sizes)
        if largest > self.num_prompts and not self.is_load:
            raise ValueError(
                f"batch_sizes={largest} must be at most num_prompts={self.num_prompts}; "
                "raise --num-prompts or lower --batch-sizes"
            )
        if self.sweep and self.rate:
            raise ValueError("sweep must be left out beside rate: it chooses the rates itself; use one of them")
        self._check_prescribed_acceptance()

    def _check_prescribed_acceptance(self) -> None:
        """Raise ValueError if acceptance is prescribed twice, for an impossible gamma, or where quality counts."""
        if self.synthetic_acceptance_length:
            if self.synthetic_acceptance_rates:
                raise ValueError(
                    "synthetic_acceptance_length must be left out beside synthetic_acceptance_rates; use one of them"
                )
            for gamma in self.gammas:
                self.synthetic_acceptance_length.at(gamma)
        if self.prescribes_acceptance and self.allow_code_execution:
            raise ValueError(
                "allow_code_execution must be left out with prescribed acceptance: the output is not the model's, so "
                "its quality means nothing"
            )

    @property
    def template_arguments(self) -> dict[str, Any]:
        """The variables of the chat template; empty for its defaults."""
        thinking = dict.fromkeys(THINKING, self.thinking == "on") if self.thinking != "default" else {}
        return {**thinking, **json.loads(self.chat_template_arguments)}

    @property
    def peers(self) -> Peers:
        """Where other engines run and with which of their own options."""
        quantization = None if self.server_quantization == "none" else self.server_quantization
        return Peers(
            VllmOptions(self.vllm_python, self.vllm_options),
            LlamaOptions(self.llama_server, self.llama_options),
            self.openvino_python,
            RunningServers(self.server_url, self.plain_server_url, quantization),
        )

    def quantization_of(self, engine: str) -> str:
        """How an engine's weights are quantized; "none" if they are not."""
        return self.server_quantization if is_running(engine, self.peers) else self.quantization

    @property
    def prescribes_acceptance(self) -> bool:
        """Whether drafts are accepted at given rates, so that the output is not the model's."""
        return bool(self.synthetic_acceptance_rates) or self.synthetic_acceptance_length is not None

    def prescribed_rates(self, gamma: Gamma) -> tuple[float, ...]:
        """The prescribed acceptance rate of each position; empty for real drafts."""
        length = self.synthetic_acceptance_length
        return length.rates(gamma) if length else self.synthetic_acceptance_rates

    @property
    def is_load(self) -> bool:
        """Whether requests arrive over time, instead of a fixed number of prompts."""
        return bool(self.rates or self.concurrency)

    @property
    def rates(self) -> tuple[float, ...]:
        """The rates of open-loop load, in requests per second."""
        return sweep_rates(self.window_s[1] - self.window_s[0], self.duration) if self.sweep else self.rate

    @property
    def slots(self) -> tuple[int, ...]:
        """Numbers of prompts that are decoded together at most."""
        if self.concurrency and "batch_sizes" not in self.named:
            return (max(self.concurrency),)
        return self.batch_sizes

    @property
    def window_s(self) -> tuple[float, float]:
        """Start and end of the steady window."""
        start, end = self.steady_window
        return start * self.duration, end * self.duration

    @property
    def limits(self) -> Limits:
        """What a request must keep to count towards the goodput."""
        return Limits(self.ttft_limit, self.inter_token_limit)

    @property
    def reference_engine(self) -> str:
        """The engine that the others are compared with: the first one."""
        return self.engines[0]

    def pair_of(self, cell: Cell) -> Pair:
        """A cell's models, placed as the cell asks."""
        (pair,) = (pair for pair in self.pairs if pair.name == cell.pair)
        return replace(pair, placement=cell.placement)

    def dtype_of(self, pair: Pair) -> str:
        """The dtype of a pair's weights."""
        return pair.dtype if self.dtype == "auto" else self.dtype

    def sampling(self, first: int, num_prompts: int, max_tokens: int) -> list[SamplingParams]:
        """Parameters of consecutive prompts, beginning with number `first`; each prompt has its own seed."""
        return [
            SamplingParams(
                temperature=self.temperature,
                top_p=self.top_p,
                top_k=self.top_k,
                max_tokens=max_tokens,
                seed=self.seed + index,
            )
            for index in range(first, first + num_prompts)
        ]


def options_of(config_class: type[BenchConfig] = BenchConfig) -> list[Option]:
    """The options that a configuration declares, in order."""
    declared = (each for each in fields(config_class) if "option" in each.metadata)
    return [replace(each.metadata["option"], name=each.name) for each in declared]
