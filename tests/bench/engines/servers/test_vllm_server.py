"""The served vLLM, against recorded pages and streams of a real server, and against one that misbehaves."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest
from helpers.loopback import loopback

from bench.catalogue.pairs import Pair, catalogue
from bench.engines.base import EngineError, LoadOptions, Peers, RunningServers, Setup, Urls, VllmOptions
from bench.engines.registry import why_not
from bench.engines.servers import vllm_server
from bench.engines.servers.completions import Client
from bench.engines.servers.streams import Row, parse_queue
from bench.engines.servers.vllm_server import VllmServerEngine, request, run, server_environment
from bench.measure.paired import check_counts
from specdec import SamplingParams
from specdec.servers.errors import BusyError
from specdec.servers.metrics import difference, parse_counters

RECORDED = json.loads((Path(__file__).parents[2] / "recorded" / "vllm-server.json").read_text())
BEFORE, AFTER = ("\n".join(RECORDED[name]) for name in ("before", "after"))
PAIR = Pair("served", "smollm2-135m")
GREEDY = SamplingParams(temperature=0, max_tokens=12)
NGRAM = Setup("ngram", 3, 1)


class Handler(BaseHTTPRequestHandler):
    """Answers as the recorded server did, after the answers that a test plans."""

    def do_GET(self) -> None:
        pages = {
            "/health": "",
            "/version": RECORDED["version"],
            "/v1/models": RECORDED["models"],
            "/metrics": self.server.metrics.pop(0) if len(self.server.metrics) > 1 else self.server.metrics[0],
        }
        self.answer(200, pages[self.path])

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.seen.append((body, self.headers["Authorization"]))
        plan = self.server.planned.pop(0) if self.server.planned else "stream"
        if isinstance(plan, int):
            self.answer(plan, "no")
        elif plan == "silence":
            time.sleep(2)
        else:
            lines = RECORDED["stream"] if plan == "stream" else RECORDED["stream"][:2]
            self.answer(200, "\n".join(lines))

    def answer(self, status: int, text: str) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(text.encode())))
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *_: Any) -> None:
        """Nothing is printed."""


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A server. metrics: its next pages, the last one for ever. planned: its answers to the next completions."""
    monkeypatch.setattr("specdec.servers.client.FIRST_PAUSE_S", 0.01)
    with loopback(Handler, metrics=[BEFORE, AFTER], planned=[], seen=[]) as server:
        yield server


def client(server: Any, key: str | None = None) -> Client:
    return Client(f"{server.url}/v1/", key, timeout_s=0.5, vocab_size=100_000)


REQUEST = request("model", [1, 2, 3], GREEDY, {2})


def test_a_stream_gives_tokens_times_and_counters(server: Any) -> None:
    (result,) = run(client(server), [REQUEST]).results
    assert len(result.token_ids) == 12
    assert 0 < result.ttft_s <= result.latency_s
    assert result.finish_reason == "length"
    check_counts([run(client(server), [REQUEST])], "ngram", 12)
    counts = result.counts
    assert counts is not None
    # the same prompt as in recorded/vllm.json, there in process
    assert (counts.num_steps, counts.num_drafted, counts.accepted_at) == (7, 9, [2, 2, 1])
    sent, _ = server.seen[0]
    assert sent["prompt"] == [1, 2, 3]
    assert sent["stream"]
    assert sent["return_token_ids"]


def test_counters_of_the_metrics_page_are_the_same() -> None:
    grown = difference(parse_counters(AFTER), parse_counters(BEFORE))
    row = Row(12, 100_000)
    for line in RECORDED["stream"]:
        if line.startswith("data: {"):
            row.take(json.loads(line[6:]), 1.0)
    assert row.drafts is not None
    histogram = row.drafts["histogram"]
    assert grown["num_finished"] == 1
    assert grown["num_drafts"] == sum(histogram)
    assert grown["num_drafted"] == row.drafts["num_drafted"]
    assert grown["accepted_at"] == [sum(histogram[1:]), sum(histogram[2:]), sum(histogram[3:])]


# -- requests that arrive over time --------------------------------------------------------------------------


def test_a_load_counts_from_each_arrival(server: Any) -> None:
    server.metrics = [BEFORE + "\n" + queue_page(10.0, 5), AFTER + "\n" + queue_page(12.0, 9)]
    served = vllm_server.serve(client(server), [REQUEST] * 3, [0.0, 0.05, 0.1], 60)
    assert len(server.seen) == 3
    assert (served.refused, served.queue_s) == (frozenset(), 0.5)  # two seconds of four requests
    assert served.wall_s >= 0.1
    assert served.peak_send_delay_s is not None
    for result in served.results:
        assert result is not None
        assert 0 < result.ttft_s <= result.latency_s
        assert result.counts is not None
        assert (len(result.token_ids), result.counts.num_drafted) == (12, 9)


def test_a_load_records_refusals_and_aborts_late_requests(server: Any) -> None:
    server.planned = [503, "silence", "stream"]
    served = vllm_server.serve(client(server), [REQUEST] * 3, [0.0, 0.1, 0.2], 0.35)
    assert [result is not None for result in served.results] == [False, False, True]
    assert served.refused == {0}
    assert served.queue_s is None  # its page has no queue times
    assert served.wall_s < 2  # the silent one was not waited for


def test_an_error_ends_the_load(server: Any) -> None:
    server.planned = ["stream", 400]
    with pytest.raises(EngineError, match="must accept the request, but answered 400: no"):
        vllm_server.serve(client(server), [REQUEST] * 3, [0.0, 0.05, 3600.0], 7200)


def queue_page(seconds: float, number: int) -> str:
    name = "vllm:request_queue_time_seconds"
    bucket = f'{name}_bucket{{engine="0",le="0.3"}} 3.0'
    return f'{bucket}\n{name}_sum{{engine="0"}} {seconds}\n{name}_count{{engine="0"}} {float(number)}'


def test_queues_of_all_engines_are_added() -> None:
    assert parse_queue(queue_page(1.5, 3) + "\n" + queue_page(2.0, 4)) == (3.5, 7)
    assert parse_queue(BEFORE) is None


def test_a_page_without_drafts_has_only_finished_requests() -> None:
    page = 'vllm:request_success_total{engine="0",finished_reason="stop"} 2.0\nvllm:request_success_total{a="b"} 3.0'
    assert parse_counters(page) == {"num_finished": 5}


def test_prompts_are_continued_side_by_side(server: Any) -> None:
    results = run(client(server), [REQUEST] * 4).results
    assert len({result.token_ids for result in results}) == 1
    assert len(server.seen) == 4


def test_steps_that_came_at_once_are_not_counted() -> None:
    assert vllm_server._counts([1, 2], None, False) == (None, "several steps arrived together")


def test_requests_to_a_busy_server_are_retried_a_few_times(server: Any) -> None:
    server.planned = [503, 429]
    assert run(client(server), [REQUEST]).results[0].token_ids
    server.planned = [503] * 5
    with pytest.raises(BusyError, match="must accept the request, but answered 503: no"):
        run(client(server), [REQUEST])
    assert len(server.planned) == 2


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (400, "must accept the request, but answered 400: no"),
        (401, "must accept the API key; set SPECDEC_SERVER_API_KEY"),
        ("broken off", "must finish the completion, but ended the stream"),
        ("silence", r"must answer within 0\.5 s, but did not"),
    ],
)
def test_errors_are_reported_and_not_retried(server: Any, plan: Any, message: str) -> None:
    server.planned = [plan]
    with pytest.raises(EngineError, match=f"server={server.url} {message}"):
        run(client(server, "secret"), [REQUEST])
    assert [key for _, key in server.seen] == ["Bearer secret"]


def test_an_older_server_without_token_ids_is_an_error() -> None:
    with pytest.raises(EngineError, match="must return token ids"):
        Row(12, 100).take({"choices": [{"text": "a", "finish_reason": None}]}, 1.0)


def served(server: Any, pair: Pair = PAIR) -> VllmServerEngine:
    options = LoadOptions("bfloat16", "cpu", peers=Peers(servers=RunningServers(Urls((("", server.url),)))))
    return VllmServerEngine(pair, options, {2})


def test_a_server_that_is_up_is_used_if_it_agrees(server: Any) -> None:
    engine = served(server)
    engine.prepare({NGRAM})
    assert engine.version == json.loads(RECORDED["version"])["version"]
    assert len(engine.generate([(1, 2, 3)], "ngram", 3, [GREEDY]).results[0].token_ids) == 12
    engine.close()


@pytest.mark.parametrize(
    ("pair", "setup", "message"),
    [
        (catalogue()["tiny-random"], NGRAM, "must serve target=tiny of pair=tiny-random, but serves"),
        (PAIR, Setup("ngram", 5, 1), "must draft gamma=5 tokens for method=ngram, but drafts 3; use .*--gammas 3"),
        (PAIR, Setup("autoregressive", 0, 1), "must draft gamma=0 tokens for method=autoregressive, but drafts 3; use"),
    ],
)
def test_a_server_that_does_not_agree_is_an_error(server: Any, pair: Pair, setup: Setup, message: str) -> None:
    with pytest.raises(EngineError, match=message):
        served(server, pair).prepare({setup})


def test_an_unreachable_server_is_an_error(server: Any) -> None:
    options = LoadOptions("bfloat16", "cpu", peers=Peers(servers=RunningServers(Urls((("", "http://127.0.0.1:9"),)))))
    with pytest.raises(
        EngineError, match=r"server=http://127.0.0.1:9 must be reachable \(.*\); start it, or check the"
    ):
        VllmServerEngine(PAIR, options, {2}).prepare({NGRAM})


def test_a_server_that_does_not_start_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "vllm_server.py").write_text("import sys; print('address already in use'); sys.exit(1)")
    monkeypatch.setattr(vllm_server, "SCRIPT", tmp_path / "vllm_worker.py")
    engine = VllmServerEngine(catalogue()["tiny-random"], LoadOptions("float32", "cpu"), ())
    with pytest.raises(
        EngineError, match=r"(?s)must become healthy, but ended with exit status 1; .*address already in use"
    ):
        engine.prepare({NGRAM})


def test_a_server_needs_no_interpreter_if_it_is_up() -> None:
    servers = RunningServers(Urls((("vllm-server", "http://host:1"),)))
    assert why_not("vllm-server", "ngram", 1, peers=Peers(VllmOptions(Path("/none")), servers=servers)) is None


def test_threads_are_bound_by_the_server_itself() -> None:
    environment = server_environment(sys.executable, "cpu", {"SPECDEC_SERVER_API_KEY": "secret"})
    assert "OMP_NUM_THREADS" not in environment
    assert environment["VLLM_API_KEY"] == "secret"
    assert "VLLM_ENABLE_V1_MULTIPROCESSING" not in environment
