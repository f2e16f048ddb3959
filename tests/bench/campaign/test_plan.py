"""The cells of a run, those that are skipped, and the errors."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest

from bench.campaign.config import BenchConfig
from bench.campaign.plan import plan
from bench.campaign.shards import parse, part_of
from bench.catalogue.pairs import Pair
from bench.records.schema import Cell

MakeConfig = Callable[..., BenchConfig]


def test_every_gamma_is_a_cell_and_plain_decoding_is_one(make_config: MakeConfig) -> None:
    cells = [each.cell for each in plan(make_config())]
    assert [(cell.engine, cell.method, cell.gamma) for cell in cells] == [
        (engine, method, gamma)
        for engine in ("specdec", "transformers")
        for method, gamma in (("autoregressive", 0), ("draft_model", 2), ("draft_model", 4))
    ]
    assert cells[0].id == "specdec-tiny-random-autoregressive-0-same-smoke-1"


def test_impossible_cells_are_skipped_once_with_reason_and_remedy(make_config: MakeConfig) -> None:
    plans = plan(make_config(pairs=(Pair("bare", "tiny"),)))
    skipped = {each.cell: each.skip for each in plans if each.skip}
    assert skipped == {
        Cell(
            engine, "bare", "draft_model", 2, "same", "smoke", 1
        ): "pair=bare has no draft for method=draft_model; name one with --pairs target=MODEL,draft=MODEL"
        for engine in ("specdec", "transformers")
    }


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"methods": ("ngram_store",), "engines": ("transformers",), "named": frozenset({"methods"})},
            "methods=ngram_store was requested and must be able to run, but engine=transformers has no method=ngram",
        ),
        (
            {"batch_sizes": (4,), "named": frozenset({"engines"})},
            "engines=transformers was requested .* decodes at most 1 prompt at a time, not batch_size=4; use",
        ),
        ({"batch_sizes": (4,), "engines": ("transformers",)}, "no cell can run: engine=transformers decodes at most"),
    ],
)
def test_requested_cells_that_cannot_run_are_an_error(
    changes: dict[str, Any], message: str, make_config: MakeConfig
) -> None:
    with pytest.raises(ValueError, match=message):
        plan(make_config(**changes))


def test_a_named_method_is_no_error_if_one_engine_has_it(make_config: MakeConfig) -> None:
    plans = plan(make_config(methods=("ngram_store",), gammas=(2,), named=frozenset({"methods"})))
    assert [bool(each.skip) for each in plans] == [False, True]


def test_gamma_auto_is_for_engines_that_have_it(make_config: MakeConfig) -> None:
    plans = plan(make_config(methods=("ngram",), gammas=(2, "auto")))
    skips = {(each.cell.engine, each.cell.gamma): each.skip for each in plans}
    assert skips["specdec", "auto"] is None
    assert skips["transformers", 2] is None
    assert skips["transformers", "auto"] == "engine=transformers has no gamma=auto; use --gammas with numbers"


def test_prescribed_acceptance_is_for_engines_that_have_it(make_config: MakeConfig) -> None:
    plans = plan(make_config(methods=("ngram",), synthetic_acceptance_rates=(0.5,)))
    skips = {each.cell.engine: each.skip for each in plans}
    assert skips["specdec"] is None
    assert str(skips["transformers"]).startswith("engine=transformers has no synthetic acceptance")


@pytest.mark.parametrize(("device", "drafts"), [("cpu", False), ("cuda:0", True)])
def test_vllm_has_prescribed_acceptance_on_gpus_only(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, device: str, drafts: bool
) -> None:
    monkeypatch.setattr("bench.engines.vllm.why_missing", lambda *_: None)
    config = make_config(engines=("vllm",), methods=("autoregressive", "ngram"), synthetic_acceptance_rates=(0.5,))
    skips = {each.cell.method: each.skip for each in plan(config, device=device)}
    assert skips["autoregressive"] is None
    assert (skips["ngram"] is None) == drafts
    assert drafts or str(skips["ngram"]).startswith("engine=vllm has synthetic acceptance on GPUs only")


def test_rates_are_cells_of_engines_that_take_requests_while_they_decode(make_config: MakeConfig) -> None:
    plans = plan(make_config(rate=(2.0, 0.5), gammas=(2,)))
    assert [each.cell.id for each in plans if not each.skip] == [
        f"specdec-tiny-random-{method}-same-smoke-1-{rate}"
        for rate in ("2", "0.5")
        for method in ("autoregressive-0", "draft_model-2")
    ]
    skips = {each.skip for each in plans if each.skip}
    assert skips == {
        "engine=transformers takes no requests while it decodes others; use --engines "
        "specdec,vllm-server,sglang,tensorrt-llm,openai,llama-server, or leave out --rate, --sweep or --concurrency"
    }
    with pytest.raises(ValueError, match=r"engines=transformers was requested .* takes no requests while it decodes"):
        plan(make_config(rate=(2.0,), named=frozenset({"engines"})))


# -- parts of a campaign -------------------------------------------------------------------------------------


def parts(config: BenchConfig, num_parts: int) -> dict[str, int]:
    return {each.cell.id: part_of(each.cell.shard_key, num_parts) for each in plan(config)}


def test_the_shard_of_a_cell_does_not_depend_on_other_cells(make_config: MakeConfig) -> None:
    few = make_config(gammas=(4,), engines=("specdec",), methods=("draft_model",))
    many = make_config(gammas=(1, 2, 4, 8, "auto"), engines=("transformers", "specdec"), workloads=("gsm8k", "smoke"))
    for cell, part in parts(few, 3).items():
        assert parts(many, 3)[cell] == part
    assert part_of("specdec-tiny-random-ngram-4-same-smoke-1", 3) == 3  # on every machine, in every version
    assert [parse(text) for text in (None, "1/1", "2/3")] == [(1, 1), (1, 1), (2, 3)]


def test_parts_are_about_equally_large_and_one_part_is_all() -> None:
    """Of 3,000 ids a part has 1,000 in the mean; by Hoeffding's bound 150 more or fewer have a chance below 1e-6."""
    found = [part_of(f"cell-{number}", 3) for number in range(3000)]
    assert {part_of(f"cell-{number}", 1) for number in range(20)} == {1}
    assert 3 * 2 * math.exp(-2 * 150**2 / 3000) < 2e-6
    assert all(abs(found.count(part) - 1000) < 150 for part in (1, 2, 3))


def test_methods_at_a_rate_stay_together(make_config: MakeConfig) -> None:
    """They are compared with each other, and a comparison needs one machine."""
    config = make_config(rate=tuple(float(each) for each in range(1, 30)), engines=("specdec",))
    found = parts(config, 4)
    assert set(found.values()) == {1, 2, 3, 4}
    for rate in config.rate:
        assert len({part for cell, part in found.items() if cell.endswith(f"-{rate:g}")}) == 1
    sweep = {each.cell.sweep_key for each in plan(make_config(sweep=True, engines=("specdec",)))}
    assert sweep == {"specdec-tiny-random-any-0-same-smoke-1"}  # one part has all of its rates


def test_clients_are_cells_and_have_a_slot_each_by_default(make_config: MakeConfig) -> None:
    changes = {"concurrency": (1, 8), "engines": ("specdec",), "methods": ("autoregressive",)}
    ids = [each.cell.id for each in plan(make_config(**changes))]
    assert ids == [f"specdec-tiny-random-autoregressive-0-same-smoke-8-{clients}clients" for clients in (1, 8)]
    config = make_config(**changes, rate=(2.0,), batch_sizes=(4,), named=frozenset({"batch_sizes"}))
    ids = [each.cell.id for each in plan(config)]
    assert ids == [
        f"specdec-tiny-random-autoregressive-0-same-smoke-4-{load}" for load in ("2", "1clients", "8clients")
    ]


def test_a_sweep_has_preferred_rates_from_ten_requests_in_the_window(make_config: MakeConfig) -> None:
    """Of 10 s the window is 7 s: from 10/7 = 1.43 requests a second."""
    config = make_config(sweep=True, duration=10.0, engines=("specdec",), methods=("autoregressive",))
    rates = [each.cell.rate for each in plan(config)]
    assert rates[:7] == [1.5, 2.2, 3.3, 4.7, 6.8, 10, 15]
    assert rates[-1] == 1000
    with pytest.raises(ValueError, match="sweep must be left out beside rate: it chooses the rates itself"):
        make_config(sweep=True, rate=(2.0,))
    with pytest.raises(ValueError, match=r"duration=0.01 must allow a sweep up to 1000 requests/s; change --duration"):
        plan(make_config(sweep=True, duration=0.01))
