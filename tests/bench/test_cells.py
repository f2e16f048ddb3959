"""Which cells a run has, which of them are skipped, and what is an error."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from bench.cells import Cell, plan
from bench.options import BenchConfig
from bench.pairs import Pair

MakeConfig = Callable[..., BenchConfig]


def test_every_gamma_is_a_cell_and_plain_decoding_is_one(make_config: MakeConfig) -> None:
    cells = [each.cell for each in plan(make_config())]
    assert [(cell.engine, cell.method, cell.gamma) for cell in cells] == [
        (engine, method, gamma)
        for engine in ("specdec", "transformers")
        for method, gamma in (("autoregressive", 0), ("draft_model", 2), ("draft_model", 4))
    ]
    assert cells[0].id == "specdec-tiny-random-autoregressive-0-same-smoke-1"


def test_what_cannot_run_is_skipped_once_with_reason_and_remedy(make_config: MakeConfig) -> None:
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
            "methods=ngram_store is asked for and must be able to run, but engine=transformers has no method=ngram",
        ),
        (
            {"batch_sizes": (4,), "named": frozenset({"engines"})},
            "engines=transformers is asked for .* decodes at most 1 prompt at a time, not batch_size=4; use",
        ),
        ({"batch_sizes": (4,), "engines": ("transformers",)}, "no cell can run: engine=transformers decodes at most"),
    ],
)
def test_what_is_asked_for_by_name_and_cannot_run_is_an_error(
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
