"""The command line: the sources of a value, and the errors for invalid ones."""

from __future__ import annotations

import os
import re
import sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from bench.campaign.config import BenchConfig
from bench.campaign.options import page, parse_config

ROOT = Path(__file__).parents[3]


def config(ini: dict[str, str] | None = None, environment: dict[str, str] | None = None, **options: str) -> BenchConfig:
    """The configuration from options given as arguments, environment variables and ini keys."""
    given = {f"specdec_{name}": text for name, text in options.items()}
    pytest_config: Any = SimpleNamespace(
        getoption=lambda key, default: given.get(key, default),
        getini=lambda key: (ini or {}).get(key),
        rootpath=Path("/root-folder"),
        invocation_params=SimpleNamespace(args=("bench/", "-k", "a b")),
    )
    return parse_config(pytest_config, environment or {})


def test_defaults_measure_the_default_pair_with_both_engines() -> None:
    defaults = config()
    assert [pair.name for pair in defaults.pairs] == ["smollm2-135m"]
    assert defaults.engines == ("specdec", "transformers", "vllm")
    assert (defaults.workloads, defaults.gammas, defaults.temperature) == (("humaneval",), (2, 4, 8), 0)
    assert defaults.journal == Path("/root-folder/.benchmarks/journal.jsonl")
    assert defaults.named == frozenset()


def test_the_command_line_wins_over_the_environment_and_that_over_the_ini_file() -> None:
    ini = {"specdec_seed": "1", "specdec_top_k": "1", "specdec_max_tokens": "11"}
    environment = {"SPECDEC_SEED": "2", "SPECDEC_TOP_K": "2"}
    given = config(ini, environment, seed="3")
    assert (given.seed, given.top_k, given.max_tokens) == (3, 2, 11)
    assert given.named == {"seed", "top_k", "max_tokens"}


def test_the_reference_page_is_that_of_the_options() -> None:
    """If not: python -m bench.campaign.options > docs/reference/bench-options.md"""
    assert (ROOT / "docs" / "reference" / "bench-options.md").read_text() == page()


def test_the_old_spelling_is_accepted_for_one_release() -> None:
    assert config(environment={"SPECDEC_QUANTISATION": "torchao-int8"}).quantization == "torchao-int8"
    both = {"SPECDEC_QUANTISATION": "torchao-int8", "SPECDEC_QUANTIZATION": "none"}
    assert config(environment=both).quantization == "none"


TOY = """
from dataclasses import dataclass
from bench.campaign import options, parsers
from bench.campaign.config import BenchConfig, option

@dataclass(frozen=True, slots=True, kw_only=True)
class Toy(BenchConfig):
    toy_size: int = option(
        parsers.integer(1, "toys have a size"), "3", "size of | toys", metavar="N", smoke="2", old_name="toy_length"
    )

def pytest_addoption(parser):
    options.add_options(parser, Toy)

def pytest_report_header(config):
    parsed = options.parse_config(config, config_class=Toy)
    return [f"{parsed.toy_size}, {'toy_size' in parsed.named}", options.page(Toy).splitlines()[-1]]
"""


@pytest.fixture
def users_variables(environment: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the environment variables of this run of pytest."""
    for name in os.environ.keys() - environment.keys():
        monkeypatch.delenv(name)


@pytest.fixture
def toy_folder(tmp_path: Path, users_variables: None, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder whose conftest declares another option, as the working directory."""
    (tmp_path / "conftest.py").write_text(TOY)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run_pytest(*arguments: str) -> int:
    """The exit code of a run of pytest inside this one; it does not touch this one's faulthandler."""
    return pytest.main(["--import-mode=importlib", "-p", "no:cacheprovider", "-p", "no:faulthandler", *arguments])


@pytest.mark.parametrize(
    ("arguments", "variables", "ini", "value"),
    [
        (["--smoke"], {}, "", "2, False"),
        ([], {}, "specdec_toy_size = 4", "4, True"),
        ([], {"SPECDEC_TOY_SIZE": "5"}, "specdec_toy_length = 4", "5, True"),
        (["--toy-size", "6"], {"SPECDEC_TOY_LENGTH": "5"}, "specdec_toy_size = 4", "6, True"),
        (["--toy-length", "7"], {"SPECDEC_TOY_LENGTH": "5"}, "specdec_toy_length = 4", "7, True"),
        ([], {}, "specdec_toy_length = 4", "4, True"),
    ],
)
def test_a_field_is_all_that_an_option_takes(
    arguments: list[str],
    variables: dict[str, str],
    ini: str,
    value: str,
    toy_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (toy_folder / "pytest.ini").write_text(f"[pytest]\n{ini}\n")
    for name, text in variables.items():
        monkeypatch.setenv(name, text)
    assert run_pytest(*arguments) == pytest.ExitCode.NO_TESTS_COLLECTED
    header = capsys.readouterr().out.splitlines()
    assert value in header
    row = "| `--toy-size N` | `3` | `SPECDEC_TOY_SIZE` | `specdec_toy_size` | size of \\| toys; with --smoke 2 |"
    assert row in header


def test_help_shows_a_declared_option_but_not_its_old_name(
    toy_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "400")
    (toy_folder / "pytest.ini").write_text("[pytest]\n")
    assert run_pytest("--help") == pytest.ExitCode.OK
    shown = capsys.readouterr().out
    assert re.search(r"--toy-size=N +size of \| toys; with --smoke 2 \(default 3; env SPECDEC_TOY_SIZE\)", shown)
    assert re.search(r"specdec_toy_size \(string\):\s+default of --toy-size", shown)
    assert not re.search("toy.length", shown, re.IGNORECASE)


def test_buckets_of_lengths_are_a_list() -> None:
    assert config().prompt_lengths == ()
    assert config(prompt_lengths="1:64, 65:512").prompt_lengths == ((1, 64), (65, 512))
    with pytest.raises(ValueError, match="prompt_lengths must be distinct"):
        config(prompt_lengths="1:64,1:64")


def test_load_has_defaults_and_may_be_a_sweep() -> None:
    assert config().rate == ()
    sweep = config(rate="2, 4,8.5", shard="02/03")
    assert (sweep.rate, sweep.duration, sweep.arrivals, sweep.shard) == ((2.0, 4.0, 8.5), 30, "poisson", "2/3")
    assert (sweep.limits.ttft_s, sweep.limits.inter_token_s) == (2, 0.2)


@pytest.mark.parametrize(
    ("variable", "message"),
    [
        ("SPECDEC_METOHDS", r"SPECDEC_METOHDS must be one that is known; did you mean 'METHODS'\?"),
        ("SPECDEC_CAHCE", r"did you mean 'CACHE'\?"),
    ],
)
def test_a_misspelt_variable_is_not_ignored(variable: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config(environment={variable: "x"})
    others = {"SPECDEC_CACHE": "x", "SPECDEC_STRICT": "1", "SPECDEC_NOTHING_LIKE_ANY_OPTION": "x"}
    assert config(environment=others) == config()


def test_smoke_replaces_defaults_but_not_given_options() -> None:
    smoke = config(smoke="1", gammas="3,auto")
    assert [pair.name for pair in smoke.pairs] == ["tiny-random"]
    assert (smoke.num_prompts, smoke.max_tokens, smoke.gammas) == (2, 8, (3, "auto"))


def test_pairs_may_be_given_by_their_models() -> None:
    named, target_only, both = config(pairs="smollm2-135m,target=org/big,target=org/big,draft=org/small").pairs
    assert (named.target, named.draft) == ("smollm2-135m", "smollm2-135m-draft")
    assert (target_only.name, target_only.target, target_only.draft) == ("big", "org/big", None)
    assert (both.name, both.target, both.draft) == ("big+small", "org/big", "org/small")


@pytest.mark.parametrize(
    ("option", "text", "message"),
    [
        ("methods", "magic", "methods='magic' must be one of autoregressive, ngram"),
        ("pairs", "nobody", "pairs='nobody' must be in the catalogue; use smollm2-135m"),
        (
            "pairs",
            "target=/no/such/model",
            "pairs='/no/such/model' must exist, as it is a path; check it, or use smollm2",
        ),
        ("pairs", "draft=small", "pairs='draft=small' must be names, or target=MODEL"),
        ("pairs", "smollm2-135m,smollm2-135m", "pairs='smollm2-135m,smollm2-135m' must be distinct"),
        ("engines", "vvllm", "engines='vvllm' must be one of specdec, transformers, vllm"),
        ("engines", "", "engines='' must be one of"),
        ("workloads", "nothing", "workloads='nothing' must be humaneval, .* or an existing file"),
        ("methods", "ngrm", r"or module:attribute; did you mean 'ngram'\?"),
        ("engines", "vlm", r"or module:attribute; did you mean 'vllm'\?"),
        ("workloads", "gms8k", r"or an existing file; did you mean 'gsm8k'\?"),
        ("pairs", "smollm2-135", r"hub ids or folders; did you mean 'smollm2-135m'\?"),
        ("arrivals", "poison", r"must be poisson or constant; did you mean 'poisson'\?"),
        ("gammas", "0", "gammas=0 must be an integer of at least 1; for plain decoding use --methods autoregressive"),
        ("gammas", "2,two", "gammas=two must be an integer"),
        ("gammas", "2,2", "gammas must be distinct, but 2 is repeated"),
        ("gammas", "auto,auto", "gammas must be distinct, but auto is repeated"),
        ("placements", "elsewhere", "placement='elsewhere' must be same, separate, auto or ratio:T:D"),
        ("placements", "same,ratio:6", "placement='ratio:6' must be .*; try ratio:6:2"),
        ("placements", "same,same", "placements must be distinct, but same is repeated"),
        ("telemetry_hz", "-1", "telemetry_hz=-1 must be from 0 to 100; use 0 to sample nothing"),
        ("telemetry_hz", "1000", "telemetry_hz=1000 must be from 0 to 100"),
        ("quantization", "int3", "quantization='int3' must be none or bitsandbytes-4bit or torchao-int8"),
        ("temperature", "-1", "temperature=-1 must be finite and >= 0; use 0 for greedy"),
        ("temperature", "nan", "temperature=nan must be finite"),
        ("top_p", "0", r"top_p=0 must be in \(0, 1\]; use 1"),
        ("top_p", "1.5", r"top_p=1.5 must be in \(0, 1\]"),
        ("top_k", "-1", "top_k=-1 must be an integer of at least 0"),
        ("num_prompts", "0", "num_prompts=0 must be an integer of at least 1"),
        ("max_tokens", "1", "max_tokens=1 must be an integer of at least 2"),
        ("batch_sizes", "0", "batch_sizes=0 must be"),
        ("batch_sizes", "100", "batch_sizes=100 must be at most num_prompts="),
        ("rate", "0", "rate=0 must be > 0 requests a second and finite; leave it out for a fixed number"),
        ("rate", "2,-1", "rate=-1 must be > 0 requests a second"),
        ("rate", "2,nan", "rate=nan must be > 0 requests a second"),
        ("rate", "2,2.0", "rate must be distinct, but 2.0 is repeated"),
        ("duration", "0", "duration=0 must be > 0 seconds and finite"),
        ("arrivals", "gamma", "arrivals='gamma' must be poisson or constant"),
        ("drain", "-1", "drain=-1 must be >= 0 seconds and finite"),
        ("ttft_limit", "0", "ttft_limit=0 must be > 0 seconds"),
        ("inter_token_limit", "inf", "inter_token_limit=inf must be > 0 seconds and finite"),
        ("shard", "0/3", "shard='0/3' must be I/N with 1 <= I <= N <= 10000; for example 1/3, and 2/3, 3/3 elsewhere"),
        ("shard", "4/3", "shard='4/3' must be I/N"),
        ("shard", "3", "shard='3' must be I/N"),
        ("shard", "1/1000000000", "shard='1/1000000000' must be I/N with 1 <= I <= N <= 10000"),
        ("shard", "1/" + "9" * 5000, "must be I/N with 1 <= I <= N <= 10000"),
        ("seed", "-1", "seed=-1 must be"),
        ("seed", str(2**32), "must be an integer of at least 0 and below 4294967296"),
        ("dtype", "int8", "dtype='int8' must be auto or bfloat16"),
        ("device", "tpu", "device='tpu' must be auto, cpu, cuda or cuda:N"),
        ("synthetic_acceptance_rates", "0.5,1.5", "synthetic_acceptance_rates=1.5 must be a list of probabilities"),
        ("synthetic_acceptance_rates", "0.5,0.6", "synthetic_acceptance_rates=0.5,0.6 must not rise"),
        ("verification", "magic", "verification='magic' must be token or block or coupled"),
        ("verification", "lossy:fly", "verification='lossy:fly' must be token or block or coupled"),
        ("malformed", "mend", "malformed='mend' must be refuse or skip"),
        ("prompt_format", "chat", "prompt_format='chat' must be instruct or raw"),
        ("prompt_lengths", "9", "prompt_lengths='9' must be MIN:MAX with 1 <= MIN <= MAX; for example 128:512"),
        ("prompt_lengths", "9:8", "prompt_lengths='9:8' must be MIN:MAX"),
        ("prompt_lengths", "0:8", "prompt_lengths='0:8' must be MIN:MAX"),
        ("allow_code_execution", "perhaps", "allow_code_execution='perhaps' must be true or false"),
        ("data_dir", "/no/such/folder", "data_dir='/no/such/folder' must be an existing folder"),
        ("vllm_python", "/no/such/python", "vllm_python='/no/such/python' must be a program that can be run; name a"),
        ("vllm_options", "[]", "vllm_options must be a JSON object, as is its speculative_config; try"),
        ("vllm_options", '{"dtype": "half"}', "vllm_options=dtype must be left to the harness; use --dtype"),
        (
            "vllm_options",
            '{"speculative_config": {"method": "ngram"}}',
            "vllm_options=speculative_config.method must be left to the harness; use --methods",
        ),
        ("resume", "perhaps", "resume='perhaps' must be true or false"),
    ],
)
def test_a_wrong_value_is_named_with_its_rule_and_remedy(option: str, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config(environment={f"SPECDEC_{option.upper()}": text})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--gammas", "0"], "gammas=0 must be an integer of at least 1"),
        (["--engines", "transformers", "--methods", "ngram_store"], "requested and must be able to run, but engine="),
        # without xdist the option does not exist, which is a usage error too
        (["-n", "2"], "numprocesses=2 must be 0" if find_spec("xdist") else "unrecognized arguments: -n 2"),
        (["--metods", "ngram"], "unrecognized arguments: --metods ngram\n  did you mean: --methods\n"),
        (["--benchmark-json", "no-such-folder/out.json"], "out.json must be a file that can be written"),
        (["--journal", "/dev/null"], "journal=/dev/null must be a regular file"),
    ],
)
def test_usage_errors_come_before_collection_and_write_nothing(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    users_variables: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(ROOT)
    journal = tmp_path / "journal.jsonl"
    command = ["bench/", "--smoke", "--device", "cpu", "--journal", str(journal), *arguments]
    monkeypatch.setattr(sys, "argv", ["pytest", *command])  # in which a misspelt option is looked for
    status = run_pytest(*command)
    out, err = capsys.readouterr()
    assert status == pytest.ExitCode.USAGE_ERROR
    assert message in err
    assert "collected" not in out
    assert not journal.exists()
