"""vLLM's adapter, from recorded answers of the real worker: what it counts, and how its engines are configured."""

from __future__ import annotations

import json
import sys
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.catalogue.pairs import Pair, catalogue
from bench.engines import vllm as adapter
from bench.engines.base import EngineError, LoadOptions, Peers, PromptResult, Run, Setup, VllmOptions
from bench.engines.registry import why_not
from bench.engines.vllm import VllmEngine, acceptance, configuration, results, sampling_arguments, worker_environment
from bench.measure.paired import check_counts
from specdec import SamplingParams

RECORDED = json.loads((Path(__file__).parents[1] / "recorded" / "vllm.json").read_text())
CALLS = [(method, call) for method, calls in RECORDED.items() if method != "about" for call in calls]
OPTIONS = LoadOptions("float32", "cpu")
TINY = catalogue()["tiny-random"]
PLAIN, NGRAM, DRAFTED = (Setup(*setup) for setup in (("autoregressive", 0, 1), ("ngram", 3, 1), ("draft_model", 2, 1)))


def result(method: str, **conditions: Any) -> PromptResult:
    """The one prompt's result of a recorded call."""
    (call,) = [
        call
        for call in RECORDED[method]
        if call.items() >= conditions.items() and len(call) == 2 + ("stop" in conditions)
    ]
    (only,) = results(call["answer"])
    return only


@pytest.mark.parametrize(("method", "call"), CALLS)
def test_counters_add_up_with_the_tokens(method: str, call: Mapping[str, Any]) -> None:
    run = Run(tuple(results(call["answer"])))
    assert all(each.counts is not None for each in run.results)
    check_counts([run], method, call["max_tokens"])


@pytest.mark.parametrize(
    ("conditions", "steps", "drafted", "accepted_at"),
    [
        ({"max_tokens": 9}, 6, 6, [1, 1, 0]),
        # vLLM counts three accepted in the last step, of which 1, 2 or all 3 come out, and at last a bonus token
        ({"max_tokens": 10}, 7, 9, [2, 1, 0]),
        ({"max_tokens": 11}, 7, 9, [2, 2, 0]),
        ({"max_tokens": 12}, 7, 9, [2, 2, 1]),
        ({"max_tokens": 13}, 7, 9, [2, 2, 1]),
        ({"max_tokens": 16}, 8, 12, [3, 3, 1]),
        # two accepted in the last step, which a stop token ends after 1, 2 or 3 tokens
        ({"max_tokens": 16, "stop": 198}, 4, 6, [1, 0, 0]),
        ({"max_tokens": 16, "stop": 1604}, 4, 6, [1, 1, 0]),
        ({"max_tokens": 16, "stop": 3044}, 4, 6, [1, 1, 0]),
    ],
)
def test_accepted_tokens_that_truncation_removed_are_not_counted(
    conditions: dict[str, int], steps: int, drafted: int, accepted_at: list[int]
) -> None:
    one = result("ngram", **conditions)
    counts = one.counts
    assert counts is not None
    assert (counts.num_steps, counts.num_drafted, counts.accepted_at) == (steps, drafted, accepted_at)
    assert counts.num_accepted == sum(accepted_at)
    assert counts.num_emitted == len(one.token_ids) - 1
    assert counts.num_slots == drafted + steps
    assert one.finish_reason == ("stop" if "stop" in conditions else "length")


def test_engine_counters_equal_the_counters_of_a_single_prompt() -> None:
    for _, call in CALLS:
        if len(call["answer"]["results"]) == 1 and (engine := call["answer"]["counters"]):
            (row,) = call["answer"]["results"]
            assert acceptance(row["emitted"], engine) == acceptance(row["emitted"], row["drafts"])


def test_counters_of_a_whole_batch_are_not_divided_among_its_prompts() -> None:
    """The counters of an older version, which has none per prompt."""
    answer = json.loads(json.dumps(RECORDED["ngram_batch"][0]["answer"]))
    for row in answer["results"]:
        row["drafts"] = None
    assert [each.counts for each in results(answer)] == [None, None]


def test_counters_that_contradict_the_tokens_are_an_error() -> None:
    with pytest.raises(EngineError, match=r"accepted_at=\[0, 0\] must account for emitted=\[1, 3\]"):
        acceptance([1, 3], {"histogram": [1, 0, 0], "num_drafted": 2})


def test_each_method_has_its_configuration() -> None:
    pair = Pair("both", "tiny", draft="tiny", heads={"eagle": "tiny-head"}, context=512)
    plain, ngram, drafted, eagle = (
        configuration(pair, OPTIONS, setup) for setup in (PLAIN, NGRAM, DRAFTED, Setup("eagle", 2, 4))
    )
    assert plain["speculative"] is None
    assert plain["optional"] == {}
    assert ngram["speculative"] == {
        "method": "ngram",
        "num_speculative_tokens": 3,
        "prompt_lookup_max": 4,
        "prompt_lookup_min": 2,
    }
    assert Path(drafted["speculative"].pop("model")).name == "tiny"
    assert drafted["speculative"] == {"method": "draft_model", "num_speculative_tokens": 2}
    assert Path(eagle["speculative"]["model"]).name == "tiny-head"
    engine = eagle["engine"]
    assert (engine["dtype"], engine["max_num_seqs"], engine["max_model_len"]) == ("float32", 4, 512)
    assert engine["enable_prefix_caching"] is False
    assert "gpu_memory_utilization" not in engine


def test_prescribed_acceptance_has_a_rate_for_each_position() -> None:
    options = LoadOptions("float32", "cpu", synthetic_acceptance_rates=(0.9, 0.5))
    speculative = configuration(TINY, options, NGRAM)["speculative"]
    assert speculative["rejection_sample_method"] == "synthetic"
    assert speculative["synthetic_acceptance_rates"] == [0.9, 0.5, 0.0]
    assert configuration(TINY, options, PLAIN)["speculative"] is None


def test_options_of_vllm_are_added_to_those_of_the_harness() -> None:
    given = {"enforce_eager": True, "max_num_seqs": 8, "speculative_config": {"draft_tensor_parallel_size": 1}}
    options = LoadOptions(
        "float32", "cpu", verification="block", peers=Peers(vllm=VllmOptions(options=json.dumps(given)))
    )
    plain, drafted = (configuration(TINY, options, setup) for setup in (PLAIN, DRAFTED))
    assert (plain["engine"]["enforce_eager"], plain["engine"]["max_num_seqs"]) == (True, 8)
    assert plain["speculative"] is None
    assert drafted["speculative"]["draft_tensor_parallel_size"] == 1
    assert drafted["speculative"]["rejection_sample_method"] == "block"


def test_stop_tokens_are_given_by_id() -> None:
    params = SamplingParams(temperature=0.5, top_p=0.9, top_k=3, seed=4, stop_token_ids=(9,))
    sampling = sampling_arguments(params, {7, 5})
    assert sampling == {
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 3,
        "seed": 4,
        "max_tokens": 128,
        "ignore_eos": True,
        "stop_token_ids": [9, 5, 7],
    }
    assert sampling_arguments(SamplingParams(ignore_eos=True), {7, 5})["stop_token_ids"] == []


def test_a_gpu_is_chosen_among_the_visible_ones() -> None:
    def visible(device: str, **environment: str) -> str:
        return worker_environment(sys.executable, device, environment)["CUDA_VISIBLE_DEVICES"]

    assert [visible("cuda"), visible("cuda:1")] == ["0", "1"]
    assert visible("cuda:1", CUDA_VISIBLE_DEVICES="4,6") == "6"


def test_on_a_cpu_threads_are_as_many_as_the_others_have_and_not_bound(tmp_path: Path) -> None:
    openmp = tmp_path / "lib" / "libiomp5.so"
    openmp.parent.mkdir()
    openmp.touch()
    python = str(tmp_path / "bin" / "python")
    given = {"PYTHONPATH": "mine", "OMP_PROC_BIND": "spread", "LD_PRELOAD": "other.so"}
    environment = worker_environment(python, "cpu", given)
    assert "PYTHONPATH" not in environment
    assert environment["OMP_PROC_BIND"] == "spread"  # the user's own
    assert not {"OMP_PLACES", "OMP_PROC_BIND"} & set(worker_environment(python, "cpu", {}))
    assert environment["OMP_NUM_THREADS"] == str(torch.get_num_threads())
    assert environment["LD_PRELOAD"] == f"{openmp}:other.so"
    assert environment["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0"
    assert "LD_PRELOAD" not in worker_environment(sys.executable, "cpu", {})


def test_without_vllm_the_error_names_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adapter, "installed_version", lambda python: None)
    reason = why_not("vllm", "ngram", 1, peers=Peers(vllm=VllmOptions(Path("/some/python"))))
    assert str(reason).startswith("engine=vllm needs an interpreter with vLLM, and /some/python has none; create one")
    monkeypatch.setattr(adapter, "installed_version", lambda python: "0.32.0")
    assert why_not("vllm", "ngram", 1) is None
    assert str(why_not("vllm", "hybrid", 1)).startswith("engine=vllm has no method=hybrid; use autoregressive, ngram")


ANSWERING = """
import json, sys
for line in sys.stdin:
    print(json.dumps({"version": "1.2", "dtype": "float32", "device": "cpu"}), flush=True)
"""


@pytest.fixture
def engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[VllmEngine]:
    """An engine whose workers only report that they are ready."""
    script = tmp_path / "answering.py"
    script.write_text(ANSWERING)
    monkeypatch.setattr(adapter, "SCRIPT", script)
    engine = VllmEngine(TINY, OPTIONS, ())
    yield engine
    engine.close()


def test_there_are_two_workers_at_most_and_a_baseline_stays(engine: VllmEngine) -> None:
    def prepared(setups: Collection[Setup]) -> set[Setup]:
        engine.prepare(setups)
        return set(engine._pool._running)

    assert prepared({PLAIN}) == {PLAIN}
    baseline = engine._pool._running[PLAIN].pid
    assert prepared({PLAIN, NGRAM}) == {PLAIN, NGRAM}
    assert prepared({PLAIN, DRAFTED}) == {PLAIN, DRAFTED}
    assert prepared(()) == {PLAIN}
    assert engine._pool._running[PLAIN].pid == baseline
    larger = {Setup("autoregressive", 0, 4), Setup("ngram", 3, 4)}
    assert prepared(larger) == larger
    assert engine.version == "1.2"


def test_another_dtype_than_requested_is_an_error(engine: VllmEngine) -> None:
    engine._options = LoadOptions("bfloat16", "cpu")
    with pytest.raises(EngineError, match="must have dtype=bfloat16, but has float32; use --dtype float32"):
        engine.prepare({PLAIN})
    assert not len(engine._pool)
