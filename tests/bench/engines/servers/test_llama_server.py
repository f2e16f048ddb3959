"""llama.cpp's server, against recorded replies of a real one, and against one that misbehaves."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler
from itertools import chain, repeat
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from gguf import GGUFWriter, LlamaFileType
from helpers.loopback import loopback

from bench.catalogue.pairs import Pair, catalogue
from bench.engines import llama_files
from bench.engines.base import LlamaOptions, LoadOptions, Peers, Setup
from bench.engines.registry import why_not
from bench.engines.servers import completions, llama_server
from bench.engines.servers.llama_server import (
    PREFIX,
    Asked,
    LlamaServerEngine,
    accepted_at,
    arguments,
    complete,
    difference,
    request,
)
from bench.engines.servers.local_server import Server
from bench.measure.paired import check_counts
from specdec import SamplingParams
from specdec.servers.client import Client
from specdec.servers.errors import EngineError

RECORDED = json.loads((Path(__file__).parents[2] / "recorded" / "llama-server.json").read_text())
BEFORE, AFTER = ("\n".join(RECORDED[name]) for name in ("before", "after"))
GREEDY = SamplingParams(temperature=0, max_tokens=24)
ASKED = Asked(request([1, 2, 3], GREEDY, {2}), 24, 49_152)
NGRAM = Setup("ngram", 4, 2)


class Handler(BaseHTTPRequestHandler):
    """Answers as the recorded server did, or with what the test planned."""

    def do_GET(self) -> None:
        pages = self.server.metrics
        self.answer(pages.pop(0) if len(pages) > 1 else pages[0])

    def do_POST(self) -> None:
        self.server.seen.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        self.answer(json.dumps(self.server.reply))

    def answer(self, text: str) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *_: Any) -> None:
        """Nothing is printed."""


@pytest.fixture
def server() -> Iterator[Any]:
    """A server. metrics: its next pages, the last one for ever. reply: to each completion."""
    with loopback(Handler, metrics=[BEFORE, AFTER], reply=RECORDED["completion"], seen=[]) as server:
        yield server


def client(server: Any) -> Client:
    return Client(server.url, None, timeout_s=5.0)


@pytest.fixture
def gguf(tmp_path: Path) -> Path:
    """A file with a header and one matrix, in float32."""
    path = tmp_path / "model.gguf"
    writer = GGUFWriter(path, "llama")
    writer.add_file_type(LlamaFileType.ALL_F32)
    writer.add_tensor("token_embd.weight", np.zeros((4, 8), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def engine(server: Any, monkeypatch: pytest.MonkeyPatch) -> LlamaServerEngine:
    """The engine with that server, whose replies take 5 s: longer than the recorded ones."""
    times = chain([0.0], repeat(5.0))
    clock = SimpleNamespace(perf_counter=lambda: next(times))
    for module in (completions, llama_server):  # not of other threads of this process, which read the time, too
        monkeypatch.setattr(module, "time", clock)
    pair = Pair("tiny", "tiny", load_format="dummy")
    engine = LlamaServerEngine(pair, LoadOptions("float32", "cpu"), Path("llama-server"), {2})
    monkeypatch.setattr(LlamaServerEngine, "_vocab_size", 49_152)
    monkeypatch.setattr(LlamaServerEngine, "_started", lambda *_: Server(client(server), "tiny"))
    engine._pool._start = engine._started
    engine.prepare({NGRAM})
    return engine


def test_a_reply_gives_tokens_times_and_counters(engine: LlamaServerEngine, server: Any) -> None:
    run = engine.generate([[1, 2, 3]], "ngram", 4, [GREEDY])
    (result,) = run.results
    check_counts([run], "ngram", 24)
    assert (len(result.token_ids), result.finish_reason) == (24, "length")
    assert (result.latency_s, result.ttft_s) == (5.0, pytest.approx(5.0 - 0.939556))
    counts = result.counts
    assert counts is not None
    # 24 tokens, the first by the prompt's step, 12 of the others accepted: 11 steps
    assert (counts.num_steps, counts.num_drafted, counts.num_accepted, counts.accepted_at) == (11, 16, 12, [4, 3, 3, 2])
    assert counts.num_slots == 11 + 16
    (sent,) = server.seen
    assert sent["prompt"] == [1, 2, 3]
    assert (sent["cache_prompt"], sent["samplers"]) == (False, ["temperature", "top_k", "top_p", "min_p"])
    assert (sent["stream"], sent["min_p"]) == (False, 0.0)


def test_a_batch_has_no_counters(engine: LlamaServerEngine) -> None:
    """Accepted tokens per position are counted over all requests."""
    results = engine.generate([[1], [2]], "ngram", 4, [replace(GREEDY, seed=seed) for seed in (1, 2)]).results
    assert [result.counts for result in results] == [None, None]


def test_an_output_that_a_stop_token_ended_has_no_counters(engine: LlamaServerEngine, server: Any) -> None:
    """llama-server also counts the accepted tokens after it."""
    server.reply = RECORDED["stopped"]
    (result,) = engine.generate([[1]], "ngram", 4, [replace(GREEDY, max_tokens=200)]).results
    assert (result.finish_reason, result.token_ids[-1], result.counts) == ("stop", 2, None)


def test_without_drafts_every_token_is_a_step(engine: LlamaServerEngine, server: Any) -> None:
    timings = {key: value for key, value in RECORDED["completion"]["timings"].items() if "draft" not in key}
    server.reply = RECORDED["completion"] | {"timings": timings}
    plain = replace(NGRAM, method="autoregressive", gamma=0)
    engine.prepare({plain})
    counts = engine.generate([[1]], "autoregressive", 0, [GREEDY]).results[0].counts
    assert counts is not None
    assert (counts.num_steps, counts.num_drafted, counts.accepted_at) == (23, 0, [])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokens": [49_152]}, r"tokens=49152 must be integers from 0 and below 49152"),
        ({"tokens": [-1]}, r"tokens=-1 must be integers"),
        ({"tokens": [1.5]}, r"tokens=1\.5 must be integers"),
        ({"tokens": []}, r"must emit 1 to 24 tokens, but emitted 0"),
        ({"tokens": [1] * 25}, r"must emit 1 to 24 tokens, but emitted 25"),
        ({"tokens": None}, r"must emit 1 to 24 tokens, but emitted 0"),
        ({"tokens": {"a": 1}}, r"tokens=.* must be a list"),
        ({"stop_type": "none"}, r"finish_reason='none' must be stop or length"),
        ({"truncated": True}, r"must keep the whole prompt, but truncated it; raise its context size"),
        ({"timings": None}, r"timings=None must be an object"),
        ({"timings": {"predicted_ms": 1e9}}, r"predicted_ms=1000000000\.0 must lie within"),
        ({"timings": {"predicted_ms": 0, "draft_n": -1}}, r"draft_n=-1 must be integers"),
    ],
)
def test_an_invalid_reply_is_an_error(server: Any, change: dict[str, Any], message: str) -> None:
    server.reply = RECORDED["completion"] | {"timings": {"predicted_ms": 0.0}} | change
    with pytest.raises(EngineError, match=message):
        complete(client(server), ASKED, llama_server.time.perf_counter())


def test_counters_that_contradict_each_other_are_an_error(engine: LlamaServerEngine, server: Any) -> None:
    server.metrics = [BEFORE, BEFORE]
    with pytest.raises(EngineError, match=r"draft_n_accepted=12 must be the sum of \[\]"):
        engine.generate([[1, 2, 3]], "ngram", 4, [GREEDY])


def test_positions_are_counted_by_their_increase() -> None:
    assert accepted_at(BEFORE, PREFIX) == []
    assert accepted_at(AFTER, PREFIX) == [4, 3, 3, 2]
    assert difference([4, 3, 1], [1, 1]) == [3, 2, 1]
    for before in ([5], [1, 1, 1, 1]):
        with pytest.raises(EngineError, match="must only increase"):
            difference([4, 3, 1], before)


@pytest.mark.parametrize("params", [SamplingParams(stop_token_ids=(7,)), SamplingParams(ignore_eos=True)])
def test_stop_tokens_that_the_server_cannot_have_are_refused(params: SamplingParams) -> None:
    with pytest.raises(EngineError, match="ends at the stop tokens of its GGUF file and at no others"):
        request([1], params, {2})


def test_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llama_server, "gguf_file", lambda source, kind, converter: Path(f"{source}.{kind}.gguf"))
    options = LoadOptions("bfloat16", "cpu", peers=Peers(llama=LlamaOptions(options="--flash-attn off")))
    address = ("127.0.0.1", 8080)
    words = arguments(catalogue()["smollm2-135m"], options, Setup("ngram", 3, 2), tmp_path / "llama-server", address)
    line = " ".join(words)
    assert "--model smollm2-135m.bfloat16.gguf" in line
    assert "--parallel 2 --ctx-size 16384" in line  # the pair's context for each
    assert "--spec-type ngram-simple --spec-ngram-simple-size-n 2 --spec-ngram-simple-size-m 3" in line
    assert line.endswith("--spec-draft-n-max 3 --flash-attn off")
    rates = replace(options, synthetic_acceptance_rates=(0.8, 0.5), quantization="q8_0")
    words = arguments(catalogue()["smollm2-135m"], rates, Setup("ngram", 3, 1), tmp_path / "llama-server", address)
    assert "smollm2-135m.q8_0.gguf" in words
    assert words[words.index("--spec-synth-rates") + 1] == "0.8,0.5,0.0"


def test_a_missing_program_is_reported_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    reason = why_not("llama-server", "ngram", 1)
    assert reason is not None
    assert "python -m bench.tools.build_llama_server" in reason
    there = Peers(llama=LlamaOptions(Path("/some/llama-server")))
    assert why_not("llama-server", "ngram", 1, peers=there) is None
    assert "has no method=suffix" in str(why_not("llama-server", "suffix", 1, peers=there))


# -- files ---------------------------------------------------------------------------------------------------


def test_a_file_of_the_requested_type_is_read_as_it_is(gguf: Path) -> None:
    assert llama_files.file_type(gguf) == "F32"
    assert llama_files.gguf_file(str(gguf), "float32", None) == gguf


def test_a_file_is_converted_once(gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPECDEC_CACHE", str(tmp_path / "cache"))
    converter = tmp_path / "llama-quantize"
    converter.write_text('#!/bin/sh\necho "$@" >> "$0.log"\ncp "$2" "$3"\n')
    converter.chmod(0o755)
    made = llama_files.gguf_file(str(gguf), "q8_0", converter)
    assert made != gguf
    assert made.read_bytes() == gguf.read_bytes()
    assert llama_files.gguf_file(str(gguf), "q8_0", converter) == made
    (line,) = Path(f"{converter}.log").read_text().splitlines()
    assert line.endswith(" Q8_0")
    converter.write_text("#!/bin/sh\necho no such type >&2; exit 1\n")
    with pytest.raises(EngineError, match=r"(?s)must be convertible to Q4_0, but llama-quantize failed.*no such type"):
        llama_files.gguf_file(str(gguf), "q4_0", converter)


def test_models_that_are_no_gguf_file_are_refused() -> None:
    with pytest.raises(EngineError, match=r"reads GGUF files, but target='tiny' is none"):
        llama_files.gguf_file("tiny", "float32", None)


def test_a_missing_converter_is_reported_with_the_remedy(gguf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(EngineError, match=r"must be converted to BF16 by llama-quantize, which is not on PATH"):
        llama_files.gguf_file(str(gguf), "bfloat16", None)


def test_a_program_without_a_version_is_an_error(tmp_path: Path) -> None:
    program = tmp_path / "llama-server"
    program.write_text("#!/bin/sh\necho hello\n")
    program.chmod(0o755)
    with pytest.raises(EngineError, match="must name its version"):
        llama_server.installed_version(program)
