"""The results that the cost sweep computes from measurements; times come from tables, never from a clock."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.bench_runs import printed, row_of, sized

from bench.catalogue.pairs import catalogue
from bench.engines.base import LoadOptions, PromptResult, Run
from bench.engines.registry import load
from bench.engines.specdec import SpecdecEngine
from bench.measure.cost import phase_shares, roofline, sweep
from bench.records import phases, sweeps
from bench.report.sentences import tree_gain
from specdec import AcceptanceCounts, PhaseTimes
from specdec.decoding import Decoder
from specdec.requests import Batch
from specdec.sampling.state import SamplingState

CEILING = {"sizes": [2**20, 2**22, 2**24], "bandwidths": [4e9, 2e9, 1e9], "ways": ["a sum", "a copy", "a sum"]}


@pytest.fixture(scope="module")
def engine() -> SpecdecEngine:
    """The tiny pair: two layers of 64 over 256 tokens, a head of one such layer."""
    loaded = load("specdec", catalogue()["tiny-random"], LoadOptions("float32", "cpu"))
    assert isinstance(loaded, SpecdecEngine)
    return loaded


def test_the_fastest_way_through_a_block_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a copy all bytes count, read and written."""
    ways = {"slow": ("slow", 100), "copy": ("copy", 200), "fast": ("fast", 100)}
    times = {"slow": [9.0, 4.0], "copy": [1.0, 1.5], "fast": [3.0, 0.8]}
    monkeypatch.setattr(roofline, "_ways", lambda block: ways)
    monkeypatch.setattr(roofline, "durations_in_queue_s", lambda run, *_, **__: times[run])
    record = roofline.measure(torch.device("cpu"), (8192, 16384))
    assert record["bandwidths"] == [200.0, 200.0]
    assert record["ways"] == ["copy", "copy"]


def test_every_way_goes_through_the_whole_block(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    block = torch.ones(3 * 4096, dtype=torch.bfloat16)
    ways = roofline._ways(block)
    assert {name: num_bytes for name, (_, num_bytes) in ways.items()} == {
        "a sum": 24576,
        "a copy, reading and writing": 2 * 24576,
        "a product with one row": 24576,
        "sums in 3 threads": 24576,
    }
    one = block.view(torch.float32)[0]
    parts: Any = ways["sums in 3 threads"][0]()
    assert [len(parts), sum(parts)] == [3, pytest.approx(float(one) * 6144, rel=1e-4)]
    product: Any = ways["a product with one row"][0]()
    assert product.tolist() == [[2048.0] * 6]


def test_a_block_is_read_as_fast_as_blocks_of_its_size() -> None:
    read = [roofline.read_s(CEILING, size) for size in (2**10, 2**20, 2**21, 2**24, 2**30)]
    assert read == pytest.approx([2**10 / 4e9, 2**20 / 4e9, 2**21 / 3e9, 2**24 / 1e9, 2**30 / 1e9])
    assert roofline.line(CEILING) == (
        "roofline: memory is read at 1.0 GB/s (blocks of 16 MB, a sum); "
        "blocks of 1, 4 MB, partly from caches, at 4.0, 2.0 GB/s"
    )


def test_bytes_and_tokens_of_each_axis(engine: SpecdecEngine) -> None:
    """float32: a layer of the tiny target has 49,280 weights, its last norm and head 16,448; a token of context 1,024 B
    in two layers. The head has as much as a layer but one norm, and 8,192 to mix features with embeddings.
    """
    weights, head = 4 * (2 * 49_280 + 16_448), 4 * (49_216 + 8_192 + 64 * 256)
    expected = {
        ("width", 64): (weights + 1024 * (256 + 64), 64),
        ("context", 300): (weights + 1024 * 301, 1),
        ("context", 8192): (weights + 1024 * 512, 1),  # all that the tiny target has
        ("context-of-5", 300): (weights + 1024 * 305, 5),
        ("batch", 8): (weights + 8 * 1024 * 257, 8),
        ("batch-of-5", 8): (weights + 8 * 1024 * 261, 40),
        ("head", 8): (head + 8 * 512 * 257, 8),
        ("vocabulary", 50): (None, 5),
        ("ngram", 1000): (None, 1000),
        ("suffix", 1000): (None, 1000),
        ("phases-eagle-sampled", 8): (None, 8 * 64),
    }
    for (axis, size), (num_bytes, tokens) in expected.items():
        work = sweep.sized(engine, axis, size)
        assert (work.bytes_read, work.tokens) == (num_bytes, tokens), axis
        work.run()


def test_requests_go_through_slots(engine: SpecdecEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts are repeated, each emits the tokens that are counted, and no more run at a time than there are slots."""
    widest, step = [], Decoder._step

    def watched(self: Decoder, batch: Batch, *arguments: Any) -> Any:
        widest.append(len(batch.rows))
        return step(self, batch, *arguments)

    monkeypatch.setattr(Decoder, "_step", watched)
    monkeypatch.setattr(sweep, "REQUEST_TOKENS", 5)
    work = sweep.sized(engine, "slots", 3, [(1, 2), (3,), (4, 5, 6)])
    widest.clear()
    completions = work.run()
    assert [each.prompt_token_ids for each in completions[:4]] == [(1, 2), (3,), (4, 5, 6), (1, 2)]
    assert sum(len(each.token_ids) for each in completions) == work.tokens == 32 * 5
    assert max(widest) == 3
    assert work.facts() == {"prompt_tokens": 10 * 6 + 2 + 1}


def test_sampling_takes_logits_as_the_target_gives_them(monkeypatch: pytest.MonkeyPatch) -> None:
    engine: Any = load("specdec", catalogue()["tiny-random"], LoadOptions("bfloat16", "cpu"))
    seen, distribution = [], SamplingState.distribution
    monkeypatch.setattr(
        SamplingState, "distribution", lambda self, logits: seen.append(logits) or distribution(self, logits)
    )
    sweep.sized(engine, "vocabulary", 50).run()
    assert [(logits.shape, logits.dtype) for logits in seen] == [((1, 5, 50), torch.bfloat16)]


def test_requirements_of_an_axis() -> None:
    needs = {axis: sweep.needs(axis) for axis in sweeps.SWEEPS}
    assert needs["width"] == needs["ngram"] == needs["phases-autoregressive-greedy"] == "autoregressive"
    assert needs["head"] == needs["phases-eagle-sampled"] == "eagle"
    assert needs["phases-hybrid-greedy"] == "hybrid"
    assert needs["tree"] == "tree"


def test_a_tree_is_drawn_and_scored(engine: SpecdecEngine) -> None:
    """Each node that has children is fed to the head once, and all of them and the newest token to the target."""
    work = sweep.sized(engine, "tree", 9)
    work.run()
    facts = work.facts()
    assert work.tokens == 10
    assert 1 < facts["expected_tokens"] < 1 + facts["depth"]


def test_the_break_even_of_trees_is_reported() -> None:
    def record(axis: str, size: int, median_s: float, **facts: float) -> dict[str, Any]:
        return {"axis": axis, "size": size, "median_s": median_s, "tokens": size, "roofline_share": None} | facts

    plain = record("width", 1, 1.0, read_bandwidth=1e9)
    trees = [
        record("tree", size, median_s, expected_tokens=tokens, depth=2)
        for size, median_s, tokens in ((2, 1.25, 1.5), (8, 1.25, 2.0), (16, 2.0, 2.25), (64, 5.0, 2.5))
    ]
    assert tree_gain([plain, *trees]) == (
        "The best tree has 8 nodes in 2 levels and should be 1.60 times as fast as plain decoding; the largest "
        "measured tree that pays has 16."
    )
    assert tree_gain([plain, trees[-1]]).endswith("; no measured tree pays.")
    assert tree_gain([plain]) == tree_gain(trees) == ""


def decoded(num_steps: list[int], times: PhaseTimes) -> Run:
    """A batch whose rows need the given numbers of steps."""
    counts = [AcceptanceCounts(num_steps=number) for number in num_steps]
    return Run(tuple(PromptResult((1,), 0.1, 0.2, each, "length") for each in counts), times)


def test_shares_are_of_all_but_the_prefill() -> None:
    """Two runs of 3 and 5 target calls; 16 s, of which 4 read prompts."""
    runs = [decoded([3, 2], PhaseTimes(3, 1, 2, 1, 8)), decoded([5, 5], PhaseTimes(1, 2, 4, 0.5, 8))]
    assert phase_shares.shares("phases-hybrid-sampled", runs) == {
        "method": "hybrid",
        "temperature": 1.0,
        "gamma": 4,
        "num_steps": 8,
        "step_s": 12 / 8,
        "draft_share": 3 / 12,
        "scoring_share": 6 / 12,
        "verification_share": 1.5 / 12,
        "bookkeeping_share": 1.5 / 12,
    }


def test_a_step_is_shared_out_by_a_real_engine(engine: SpecdecEngine) -> None:
    """The rounds count, not the warm-up; each method with its own phases."""
    for axis in phases.SWEEPS:
        work = sweep.sized(engine, axis, 2)
        for _ in range(4):
            work.run()
        facts = work.facts()
        assert sum(facts[f"{phase}_share"] for phase in phases.PHASES) == pytest.approx(1)
        assert facts["num_steps"] <= 3 * 63, axis
        assert facts["num_steps"] == 3 * 63 or facts["method"] != "autoregressive", axis


def test_the_tables() -> None:
    shares = {"draft_share": 0.1, "scoring_share": 0.8, "verification_share": 0.06, "bookkeeping_share": 0.04}
    step = sized("phases-eagle-sampled", 8, 0.01, method="eagle", temperature=1.0, step_s=0.01, **shares)
    shown = printed([sized("width", 4, 0.002), sized("ngram", 4, 0.002, roofline_share=None), step])
    assert "Measured memory read bandwidth is 30.0 GB/s; " in " ".join(shown)
    assert row_of(shown, "width", "4") == ["width", "4", "500.0", "2.000", "50%"]
    assert row_of(shown, "ngram", "4") == ["ngram", "4", "500.0", "2.000", "-"]
    assert row_of(shown, "eagle", "1", "8") == ["eagle", "1", "8", "10.00", "10.0%", "80.0%", "6.0%", "4.0%"]
