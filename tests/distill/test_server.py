"""A corpus from a server: by token ids where it gives them, else by encoding the text again."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest
from helpers.loopback import loopback

from specdec import Engine, SamplingParams
from specdec.distill.__main__ import main
from specdec.distill.corpus import Text, read_texts
from specdec.distill.server import ServerAnswers


@contextmanager
def served(answer: Any) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """A server whose answers to completion requests are answer(request): (status, JSON); its URL and the requests."""
    seen: list[dict[str, Any]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            seen.append(request | {"path": self.path, "key": self.headers["Authorization"]})
            status, content = answer(request)
            body = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args: object) -> None:
            return

    with loopback(Handler) as server:
        yield f"{server.url}/v1", seen


def choices(**choice: Any) -> tuple[int, Any]:
    return 200, {"choices": [choice], "usage": {"completion_tokens": choice.pop("count", 3)}}


@pytest.fixture
def text() -> Text:
    return Text((5, 6, 7), (), 0.7, 11)


def answers_of(url: str, default_vocabulary, num_concurrent: int = 2) -> ServerAnswers:
    return ServerAnswers(url, "served", default_vocabulary.tokenizer, default_vocabulary.vocab_size, num_concurrent)


def test_token_ids_are_taken_as_they_are(default_vocabulary, text: Text, monkeypatch) -> None:
    monkeypatch.setenv("SPECDEC_SERVER_API_KEY", "secret")
    with served(lambda request: choices(text="?", token_ids=[*request["prompt"], 9])) as (url, seen):
        assert answers_of(url, default_vocabulary)([text, Text((1, 2), (), 0.0, 3)], 8) == [(5, 6, 7, 9), (1, 2, 9)]
    asked = next(request for request in seen if request["seed"] == 11)
    expected = {"model": "served", "prompt": [5, 6, 7], "max_tokens": 8, "temperature": 0.7, "return_token_ids": True}
    assert asked | expected == asked
    assert (asked["path"], asked["key"]) == ("/v1/completions", "Bearer secret")


def test_a_text_is_encoded_again_and_ends_with_the_server_s_finish_reason(
    default_vocabulary, text: Text, caplog
) -> None:
    tokenizer = default_vocabulary.tokenizer
    own = tuple(tokenizer("It is 14.").input_ids)
    replies = iter([("length", len(own)), ("stop", len(own) + 1), ("length", len(own) + 2)])

    def answer(request: dict[str, Any]) -> tuple[int, Any]:
        reason, count = next(replies)
        return choices(text="It is 14.", finish_reason=reason, count=count)

    with served(answer) as (url, _), caplog.at_level(logging.WARNING, "specdec"):
        answers = answers_of(url, default_vocabulary, 1)
        assert answers([text, text], 8) == [own, (*own, tokenizer.eos_token_id)]
        assert not caplog.records
        assert answers([text], 8) == [own]
    assert "1 of 1 answers of http" in caplog.text


@pytest.mark.parametrize(
    ("answer", "error", "message"),
    [
        (choices(text="", token_ids=[1 << 20]), ValueError, "must answer with tokens below 49152, .* but gave"),
        (choices(text="", token_ids=[]), ValueError, "must answer with tokens below 49152"),
        ((200, {"choices": []}), ValueError, "must answer as OpenAI's completions do"),
        (
            (404, {"error": "no such model"}),
            OSError,
            "but answered 404: .*no such model.*; to go on, check",
        ),
    ],
)
def test_a_wrong_answer_is_reported(answer, error, message: str, default_vocabulary, text: Text) -> None:
    with served(lambda request: answer) as (url, _), pytest.raises(error, match=message):
        answers_of(url, default_vocabulary)([text], 8)


def test_an_unreachable_server_and_a_wrong_url_are_reported(default_vocabulary, text: Text) -> None:
    with served(lambda request: choices(text="")) as (url, _):
        pass
    with pytest.raises(OSError, match=r"must be reachable .*; start it, .*; to go on, check .*, then rerun"):
        answers_of(url, default_vocabulary)([text], 8)
    with pytest.raises(ValueError, match="url='localhost' must begin with http"):
        answers_of("localhost", default_vocabulary)


def test_an_invalid_key_is_an_error_of_the_user(default_vocabulary, monkeypatch) -> None:
    monkeypatch.setenv("SPECDEC_SERVER_API_KEY", "two words")
    with pytest.raises(ValueError, match="SPECDEC_SERVER_API_KEY must contain only"):
        answers_of("http://localhost", default_vocabulary)


def test_a_served_target_gives_the_corpus_that_it_gives_here(target_folder: Path, tmp_path: Path) -> None:
    """The same command, with the target's engine at the other end of the wire."""
    engine = Engine.load(str(target_folder))
    rows = [{"prompt": f"What is {n} plus {n}?"} for n in range(6)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def answer(request: dict[str, Any]) -> tuple[int, Any]:
        names = ("temperature", "max_tokens", "seed")
        sampling = SamplingParams(**{name: request[name] for name in names})
        return choices(text="", token_ids=list(engine.generate([request["prompt"]], sampling)[0].token_ids))

    options = ["corpus", "--target", str(target_folder), "--prompts", str(tmp_path / "prompts.jsonl")]
    options += ["--num-prompts", "6", "--max-tokens", "6", "--batch-size", "1"]
    with served(answer) as (url, seen):
        assert main([*options, "--folder", str(tmp_path / "served"), "--url", url, "--model", "name"]) == 0
    assert {request["model"] for request in seen} == {"name"}
    assert main([*options, "--folder", str(tmp_path / "here")]) == 0
    texts, others = (list(read_texts(tmp_path / name / "texts.jsonl")) for name in ("served", "here"))
    assert texts == others
    assert main([*options, "--folder", str(tmp_path / "x"), "--model", "name"]) == 2
