"""llama.cpp and OpenVINO GenAI for real, with the default target: `tox -e peers-cpu` builds and installs them.

They need the program that SPECDEC_LLAMA_SERVER names and the interpreter that SPECDEC_OPENVINO_PYTHON names.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from bench.catalogue.pairs import catalogue
from bench.engines.base import EngineError, LlamaOptions, LoadOptions, Peers, Setup
from bench.engines.servers import llama_server
from specdec import SamplingParams

PROGRAM, PYTHON = (os.environ.get(f"SPECDEC_{name}") for name in ("LLAMA_SERVER", "OPENVINO_PYTHON"))
pytestmark = pytest.mark.skipif(
    not PROGRAM or not PYTHON, reason="SPECDEC_LLAMA_SERVER and SPECDEC_OPENVINO_PYTHON name none; tox -e peers-cpu"
)

ROOT = Path(__file__).parents[2]
PAIR = catalogue()["smollm2-135m"]
OPTIONS = LoadOptions("float32", "cpu", peers=Peers(llama=LlamaOptions(Path(PROGRAM or ""))))
NEAR_TIE = 0.05  # log-probability; float32 sums in another order differ by far less
GREEDY = SamplingParams(temperature=0, max_tokens=12)
PROMPT = [1, 504, 2341, 3575, 504, 2341, 3575, 504, 2341]


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """The records of a run of the harness, by engine and method."""
    folder = tmp_path_factory.mktemp("run")
    command = [sys.executable, "-m", "pytest", "bench/", "-p", "no:cacheprovider"]
    arguments = {
        "engines": "specdec,llama-server,openvino",
        "methods": "autoregressive,ngram",
        "gammas": "4",
        "dtype": "float32",
        "num-prompts": "3",
        "max-tokens": "24",
        "journal": str(folder / "journal.jsonl"),
        "benchmark-json": str(folder / "out.json"),
    }
    command += [f"--{name}={value}" for name, value in arguments.items()]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    found = [cell["extra_info"] for cell in json.loads((folder / "out.json").read_text())["benchmarks"]]
    return {f"{record['engine']} {record['method']}": record for record in found}


def test_every_engine_and_method_is_measured(records: dict[str, dict[str, Any]]) -> None:
    assert len(records) == 6
    for record in records.values():
        assert record["num_tokens"] > 0
        assert record["engine_version"]


def test_greedy_outputs_are_the_reference_s_but_for_near_ties(records: dict[str, dict[str, Any]]) -> None:
    for name, record in records.items():
        for margin in record["margin_at_difference"] or []:
            assert margin is None or margin < NEAR_TIE, name


def test_llama_server_counts_as_specdec_does(records: dict[str, dict[str, Any]]) -> None:
    plain, ngram = (records[f"llama-server {method}"] for method in ("autoregressive", "ngram"))
    assert (plain["num_drafted"], plain["mean_acceptance_length"]) == (0, 1)
    assert 0 < ngram["num_accepted"] <= ngram["num_drafted"]
    assert ngram["num_steps"] + ngram["num_accepted"] == plain["num_steps"]


def test_openvino_reports_no_drafts(records: dict[str, dict[str, Any]]) -> None:
    assert records["openvino autoregressive"]["mean_acceptance_length"] == 1
    assert records["openvino ngram"]["num_drafted"] is None


def test_requests_are_served_as_they_arrive() -> None:
    """Three requests for two places: the same tokens as one by one."""
    setup, prompts = Setup("ngram", 3, 2), [PROMPT, PROMPT[:4], PROMPT[2:]]
    with closing(llama_server.load(PAIR, OPTIONS)) as engine:
        engine.prepare({setup})
        expected = [engine.generate([each], "ngram", 3, [GREEDY]).results[0].token_ids for each in prompts]
        served = engine.serve(prompts, [0.0, 0.0, 0.2], setup, [GREEDY] * 3, 600)
        assert [result and result.token_ids for result in served.results] == expected
        assert served.refused == frozenset()


def test_a_wrong_word_is_an_error_with_the_server_s_message() -> None:
    wrong = LoadOptions("float32", "cpu", peers=Peers(llama=LlamaOptions(Path(PROGRAM or ""), "--no-such-word")))
    with (
        closing(llama_server.load(PAIR, wrong)) as engine,
        pytest.raises(EngineError, match=r"(?s)engine=llama-server, method=autoregressive.*no-such-word"),
    ):
        engine.prepare({Setup("autoregressive", 0, 1)})
