"""SGLang, TensorRT-LLM and OpenAI-compatible endpoints: real engines in their formats, and servers that go wrong."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from helpers import streamed, tiny
from helpers.streamed import StreamedModel, streaming
from helpers.tokens import characters, letters
from helpers.warm import run_python

from bench.catalogue.pairs import Pair
from bench.engines import counters
from bench.engines.base import LoadOptions, Peers, RunningServers, Setup, Urls
from bench.engines.registry import ENGINES, load, why_not
from bench.engines.servers import running
from bench.engines.servers.formats import Completion, Progress
from bench.engines.servers.running import KINDS, RunningEngine, text_of_tokens
from bench.measure.fairness import check_ends
from bench.measure.paired import check_counts
from specdec import AcceptanceCounts, Engine, SamplingParams
from specdec.servers.client import Client
from specdec.servers.errors import EngineError

ROOT = Path(__file__).parents[4]
RECORDED = Path(__file__).parents[2] / "recorded" / "running-servers.json"
GAMMA = 3
SAMPLING = [SamplingParams(temperature=1.0, max_tokens=24, seed=seed) for seed in range(3)]
TEXT = "one two one two"
PLAIN, DRAFTING = Setup("autoregressive", 0, 3), Setup("draft_model", GAMMA, 3)


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("target")
    tiny.make("llama", tiny.GQA | {"max_position_embeddings": 256}).save_pretrained(folder)
    characters(tiny.GQA["vocab_size"]).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def engines(target: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Engine]:
    """By gamma; the draft is another random model, so that some drafts are accepted and some are not."""
    draft = tmp_path_factory.mktemp("draft")
    model = tiny.make("llama", tiny.GQA | {"max_position_embeddings": 256})
    model.lm_head.weight.data *= 0.5  # a flatter distribution
    model.save_pretrained(draft)
    characters(tiny.GQA["vocab_size"]).save_pretrained(draft)
    given: dict[str, Any] = {"dtype": "float32", "device": "cpu"}
    drafting = Engine.load(str(target), method="draft_model", draft=str(draft), num_speculative_tokens=GAMMA, **given)
    return {0: Engine.load(str(target), method="autoregressive", **given), GAMMA: drafting}


Start = Callable[..., tuple[RunningEngine, dict[int, StreamedModel]]]


@pytest.fixture
def start(target: Path, engines: dict[int, Engine], monkeypatch: pytest.MonkeyPatch) -> Iterator[Start]:
    """An engine of a kind, with two servers of it by gamma, one that drafts and one that does not."""
    monkeypatch.setattr("specdec.servers.client.FIRST_PAUSE_S", 0.01)
    with ExitStack() as stack:

        def started(kind: str, **changes: Any) -> tuple[RunningEngine, dict[int, StreamedModel]]:
            models = {
                gamma: StreamedModel(kind, engines[gamma], gamma, **{"engine_name": str(target), **changes})
                for gamma in (0, GAMMA)
            }
            urls = {gamma: Urls((("", stack.enter_context(streaming(models[gamma]))),)) for gamma in models}
            options = LoadOptions("float32", "cpu", peers=Peers(servers=RunningServers(urls[GAMMA], urls[0])))
            loaded = load(kind, Pair("served", str(target)), options)
            assert isinstance(loaded, RunningEngine)
            stack.callback(loaded.close)
            return loaded, models

        yield started


def prompts(engine: RunningEngine, number: int) -> list[tuple[int, ...]]:
    return [tuple(engine.tokenizer(TEXT + " " * index).input_ids) for index in range(number)]


def ask(engine: RunningEngine, setup: Setup, number: int = 1) -> Any:
    engine.prepare({setup})
    run = engine.generate(prompts(engine, number), setup.method, setup.gamma, SAMPLING[:number])
    check_counts([run], setup.method, 24)
    check_ends([run], engine.stop_token_ids, 24)
    return run


def expected(engines: dict[int, Engine], setup: Setup, number: int = 1) -> list[tuple[int, ...]]:
    tokenizer: Any = engines[0].target.tokenizer
    asked = [tokenizer(TEXT + " " * index).input_ids for index in range(number)]
    return [done.token_ids for done in engines[setup.gamma].generate(asked, SAMPLING[:number])]


# -- documented formats, with counters worked out by hand ----------------------------------------------------------


@pytest.mark.parametrize("name", ["sglang", "sglang before 2026", "tensorrt-llm", "openai"])
def test_a_documented_stream_has_its_tokens_times_and_counters(name: str) -> None:
    kind, recorded = KINDS[name.split()[0]], json.loads(RECORDED.read_text())
    stream = kind.stream(Progress(max_tokens=6))
    for number, event in enumerate(recorded[name], 1):
        stream.take(event, float(number))
    reply = kind.dialect.reply(stream.answer())
    assert (reply.finish_reason, reply.num_prompt_tokens) == ("length", 3)
    assert reply.token_ids == ((3, 4, 5, 6, 7, 8) if name != "openai" else None)
    assert reply.text == ("abcdef" if name != "tensorrt-llm" else None)
    assert stream.progress.first_s == 1.0
    assert stream.progress.last_s == {"openai": 2.0, "sglang before 2026": 1.0}.get(name, 3.0)
    drafts = recorded["perf_metrics"][0]["perf_metrics"]["speculative_decoding"]
    completion = Completion(stream.answer(), reply, stream.progress.emitted, 6, performance=drafts)
    counts, reason = kind.counts(completion)
    if name == "openai":
        assert (counts, reason) == (None, "OpenAI's completions report no draft tokens")
    else:
        assert counts == AcceptanceCounts(
            num_steps=2, num_drafted=4, num_accepted=3, num_emitted=5, num_slots=6, accepted_at=[2, 1]
        )


def test_totals_are_divided_among_steps() -> None:
    """Three steps of 2, 1 and 3 tokens; with a seventh accepted token, the last step was cut after an accepted one."""
    counts = counters.from_steps([1, 2, 1, 3], num_drafted=6, num_accepted=3)
    assert (counts.num_steps, counts.num_emitted, counts.accepted_at) == (3, 6, [2, 1])
    counts = counters.from_steps([1, 2, 1, 2], num_drafted=6, num_accepted=3)
    assert (counts.num_accepted, counts.num_emitted, counts.accepted_at) == (3, 5, [2, 1])
    for num_drafted, num_accepted in ((6, 2), (2, 3)):  # fewer than were emitted, more than were drafted
        with pytest.raises(EngineError, match="must account for emitted"):
            counters.from_steps([1, 2, 1, 3], num_drafted, num_accepted)
    with pytest.raises(EngineError, match="must add up to the 5 tokens after the first"):
        counters.of_steps(6, 2, {"histogram": [0, 0, 2], "num_drafted": 4, "accepted_at": [2, 9]})


# -- replies ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", [{}, {"joined": 2}, {"incremental": True}, {"incremental": True, "joined": 3}])
def test_sglang_gives_tokens_and_counters(start: Start, engines: dict[int, Engine], changes: dict[str, Any]) -> None:
    """Its counters are of each request, so that batches have them, too, whatever tokens arrive together."""
    engine, models = start("sglang", **changes)
    results = ask(engine, DRAFTING, 3).results
    assert [result.token_ids for result in results] == expected(engines, DRAFTING, 3)
    for result, prompt in zip(results, prompts(engine, 3), strict=True):
        index = [request["input_ids"] for request in models[GAMMA].requests].index(list(prompt))
        counts = models[GAMMA].counts[index]
        assert result.counts == counts
        assert 0 < counts.num_accepted < counts.num_drafted
    assert (engine.version, engine.dtype) == ("0.5.4", "float32")
    is_step_by_step = changes.get("joined", 1) == 1
    assert all((result.step_tokens is not None) == is_step_by_step for result in results)


def test_tensorrt_counts_a_request_that_is_alone(start: Start, engines: dict[int, Engine]) -> None:
    engine, models = start("tensorrt-llm")
    models[GAMMA].finished.append(
        {"perf_metrics": {"speculative_decoding": {"total_draft_tokens": 99}}}
    )  # an earlier one
    (result,) = ask(engine, DRAFTING).results
    assert result.token_ids == expected(engines, DRAFTING)[0]
    assert result.counts == models[GAMMA].counts[0]
    assert result.step_tokens is not None
    assert engine.version == "1.2.0"
    several = ask(engine, DRAFTING, 3).results
    assert {each.counts for each in several} == {None}
    assert "return_perf_metrics: true, and use --batch-sizes 1" in str(several[0].why_no_counts)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"joined": 2}, "several steps arrived together"),
        ({"pages": {"/perf_metrics": [{"perf_metrics": {"first_iter": 0}}]}}, "has no draft tokens of this request"),
    ],
)
def test_tensorrt_without_counters_says_why(start: Start, changes: dict[str, Any], reason: str) -> None:
    engine, _ = start("tensorrt-llm", **changes)
    (result,) = ask(engine, DRAFTING).results
    assert result.counts is None
    assert reason in str(result.why_no_counts)


def test_a_text_is_encoded_again_and_checked(start: Start, engines: dict[int, Engine]) -> None:
    engine, models = start("openai")
    engine.prepare({DRAFTING})
    greedy = [replace(SAMPLING[0], temperature=0.0)]
    (result,) = engine.generate(prompts(engine, 1), "draft_model", GAMMA, greedy).results
    (done,) = engines[GAMMA].generate([list(prompts(engine, 1)[0])], greedy)
    assert result.token_ids == done.token_ids
    assert (result.counts, result.why_no_counts) == (None, "OpenAI's completions report no draft tokens")
    assert 0 < result.ttft_s < result.latency_s
    (request,) = models[GAMMA].requests
    assert (request["prompt"], request["model"], request["stream"]) == (TEXT, "served", True)


@pytest.mark.parametrize("kind", KINDS)
def test_plain_decoding_has_its_own_server(start: Start, engines: dict[int, Engine], kind: str) -> None:
    engine, models = start(kind)
    engine.prepare({PLAIN, DRAFTING})
    greedy = [replace(SAMPLING[0], temperature=0.0)]
    (result,) = engine.generate(prompts(engine, 1), "autoregressive", 0, greedy).results
    assert result.counts is not None
    assert (result.counts.num_steps, result.counts.num_drafted) == (len(result.token_ids) - 1, 0)
    assert (len(models[0].requests), len(models[GAMMA].requests)) == (1, 0)


@pytest.mark.parametrize("kind", ["sglang", "tensorrt-llm"])
def test_a_stop_token_that_is_left_out_is_put_back(start: Start, engines: dict[int, Engine], kind: str) -> None:
    engine, models = start(kind, hides_stop=True)
    engine.prepare({DRAFTING})
    prompt = prompts(engine, 1)[0]
    sampling = [replace(SAMPLING[0], seed=seed) for seed in range(40)]
    (each,) = {
        done.finish_reason: params
        for params, done in zip(sampling, engines[GAMMA].generate([prompt] * 40, sampling), strict=True)
        if done.finish_reason == "stop"
    }.values()
    (result,) = engine.generate([prompt], "draft_model", GAMMA, [each]).results
    assert (result.finish_reason, result.token_ids[-1]) == ("stop", 2)
    assert result.counts == models[GAMMA].counts[-1]


@pytest.mark.parametrize("kind", KINDS)
def test_a_load_counts_from_each_arrival(start: Start, kind: str) -> None:
    engine, _ = start(kind)
    engine.prepare({DRAFTING})
    greedy = [replace(each, temperature=0.0) for each in SAMPLING]
    served = engine.serve([prompts(engine, 1)[0]] * 3, [0.0, 0.05, 0.1], DRAFTING, greedy, 60)
    assert (served.refused, len(served.results)) == (frozenset(), 3)
    assert served.wall_s >= 0.1
    for result in served.results:
        assert result is not None
        assert 0 < result.ttft_s <= result.latency_s
        assert (result.counts is not None) == (kind == "sglang")


# -- servers that do not agree ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("info", "message"),
    [
        (
            {"speculative_num_steps": 5},
            "must draft gamma=3 tokens for method=draft_model, but drafts 5; use --gammas 5",
        ),
        ({"speculative_algorithm": "EAGLE3"}, "by method=draft_model, but does by 'EAGLE3'; use --methods eagle3"),
        ({"speculative_algorithm": None}, "must draft gamma=3 tokens .* but drafts 0; use --methods autoregressive"),
        ({"quantization": "fp8"}, "must have quantization=none, but has fp8; state it with --server-quantization fp8"),
        ({"speculative_num_steps": -1}, "speculative_num_steps=-1 must be integers"),
        ({"version": [1]}, r"version=\[1\] must be a string; is this an SGLang server"),
    ],
)
def test_sglang_must_be_what_the_options_say(start: Start, info: dict[str, Any], message: str) -> None:
    engine, models = start("sglang")
    page = json.loads(models[GAMMA].page("/get_server_info") or "")
    models[GAMMA].pages = {"/get_server_info": page | info}
    with pytest.raises(EngineError, match=message):
        engine.prepare({DRAFTING})


def test_another_dtype_is_reported(start: Start) -> None:
    engine, models = start("sglang")
    page = json.loads(models[GAMMA].page("/get_server_info") or "")
    models[GAMMA].pages = {"/server_info": page | {"dtype": "half"}}
    engine.prepare({DRAFTING})
    assert engine.dtype == "float16"  # which the harness refuses beside float32


def test_trees_have_their_own_number_of_slots(start: Start) -> None:
    engine, models = start("sglang")
    page = json.loads(models[GAMMA].page("/get_server_info") or "")
    models[GAMMA].pages = {"/get_server_info": page | {"speculative_num_draft_tokens": 8, "speculative_eagle_topk": 4}}
    counts = ask(engine, DRAFTING).results[0].counts
    assert counts.num_slots == 4 * counts.num_steps


def test_another_model_is_refused(start: Start) -> None:
    for kind in KINDS:
        engine, _ = start(kind, engine_name="elsewhere")
        with pytest.raises(EngineError, match=r"must serve target=.* of pair=served, but serves other; use another"):
            engine.prepare({DRAFTING})


@pytest.mark.parametrize("kind", ["tensorrt-llm", "openai"])
def test_an_address_is_measured_as_one_method(start: Start, kind: str) -> None:
    """These servers do not say how they draft, so that two methods would be the same numbers."""
    engine, _ = start(kind)
    engine.prepare({DRAFTING})
    with pytest.raises(EngineError, match=r"must be measured as one method, and was as method=draft_model, gamma=3"):
        engine.prepare({replace(DRAFTING, gamma=5)})


def test_a_plain_server_that_speculates_is_refused(start: Start, engines: dict[int, Engine]) -> None:
    engine, models = start("tensorrt-llm")
    models[0].engine = engines[GAMMA]
    with pytest.raises(EngineError, match="must not speculate, but does; name one that does not with --plain-server"):
        ask(engine, PLAIN)


def test_a_server_is_needed_and_its_kind_matters() -> None:
    for kind in KINDS:
        assert "running servers" in ENGINES[kind].extras
        assert f"engine={kind} needs a running server; name it with --server-url" in str(why_not(kind, "ngram", 1))
        peers = Peers(servers=RunningServers(Urls(((kind, "http://host:1"),))))
        assert why_not(kind, "ngram", 1, peers=peers) is None
        (other, *_) = {*KINDS} - {kind}
        assert why_not(other, "ngram", 1, peers=peers) is not None


def test_prompts_that_no_text_encodes_to_are_refused() -> None:
    tokenizer = letters(61)
    assert text_of_tokens(tokenizer("the cat").input_ids, tokenizer) == "the cat"
    spelled = [tokenizer.convert_tokens_to_ids(letter) for letter in "the"]  # it would be encoded as "th", "e"
    for prompt, given in ((spelled, tokenizer), ([1, 2], None)):
        with pytest.raises(EngineError, match="must be sent as a text, but no text encodes to it"):
            text_of_tokens(prompt, given)


@pytest.mark.parametrize("params", [SamplingParams(stop_token_ids=(7,)), SamplingParams(ignore_eos=True)])
def test_other_stop_tokens_are_refused(start: Start, params: SamplingParams) -> None:
    engine, _ = start("sglang")
    engine.prepare({DRAFTING})
    with pytest.raises(EngineError, match="ends at the stop tokens of its model"):
        engine.generate(prompts(engine, 1), "draft_model", GAMMA, [params])


# -- servers that go wrong: each loses its cell and says why ---------------------------------------------------

FAULTS: dict[str, tuple[Any, str]] = {
    "silent": (streamed.silent, r"must answer within 1 s, but did not"),
    "slow": (streamed.slow, r"must finish within 2 s, but did not"),
    "malformed": (streamed.malformed, r"an event must be JSON, but the server sent"),
    "dying": (streamed.dying, r"must finish the completion, but ended the stream"),
    "redirecting": (streamed.redirecting, r"must accept the request, but answered 302"),
    "endless": (
        streamed.endless,
        r"stop at max_tokens=24|tokens after its finish_reason|be the number of output_ids",
    ),
    "lying": (streamed.of_other_tokens, r"token ids must be below 61|the completion has \d+ tokens, but the server"),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_server_that_goes_wrong_loses_its_cell(
    start: Start, kind: str, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, models = start(kind)
    wrong, message = FAULTS[fault]
    models[GAMMA].fault = wrong
    greedy = [replace(SAMPLING[0], temperature=0.0)]
    with monkeypatch.context() as patched:
        patched.setattr(running, "CALL_TIMEOUT_S", 1.0 if fault == "silent" else 60.0)
        patched.setattr(running, "Client", partial(Client, deadline_s=2.0 if fault == "slow" else 60.0))
        engine.prepare({DRAFTING})
        with pytest.raises(EngineError, match=message):
            engine.generate(prompts(engine, 1), "draft_model", GAMMA, greedy)
    models[GAMMA].fault = None
    engine.prepare({DRAFTING})  # the next cell
    assert engine.generate(prompts(engine, 1), "draft_model", GAMMA, greedy).results[0].token_ids


@pytest.mark.parametrize("kind", ["sglang", "tensorrt-llm"])
def test_counters_that_contradict_the_tokens_are_left_out(start: Start, kind: str) -> None:
    engine, models = start(kind)

    def overstated(handler: Any, events: list[str]) -> None:
        name = '"spec_correct_drafts_histogram": ['
        for entry in models[GAMMA].finished:
            entry["perf_metrics"]["speculative_decoding"]["total_accepted_draft_tokens"] = 10**6
        streamed.sent(handler, [event.replace(name, f"{name}0, 0, 0, 0, 40, ") for event in events])

    models[GAMMA].fault = overstated
    (result,) = ask(engine, DRAFTING).results
    assert result.counts is None
    assert "must" in str(result.why_no_counts)


@pytest.mark.slow
def test_a_run_goes_on_beside_a_server_that_goes_wrong(
    target: Path, engines: dict[int, Engine], tmp_path: Path
) -> None:
    """The whole harness: three engines, of which one dies in every cell with speculation."""
    models = {
        (kind, gamma): StreamedModel(kind, engines[gamma], gamma, engine_name=str(target))
        for kind in ("sglang", "tensorrt-llm")
        for gamma in (0, GAMMA)
    }
    models["tensorrt-llm", GAMMA].fault = streamed.dying
    with ExitStack() as stack:
        urls = {key: stack.enter_context(streaming(model)) for key, model in models.items()}
        named = {
            gamma: ",".join(f"{kind}={urls[kind, gamma]}" for kind in ("sglang", "tensorrt-llm"))
            for gamma in (0, GAMMA)
        }
        (tmp_path / "prompts.txt").write_text("one two one two\nan inn, an inn,\n")
        options = {"engines": "specdec,sglang,tensorrt-llm", "pairs": f"target={target},draft={target}"}
        options |= {"methods": "autoregressive,draft_model", "gammas": str(GAMMA), "num-prompts": "2"}
        options |= {"workloads": str(tmp_path / "prompts.txt"), "max-tokens": "8", "dtype": "float32", "device": "cpu"}
        options |= {"server-url": named[GAMMA], "plain-server-url": named[0], "telemetry-hz": "0"}
        options |= {"journal": str(tmp_path / "journal.jsonl"), "benchmark-json": str(tmp_path / "run.json")}
        given = [f"--{name}={value}" for name, value in options.items()]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        done = run_python("-m", "pytest", "bench/", "-p", "no:cacheprovider", *given, cwd=ROOT, env=environment)
    assert done.returncode == 1, done.stdout
    records = {(each["engine"], each["method"]): each for each in cells(tmp_path / "run.json")}
    assert ("tensorrt-llm", "draft_model") not in records
    assert "must finish the completion, but ended the stream" in done.stdout
    assert records["tensorrt-llm", "autoregressive"]["num_outputs_equal_reference"] == 2
    sglang = records["sglang", "draft_model"]
    assert sglang["num_outputs_equal_reference"] == sglang["num_outputs_equal"] == 2
    assert (sglang["speedup"] is not None, sglang["num_devices"], sglang["quantisation"]) == (True, None, "none")
    assert sglang["per_prompt_drafted"] == [counts.num_drafted for counts in models["sglang", GAMMA].counts[-2:]]


def cells(path: Path) -> list[dict[str, Any]]:
    return [each["extra_info"] for each in json.loads(path.read_text())["benchmarks"]]
