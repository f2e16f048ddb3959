"""Audits over HTTP, from the command to the certificate, of real engines that are right and of servers that are not."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from helpers.served import Cache, Model, dies, hesitates, of_choice, refuses_seeds, serving

from specdec.conformance.__main__ import main
from specdec.conformance.certificate import Certificate
from specdec.conformance.served.prompts import read_prompts

ENOUGH = ("--num-draws", "420", "--max-tv", "0.3", "--max-tokens", "24")
MORE = ("--num-draws", "900", "--max-tv", "0.2", "--max-tokens", "24")  # for the arms to differ beyond doubt
FEW = ("--num-draws", "200", "--max-tv", "0.2", "--max-tokens", "24")
Audit = Callable[..., tuple[int, dict[str, Any]]]


def run(audit: Audit, engines: Any, *options: str, change: Any = None, control: Any = None) -> Any:
    """Audit two served models. change, control: of the replies with speculation and without."""
    changes = {"speculative": change, "plain": control}
    models = {name: Model(engine, *filter(None, [changes[name]])) for name, engine in engines.items()}
    with serving(models["speculative"]) as url, serving(models["plain"]) as plain_url:
        return *audit(url, "--control-url", plain_url, *options), models


# -- engines that are right, and one that is not -----------------------------------------------------------------


def test_a_lossless_engine_is_certified(audit: Audit, engines: Any, tmp_path: Path, capsys: Any) -> None:
    status, record, models = run(audit, engines, *ENOUGH, "--method", "ngram", "--gamma", "4")
    assert (status, record["verdict"]) == (0, "lossless"), record["reasons"]
    assert "lossless (TV < 0.3)" in capsys.readouterr().out
    counts = models["speculative"].counts
    assert 0 < record["num_accepted"] == counts["accepted"] < record["num_drafted"] == counts["drafted"]
    assert (record["engine"], record["engine_version"], record["method"]) == ("vllm", "0.0", "ngram")
    conditions = json.loads(record["options"])
    assert (conditions["tokens"], conditions["concurrency"]) == ("token ids", 8)
    assert all(each.startswith("0 of ") for each in conditions["left_out"])
    assert record["command"].startswith("python -m specdec.conformance audit --url http://127.0.0.1:")
    assert "--num-draws 420" in record["command"]
    assert "lossless (TV < 0.3): engine vllm" in (tmp_path / "audit.md").read_text()
    suite = ElementTree.parse(tmp_path / "audit.xml").getroot()
    assert (suite.get("tests"), suite.get("failures"), suite.get("errors")) == ("1", "0", "0")


def test_every_request_has_its_seed_and_every_parameter(audit: Audit, engines: Any) -> None:
    options = ("--temperature", "0.7", "--top-k", "9", "--top-p", "0.9", "--seed", "3")
    _, record, models = run(audit, engines, "--num-draws", "60", *options)
    requests = [*models["speculative"].requests, *models["plain"].requests]
    assert len({request["seed"] for request in requests}) == len(requests)
    assert {(each["temperature"], each["top_k"], each["top_p"], each["max_tokens"]) for each in requests} == {
        (0.7, 9, 0.9, 32)
    }
    assert all(request["return_token_ids"] for request in requests)
    assert record["sampling"]["top_k"] == 9


def test_greedy_decoding_is_audited(audit: Audit, engines: Any) -> None:
    status, record, _ = run(audit, engines, "--temperature", "0", "--max-tv", "0.3", "--max-tokens", "48")
    assert (status, record["direction"]) == (0, "equality"), record["reasons"]


def test_an_engine_that_draws_at_another_temperature_with_speculation_is_lossy(audit: Audit, engines: Any) -> None:
    class Cold(Model):
        def reply(self, request: dict[str, Any]) -> dict[str, Any]:
            return super().reply(request | {"temperature": 0.3})

    speculative, plain = Cold(engines["speculative"]), Model(engines["plain"])
    with serving(speculative) as url, serving(plain) as plain_url:
        status, record = audit(url, "--control-url", plain_url, *MORE)
    assert (status, record["verdict"]) == (1, "lossy"), record["reasons"]


def test_the_server_may_be_its_own_reference_which_is_weaker(audit: Audit, engines: Any) -> None:
    options = ("--reference", "server", "--top-k", "12", *ENOUGH)
    status, record, _ = run(audit, engines, *options)
    assert (status, record["verdict"]) == (0, "lossless"), record["reasons"]
    assert "the reference is the server's own prompt log-probabilities" in record["reasons"][-1]
    assert json.loads(record["options"])["reference"] == "the server's log-probabilities"

    class Cold(Model):
        def reply(self, request: dict[str, Any]) -> dict[str, Any]:
            return super().reply(request | {"temperature": 0.3})

    with serving(Cold(engines["speculative"])) as url, serving(Model(engines["plain"])) as plain_url:
        status, record = audit(url, "--control-url", plain_url, *options, *MORE)
    assert (status, record["verdict"]) == (1, "lossy"), record["reasons"]


def test_its_own_log_probabilities_must_cover_what_sampling_keeps(audit: Audit, engines: Any, capsys: Any) -> None:
    status, _, _ = run(audit, engines, "--reference", "server", *FEW)
    assert status == 2
    assert "top_k=0 must lie between 1 and 20" in capsys.readouterr().err


WRONG_LOGPROBS = {
    "none": (None, "prompt_logprobs=None must be a list"),
    "too few": ([None], "must report log-probabilities of"),
    "other rows": (3, "prompt_logprobs=3 must be an object"),
    "other tokens": ({"61": {"logprob": -1.0}}, "must be log-probabilities of tokens below 61"),
    "no probabilities": ({"5": {"logprob": 2.0}}, "must be log-probabilities of tokens below 61"),
}


@pytest.mark.parametrize("fault", WRONG_LOGPROBS)
def test_wrong_log_probabilities_give_no_verdict(fault: str, audit: Audit, engines: Any) -> None:
    value, message = WRONG_LOGPROBS[fault]

    def wrong(choice: Any, request: Any) -> Any:
        if "prompt_logprobs" not in request:
            return choice
        rows = value if fault in ("none", "too few") else [value] * len(request["prompt"])
        return choice | {"prompt_logprobs": rows}

    status, record, _ = run(audit, engines, "--reference", "server", "--top-k", "12", *FEW, control=of_choice(wrong))
    assert (status, record["verdict"]) == (3, "inconclusive")
    assert message in record["reasons"][0]


def test_one_server_may_serve_both_arms(audit: Audit, engines: Any) -> None:
    class Both(Model):
        def post(self, request: dict[str, Any]) -> tuple[int, str]:
            self.engine = engines["plain" if request.get("speculate") is False else "speculative"]
            return super().post(request)

        def reply(self, request: dict[str, Any]) -> dict[str, Any]:
            before = dict(self.counts)
            reply = super().reply(request)
            drafts = {
                "num_draft_tokens": self.counts["drafted"] - before["drafted"],
                "num_accepted_draft_tokens": self.counts["accepted"] - before["accepted"],
            }
            return reply | {"metrics": {"speculative_decoding": drafts}}

    with serving(Both(engines["plain"])) as url:
        fields = ("--control-fields", '{"speculate": false}')
        status, record = audit(url, *fields, *ENOUGH, "--concurrency", "1")
    assert (status, record["verdict"]) == (0, "lossless"), record["reasons"]
    assert record["num_drafted"] > 0


def test_the_ten_lines_of_the_documentation_certify_an_engine(
    engines: Any, target: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its command as it is, with its two servers and target replaced by tiny ones, and fewer tokens."""
    page = (Path(__file__).parents[3] / "docs" / "auditing.md").read_text()
    (block,) = re.findall(r"```bash\n(vllm serve.*?)```", page, re.S)
    assert block.count("\n") <= 10
    (line,) = [each for each in block.replace("\\\n", " ").splitlines() if each.startswith("python ")]
    monkeypatch.chdir(tmp_path)
    with serving(Model(engines["speculative"])) as url, serving(Model(engines["plain"])) as plain_url:
        places = {"http://localhost:8000": url, "http://localhost:8001": plain_url}
        places["HuggingFaceTB/SmolLM2-135M-Instruct"] = str(target)
        words = [places.get(word, word) for word in shlex.split(line)]
        assert words[:3] == ["python", "-m", "specdec.conformance"]
        prompts = ["--prompts", str(target / "prompts.jsonl")]  # the built-in ones are not in this target's alphabet
        assert main([*words[3:], *prompts, "--num-draws", "420", "--max-tv", "0.3"]) == 0
    assert {path.name for path in (tmp_path / "certificates").iterdir()} == {
        *("vllm-ngram.json", "vllm-ngram.md", "vllm-ngram.xml"),
    }


# -- log-probabilities -------------------------------------------------------------------------------------------


def constant(choice: Any, request: Any) -> Any:
    """As llama.cpp reports those of steps that verify a draft."""
    return choice | {"logprobs": {"token_logprobs": [0.0] * len(choice["token_ids"])}}


@pytest.mark.parametrize("temperature", ["0", "1"])
def test_log_probabilities_are_compared_with_the_targets(temperature: str, audit: Audit, engines: Any) -> None:
    options = (
        "--logprobs",
        "--temperature",
        temperature,
        "--max-tokens",
        "24",
        "--num-draws",
        "420",
        "--max-tv",
        "0.3",
    )
    status, record, models = run(audit, engines, *options)
    assert (status, record["verdict"]) == (0, "lossless"), record["reasons"]
    assert models["speculative"].requests[0]["logprobs"] == 1
    assert "--logprobs --" in f"{record['command']} --"

    status, record, _ = run(audit, engines, *options, change=of_choice(constant))
    assert (status, record["verdict"]) == (1, "lossy")
    assert re.match(
        r"\d+ of \d+ reported log-probabilities are further than 1 from the target's: 0 at position \d+ must be -\d",
        record["reasons"][0],
    )
    assert record["errors"] == record["reasons"][:1]

    status, record, _ = run(audit, engines, *options, change=of_choice(constant), control=of_choice(constant))
    assert (status, record["verdict"]) == (3, "inconclusive")
    assert record["reasons"][0].startswith("without speculation, ")


WRONG_OUTPUT_LOGPROBS = {
    "none": ({"logprobs": None}, "its reply has none"),
    "too few": ({"logprobs": {"token_logprobs": [-1.0]}}, r"must report \d+ log-probabilities, but sent 1"),
    "text": ({"logprobs": {"token_logprobs": ["x"]}}, "log-probability 'x' must be a number"),
}


@pytest.mark.parametrize("fault", WRONG_OUTPUT_LOGPROBS)
def test_log_probabilities_of_another_shape_give_no_verdict(fault: str, audit: Audit, engines: Any) -> None:
    changed, message = WRONG_OUTPUT_LOGPROBS[fault]
    change = of_choice(lambda choice, request: choice | changed)
    status, record, _ = run(audit, engines, "--logprobs", *FEW, change=change)
    assert (status, record["verdict"]) == (3, "inconclusive")
    assert re.search(message, record["reasons"][0])


# -- speculation that is not confirmed ---------------------------------------------------------------------------


def test_without_drafts_there_is_no_verdict(audit: Audit, engines: Any) -> None:
    status, record, _ = run(audit, {"speculative": engines["plain"], "plain": engines["plain"]}, *ENOUGH)
    assert (status, record["verdict"]) == (3, "inconclusive")
    assert "no token was drafted" in record["reasons"][0]


def test_without_counters_there_is_no_verdict(audit: Audit, engines: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Model, "get", lambda self, path: (404, "") if path == "/metrics" else GET(self, path))
    status, record, _ = run(audit, engines, *ENOUGH)
    assert (status, record["num_drafted"]) == (3, None)
    assert "speculation not confirmed" in record["reasons"][0]


GET = Model.get


def test_counters_that_others_move_do_not_confirm_it(audit: Audit, engines: Any) -> None:
    def busy(reply: Any, request: Any, number: int) -> Any:
        models[0].counts["finished"] += 1
        return reply

    models = [Model(engines["speculative"], busy)]
    with serving(models[0]) as url, serving(Model(engines["plain"])) as plain_url:
        status, record = audit(url, "--control-url", plain_url, *ENOUGH)
    assert (status, record["num_drafted"]) == (3, None)


def test_a_control_arm_that_speculates_is_none(audit: Audit, engines: Any) -> None:
    status, record, _ = run(audit, dict.fromkeys(engines, engines["speculative"]), *ENOUGH)
    assert status == 3
    assert "the control arm must not speculate, but drafted" in record["reasons"][0]


# -- servers that go wrong: never a verdict ------------------------------------------------------------------------


def lies(choice: Any, request: Any) -> Any:
    first, *others = choice["token_ids"]
    return choice | {"token_ids": [7 if first == 8 else 8, *others]}


def of_another_vocabulary(choice: Any, request: Any) -> Any:
    return choice | {"token_ids": [token + 50 for token in choice["token_ids"]]}


def truncates(choice: Any, request: Any) -> Any:
    return choice | {"token_ids": choice["token_ids"][:3], "text": "", "finish_reason": "length"}


def other_tokenizer(choice: Any, request: Any) -> Any:
    """The ids mean something else, and the text follows the ids that the server means."""
    return choice | {"text": choice["text"][::-1] + "?"}


def other_ids(choice: Any, request: Any) -> Any:
    return choice | {"token_ids": [max(3, 60 - token) for token in choice["token_ids"]]}


def goes_on(choice: Any, request: Any) -> Any:
    return choice | {"token_ids": [5] * 30, "text": "c" * 30, "finish_reason": "length"}


BAD = {
    "lies about token ids": (of_choice(lies), "the token ids are decoded to"),
    "has another vocabulary": (of_choice(of_another_vocabulary), "token ids must be below 61"),
    "truncates": (of_choice(truncates, after=8), "must not truncate completions, but ended one after 3 of 24"),
    "changes the tokenizer in mid-run": (of_choice(other_tokenizer, after=12), "the token ids are decoded to"),
    "changes ids in mid-run": (of_choice(other_ids, after=12), "the token ids are decoded to"),
    "dies": (dies, "the connection broke"),
    "answers slowly": (hesitates, "must (answer|finish) within 1 s, but did not"),
    "refuses seeds": (refuses_seeds, "must accept the request, but answered 400"),
    "caches": (Cache(), "must use the seed and not cache replies"),
    "sends an error": (lambda reply, request, number: {"error": {"message": "no GPU"}}, "no GPU"),
    "sends something else": (lambda reply, request, number: [1, 2], "must be an object"),
    "sends no choice": (lambda reply, request, number: {"choices": []}, "choices=None must be an object"),
    "sends floats": (
        of_choice(lambda choice, request: choice | {"token_ids": [0.5]}),
        "token_ids=0.5 must be integers",
    ),
    "goes on after the limit": (
        of_choice(
            lambda choice, request: choice | {"token_ids": [5] * 30, "text": "c" * 30, "finish_reason": "length"}
        ),
        "must stop at max_tokens=24|tokens are decoded|the server counts",
    ),
    "cuts the prompt": (
        lambda reply, request, number: reply | {"usage": {"prompt_tokens": 2, "completion_tokens": 3}},
        "must read the prompt as",
    ),
    "counts other tokens": (
        lambda reply, request, number: reply | {"usage": {"completion_tokens": 99}},
        "but the server counts 99",
    ),
}


@pytest.mark.parametrize("fault", BAD)
def test_a_bad_server_gets_no_verdict(fault: str, audit: Audit, engines: Any, tmp_path: Path) -> None:
    change, reason = BAD[fault]
    both = {"control": change} if fault == "refuses seeds" else {}
    status, record, _ = run(audit, engines, *FEW, "--timeout", "1" if "slow" in fault else "20", change=change, **both)
    assert (status, record["verdict"]) == (3, "inconclusive"), record
    assert any(re.search(reason, each) for each in record["reasons"]), record["reasons"]
    assert Certificate.load(tmp_path / "audit.json").findings.headline.startswith("inconclusive: ")
    suite = ElementTree.parse(tmp_path / "audit.xml").getroot()
    assert (suite.get("failures"), suite.get("errors")) == ("0", "1")


@pytest.mark.parametrize("fault", ["caches", "truncates", "lies about token ids"])
def test_nor_if_the_control_arm_is_bad(fault: str, audit: Audit, engines: Any) -> None:
    change, reason = BAD[fault]
    status, record, _ = run(audit, engines, *FEW, control=Cache() if fault == "caches" else change)
    assert (status, record["verdict"]) == (3, "inconclusive")
    assert any(re.search(reason, each) for each in record["reasons"]), record["reasons"]


def test_a_few_uncertain_outputs_are_left_out_and_counted(audit: Audit, engines: Any) -> None:
    def lies_once(reply: Any, request: Any, number: int) -> Any:
        return of_choice(lies)(reply, request, 1) if number == 5 else reply

    status, record, models = run(audit, engines, *ENOUGH, change=lies_once)
    assert (status, record["verdict"]) == (0, "lossless"), record["reasons"]
    assert json.loads(record["options"])["left_out"][0].startswith("1 of ")
    assert sum(request["seed"] >= 1 << 28 for request in models["speculative"].requests) == 1  # drawn again


# -- text instead of token ids -------------------------------------------------------------------------------------


def test_a_text_is_encoded_again_and_uncertain_ones_are_counted(audit: Audit, engines: Any) -> None:
    def without_ids(choice: Any, request: Any) -> Any:
        return {name: value for name, value in choice.items() if name != "token_ids"}

    change = of_choice(without_ids)
    options = ("--server", "openai", "--max-tokens", "2", "--num-draws", "120", "--max-tv", "0.9")
    status, record, models = run(audit, engines, *options, change=change, control=change)
    conditions = json.loads(record["options"])
    assert conditions["tokens"] == "text, encoded again"
    assert isinstance(models["speculative"].requests[0]["prompt"], str)
    left_out = [int(each.split()[0]) for each in conditions["left_out"]]
    assert left_out[0] > 0  # some tokens can be written in two ways, and a random model draws them so
    assert status in (0, 3)


# -- the command line ----------------------------------------------------------------------------------------------


WRONG = [
    (["--url", "host"], "must be http://HOST:PORT"),
    (["--url", "http://user:secret@host"], "must be http://HOST:PORT"),
    (["--url", "http://host"], "the control arm is missing; give --control-url"),
    (["--url", "http://host", "--control-fields", "[]"], "must be a JSON object"),
    (["--url", "http://host", "--control-fields", "{}", "--seed", "128"], "seed=128 must lie between 0 and 127"),
    (["--url", "http://host", "--control-fields", "{}", "--temperature", "-1"], "temperature=-1.0 must be"),
    (["--url", "http://host", "--control-fields", "{}", "--num-draws", "0"], "must be an integer of at least 1"),
    (["--url", "http://host", "--control-fields", "{}", "--max-tv", "2"], "'2' must lie between 0 and 1"),
    (["--url", "http://host", "--control-fields", "{}", "--server", "vlm"], "invalid choice"),
    (["--url", "http://host", "--control-fields", "{}", "--logprobs", "--top-k", "3"], "must be used with temperature"),
    (["--url", "http://host", "--control-fields", "{}", "--prompts", "none.jsonl"], "none.jsonl"),
]


def test_errors_of_the_command_line_are_one_line_each_without_torch() -> None:
    code = (
        "import json, sys\nfrom specdec.conformance.__main__ import main\n"
        "for options in json.loads(sys.argv[1]):\n"
        "    try: status = main(['audit', *options])\n"
        "    except SystemExit as end: status = end.code\n"
        "    assert status == 2, (options, status)\n"
        "assert 'torch' not in sys.modules"
    )
    options = json.dumps([options for options, _ in WRONG])
    done = subprocess.run([sys.executable, "-c", code, options], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    lines = done.stderr.splitlines()
    assert len(lines) == len(WRONG), lines
    for line, (_, message) in zip(lines, WRONG, strict=True):
        assert line.startswith("error: ")
        assert message in line
        assert "secret" not in line


def test_a_server_that_is_not_there_is_an_error(capsys: Any) -> None:
    assert main(["audit", "--url", "http://127.0.0.1:9", "--control-fields", "{}"]) == 2
    assert "must be reachable" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["", "{", '{"prompt": 3}', '["prompt"]', '{"prompt": ""}'])
def test_prompts_of_another_shape_are_errors(text: str, tmp_path: Path, capsys: Any) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text(text)
    assert main(["audit", "--url", "http://h", "--control-fields", "{}", "--prompts", str(path)]) == 2
    assert "must" in capsys.readouterr().err


def test_only_a_line_feed_ends_a_prompt(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text('\ufeff{"prompt": "one\u2028line\x85too"}\r\n{"prompt": "two"}\n', encoding="utf-8")
    assert read_prompts(path) == ("one\u2028line\x85too", "two")
