"""Invalid responses of a server: every cell fails with one sentence, at once, and without the API key."""

from __future__ import annotations

import json
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from http.server import BaseHTTPRequestHandler
from typing import Any

import pytest
from helpers.loopback import loopback

from bench.campaign.parsers import server_url, vllm_options
from bench.engines.base import EngineError
from bench.engines.counters import acceptance
from bench.engines.process import Child
from bench.engines.servers.completions import Client
from bench.engines.servers.streams import Row, parse_queue
from bench.engines.servers.vllm_server import request, server_environment
from specdec import SamplingParams
from specdec.servers import client as servers_client
from specdec.servers.client import api_key
from specdec.servers.metrics import difference, parse_counters
from specdec.servers.replies import parse_model, parse_version

KEY = "sk-Hush/1234=="
REQUEST = request("model", [1, 2, 3], SamplingParams(temperature=0, max_tokens=4), {2})
DRAFTS = {"acceptance_histogram": [1], "num_draft_tokens": 1}
Answer = Callable[[Any], None]


class Handler(BaseHTTPRequestHandler):
    """The test writes the answer; what can no longer be sent is dropped."""

    protocol_version = "HTTP/1.0"  # a body ends with the connection

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        try:
            self.server.answer(self)
        except OSError:
            self.close_connection = True

    def do_GET(self) -> None:
        self.headers["Content-Length"] = "0"
        self.do_POST()

    def log_message(self, *_: Any) -> None:
        """Nothing is printed."""


@pytest.fixture
def asked() -> Iterator[Callable[..., Any]]:
    """Serve an answer, and call a function with a client of the server."""
    with ExitStack() as servers:

        def ask(answer: Answer, action: Callable[[Client], Any], deadline_s: float = 30.0) -> Any:
            server = servers.enter_context(loopback(Handler, answer=answer, daemon_threads=True))
            return action(Client(server.url, KEY, 1.0, 100, deadline_s))

        yield ask


def sent(*lines: str, status: int = 200) -> Answer:
    def answer(handler: Any) -> None:
        handler.send_response(status)
        handler.end_headers()
        handler.wfile.write("\n".join(lines).encode())

    return answer


def event(tokens: Any, end: Any = None, **more: Any) -> str:
    return "data: " + json.dumps({"choices": [{"token_ids": tokens, "finish_reason": end}]} | more)


def complete(client: Client) -> Row:
    return client.complete_one(REQUEST, time.perf_counter())


def test_a_good_answer_is_taken(asked: Any) -> None:
    row = asked(sent(event([1, 2]), "", event([99], "stop"), "data: [DONE]"), complete)
    assert (row.token_ids, row.emitted, row.finish_reason) == ([1, 2, 99], [2, 1], "stop")


@pytest.mark.parametrize("token", [-1, 10**12, 1.5, None, True, "7", 100, [3], {}])
def test_invalid_token_ids_fail_the_cell(asked: Any, token: Any) -> None:
    with pytest.raises(EngineError, match=r"token_ids=.* must be integers from 0 and below 100"):
        asked(sent(event([3, token], "length")), complete)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["data: {"], "an event must be JSON, but the server sent"),
        (["data: " + "[" * 100_000], "an event must be JSON"),
        (["data: [1]"], "an event=.* must be an object"),
        (["data: null"], "an event=None must be an object"),
        ([event("abc", "stop")], "token_ids='abc' must be a list"),
        (['data: {"choices": {"a": 1}}'], "choices=.* must be a list"),
        (['data: {"choices": [null]}'], "choices=None must be an object"),
        ([event([1], "because")], "finish_reason='because' must be stop or length"),
        ([event([1], ["stop"])], r"finish_reason=\['stop'\] must be stop or length"),
        ([event([1], "stop"), event([2])], "must send no tokens after its finish_reason, but did"),
        ([event([1, 2, 3]), event([4, 5])], "must stop at max_tokens=4, but did not"),
        ([event([], "stop")], "must continue the prompt, but emitted no token"),
        ([event([1], "stop", metrics=3)], "metrics=3 must be an object"),
        ([event([1], "stop", metrics={"speculative_decoding": {"a": 1}})], "acceptance_histogram=None must be a list"),
        (
            [event([1], "stop", metrics={"speculative_decoding": {"acceptance_histogram": [-1]}})],
            "acceptance_histogram=-1 must be integers",
        ),
        (
            [
                event(
                    [1],
                    "stop",
                    metrics={"speculative_decoding": DRAFTS | {"num_draft_tokens": 0.5}},
                )
            ],
            "num_draft_tokens=0.5 must be integers",
        ),
    ],
)
def test_an_event_of_another_shape_fails_the_cell(asked: Any, lines: list[str], message: str) -> None:
    with pytest.raises(EngineError, match=message):
        asked(sent(*lines), complete)


@pytest.mark.parametrize("value", ["NaN", "nan", "inf", "-1", "1e400", "x", "1e300"])
def test_counters_that_are_no_counts_are_errors(value: str) -> None:
    with pytest.raises(EngineError, match=r"must be a number from 0 to 2\*\*53"):
        parse_counters(f'vllm:request_success_total{{a="b"}} {value}')
    with pytest.raises(EngineError, match=r"must be a number from 0 to 2\*\*53"):
        parse_queue(f"vllm:request_queue_time_seconds_sum 1\nvllm:request_queue_time_seconds_count {value}")


def test_counters_that_do_not_fit_together_are_errors() -> None:
    start = "vllm:spec_decode_num_"
    with pytest.raises(EngineError, match="must report vllm:spec_decode_num_draft_tokens_total"):
        parse_counters(f"{start}drafts_total 3")
    page = "\n".join(f"{start}{name}_total 3" for name in ("drafts", "draft_tokens", "accepted_tokens"))
    with pytest.raises(EngineError, match=r"positions of accepted tokens must be 0, 1, ..., but are \[7\]"):
        parse_counters(f'{page}\n{start}accepted_tokens_per_pos_total{{position="7"}} 1')
    with pytest.raises(EngineError, match="counters must only increase"):
        difference({"num_finished": 1}, {"num_finished": 2})
    with pytest.raises(EngineError, match="counters must only increase"):
        difference({"num_finished": 1, "accepted_at": [1, 2]}, {"num_finished": 0, "accepted_at": [1]})
    with pytest.raises(EngineError, match="must match the emitted tokens"):
        acceptance([1, 1], {"histogram": [0, 0, 1 << 52], "num_drafted": 3})


@pytest.mark.parametrize("text", ["", "{", "[]", '{"data": 3}', '{"data": []}', '{"data": [{"id": 3}]}', "[" * 100_000])
def test_pages_of_another_shape_are_errors(text: str) -> None:
    for parse in (parse_model, parse_version):
        with pytest.raises(EngineError, match="must be"):
            parse(text)


# ---- endless answers


def slowly(handler: Any) -> None:
    """A byte at a time: never silent, never finished."""
    handler.send_response(200)
    handler.end_headers()
    for _ in range(1000):
        handler.wfile.write(b" ")
        handler.wfile.flush()
        time.sleep(0.05)


def endless_line(handler: Any) -> None:
    handler.send_response(200)
    handler.end_headers()
    for _ in range(400):
        handler.wfile.write(b"x" * (1 << 20))


def test_a_request_has_a_deadline(asked: Any) -> None:
    start_s = time.perf_counter()
    with pytest.raises(EngineError, match=r"must finish within 0\.4 s, but did not"):
        asked(slowly, complete, deadline_s=0.4)
    with pytest.raises(EngineError, match=r"must finish within 1 s, but did not"):
        asked(slowly, Client.counters)
    assert time.perf_counter() - start_s < 10


def test_a_line_and_a_page_have_a_limit(asked: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(EngineError, match="must send lines of at most 1048576 bytes"):
        asked(endless_line, complete)
    monkeypatch.setattr(servers_client, "MAX_OF_PAGE", 1 << 21)
    with pytest.raises(EngineError, match="must answer /metrics with at most 2097152 bytes"):
        asked(endless_line, Client.counters)


# ---- the API key


@pytest.mark.parametrize("end", ["\r\n", "\n", "\r", " ", ""])
def test_a_key_is_stripped(end: str, asked: Any) -> None:
    assert api_key({"SPECDEC_SERVER_API_KEY": KEY + end}) == KEY
    for name in ("SPECDEC_SERVER_API_KEY", "VLLM_API_KEY"):
        assert server_environment("python", "cuda", {name: KEY + end})["VLLM_API_KEY"] == KEY
    assert api_key({}) is None
    assert api_key({"SPECDEC_SERVER_API_KEY": end}) is None


@pytest.mark.parametrize("key", ["Hush\r\nHost: evil", "Hush Hush", "Hush\x00", "Hüsh", 'Hush"'])
def test_an_invalid_key_is_refused_without_showing_it(key: str) -> None:
    with pytest.raises(EngineError, match="SPECDEC_SERVER_API_KEY must contain only letters, digits") as caught:
        api_key({"SPECDEC_SERVER_API_KEY": key})
    assert "Hush" not in str(caught.value)


@pytest.mark.parametrize(
    ("answer", "action"),
    [
        (sent(f"no {KEY} here", status=400), complete),
        (sent("x" * 1995 + KEY, status=500), complete),
        (sent("data: " + json.dumps({"error": {"message": f"bad key {KEY}"}})), complete),
        (sent("data: " + json.dumps({"error": KEY}).replace("/", "\\/")), complete),
        (sent(f"data: {{{KEY}"), complete),
        (sent(event([1], KEY)), complete),
        (sent(json.dumps({"data": [{"id": [KEY]}]})), Client.model),
        (sent(json.dumps({"version": [KEY]})), Client.version),
        (sent(f"vllm:request_success_total {KEY}"), Client.counters),
    ],
)
def test_a_server_that_echoes_the_key_gets_it_into_no_error(asked: Any, answer: Answer, action: Any) -> None:
    with pytest.raises(EngineError) as caught:
        asked(answer, action)
    assert "Hush" not in "".join(traceback.format_exception(caught.value))


def test_server_output_contains_no_control_characters(asked: Any) -> None:
    for answer, action in (
        (sent("\x1b[2J", status=500), complete),
        (sent("data: " + json.dumps({"error": "\x1b[2J"})), complete),
        (sent("vllm:request_success_total \x1b[2J"), Client.counters),
    ):
        with pytest.raises(EngineError, match=r"\\x1b\[2J"):
            asked(answer, action)


def test_nor_into_a_record(asked: Any) -> None:
    assert asked(sent(json.dumps({"version": f"1.{KEY}"})), Client.version) == "1.(API key)"
    assert asked(sent(json.dumps({"data": [{"id": KEY}]})), Client.model)["id"] == "(API key)"


def test_output_of_a_started_server_is_shown_without_secrets() -> None:
    environment = {"VLLM_API_KEY": KEY, "HF_TOKEN": "hf_abcdef", "PATH": "/bin:/usr/bin"}
    child = Child("engine=x", ["sh", "-c", "echo key $VLLM_API_KEY $HF_TOKEN"], environment, all_output=True)
    child.ends_within(10)
    assert str(child.failure("ended")).endswith("key (secret) (secret)")


@pytest.mark.parametrize(
    "url",
    [
        "http://:secret@host",
        "http://secret@host",
        "http://user:secret@host:80",
        "http://@host",
        "http://host:80/v1?api_key=secret",
        "http://host?secret",
        "http://host#secret",
        "http://host:secret",
        "ftp://host",
        "http://",
        "secret",
    ],
)
def test_an_address_has_no_secrets_and_none_is_printed(url: str) -> None:
    with pytest.raises(ValueError, match="server_url must be http://HOST:PORT or https://HOST:PORT") as caught:
        server_url("server_url", url)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    "url", ["http://host:8000", "https://Host.example/v1", "http://[::1]:80/v1", "http://10.0.0.1"]
)
def test_addresses_that_may_be_named(url: str) -> None:
    assert server_url("server_url", f" {url}\n") == url


@pytest.mark.parametrize("options", ['{"hf_token": "secret"}', '{"speculative_config": {"api_key": "secret"}}'])
def test_engine_options_have_no_secrets(options: str) -> None:
    """They stand in every record."""
    with pytest.raises(ValueError, match="must be left out, as options are printed and kept") as caught:
        vllm_options("vllm_options", options)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("options", ["[]", "{", '{"speculative_config": 3}', "[" * 100_000])
def test_engine_options_of_another_shape(options: str) -> None:
    with pytest.raises(ValueError, match="vllm_options must be a JSON object"):
        vllm_options("vllm_options", options)
