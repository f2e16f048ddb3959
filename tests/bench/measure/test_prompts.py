"""Prompts of a run: reading, encoding, and the selection for each cell."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from bench.campaign.config import BenchConfig
from bench.campaign.plan import plan
from bench.catalogue.pairs import Pair
from bench.measure.prompts import Prompts
from bench.measure.quality import sandbox
from bench.records.schema import Cell
from bench.workloads.base import bucket

DATA = Path(__file__).parents[1] / "data"
RANDOM = Pair("p", "t", load_format="dummy")  # whose prompts are bytes without a tokenizer


def test_a_quality_score_needs_a_tokenizer(make_config: Callable[..., BenchConfig]) -> None:
    config = make_config(workloads=("humaneval",), data_dir=DATA, num_prompts=2)
    cell = Cell("specdec", "p", "autoregressive", 0, "same", "humaneval", 1)
    with pytest.raises(pytest.fail.Exception, match="pair=p must have a tokenizer to read prompts; name a target with"):
        Prompts(config).chosen(cell, Pair("p", "t"), None)


def test_lengths_are_counted_in_tokens(make_config: Callable[..., BenchConfig], tmp_path: Path) -> None:
    path = tmp_path / "mine.txt"
    path.write_text("".join("x" * length + "\n" for length in range(1, 21)))
    config = make_config(workloads=(str(path),), prompt_lengths=((5, 8),), num_prompts=4)
    prompts = Prompts(config)
    cell = Cell("specdec", "p", "autoregressive", 0, "same", "mine", 1)
    chosen = prompts.chosen(cell, RANDOM, None)
    assert sorted(len(tokens) for _, tokens in chosen) == [5, 6, 7, 8]
    assert [bytes(tokens).decode() for _, tokens in chosen] == [prompt.text for prompt, _ in chosen]
    narrow = Prompts(make_config(workloads=(str(path),), prompt_lengths=((5, 6),), num_prompts=4))
    with pytest.raises(
        pytest.fail.Exception, match=r"prompt_lengths=5:6 must hold for at least num_prompts=4 .* for 2"
    ):
        narrow.chosen(cell, RANDOM, None)


def test_each_bucket_of_lengths_is_a_cell_with_its_own_prompts(
    make_config: Callable[..., BenchConfig], tmp_path: Path
) -> None:
    path = tmp_path / "mine.txt"
    path.write_text("".join("x" * length + "\n" for length in range(1, 21)))
    config = make_config(
        engines=("specdec",),
        methods=("autoregressive",),
        workloads=(str(path),),
        prompt_lengths=((3, 5), (9, 12)),
        num_prompts=3,
    )
    prompts = Prompts(config)
    cells = [each.cell for each in plan(config)]
    assert [cell.workload for cell in cells] == ["mine@3:5", "mine@9:12"]
    lengths = [[len(tokens) for _, tokens in prompts.chosen(cell, RANDOM, None)] for cell in cells]
    assert sorted(lengths[0]) == [3, 4, 5]
    assert len(set(lengths[1]) & {9, 10, 11, 12}) == 3
    assert bucket("a@b@3:5", config.prompt_lengths) == ("a@b", (3, 5))
    assert bucket("a@3:5", ((1, 2),)) == ("a@3:5", (1, 2))


def test_raw_prompts_are_texts_to_go_on_with(make_config: Callable[..., BenchConfig]) -> None:
    config = make_config(workloads=("humaneval",), data_dir=DATA, prompt_format="raw", num_prompts=2)
    cell = Cell("specdec", "p", "autoregressive", 0, "same", "humaneval", 1)
    for prompt, tokens in Prompts(config).chosen(cell, RANDOM, None):
        assert bytes(tokens).decode() == prompt.raw == prompt.truth.head
    asked = make_config(workloads=("humaneval",), data_dir=DATA, num_prompts=2, named=frozenset({"prompt_format"}))
    with pytest.raises(
        pytest.fail.Exception, match="prompt_format=instruct must have a tokenizer with a chat template"
    ):
        Prompts(asked).chosen(cell, RANDOM, None)


def test_a_machine_that_cannot_shut_code_in_refuses(
    make_config: Callable[..., BenchConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sandbox, "why_not", lambda: "unshare: Operation not permitted")
    config = make_config(workloads=("humaneval",), data_dir=DATA, num_prompts=2, allow_code_execution=True)
    with pytest.raises(ValueError, match="allow_code_execution=1 must have a working sandbox, but unshare: Oper"):
        Prompts(config)
    Prompts(make_config(workloads=("gsm8k",), data_dir=DATA, num_prompts=2, allow_code_execution=True))
