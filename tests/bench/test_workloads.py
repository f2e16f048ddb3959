"""Readers of prompts: what they take, and how they name a malformed row."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from bench import workloads
from bench.workloads import Prompt, UnavailableError


def write_rows(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_a_text_file_has_one_prompt_a_line(tmp_path: Path) -> None:
    path = tmp_path / "mine.txt"
    path.write_text("first\n\n  second \n")
    assert workloads.read(str(path), None) == [Prompt("first"), Prompt("  second ")]
    assert workloads.label(str(path)) == "mine"


def test_json_lines_have_a_prompt_and_perhaps_a_category(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "mine.jsonl", {"prompt": "a", "category": "x"}, {"prompt": "b"})
    assert workloads.read(str(path), None) == [Prompt("a", "x"), Prompt("b")]


def test_gsm8k_asks_the_question(tmp_path: Path) -> None:
    write_rows(tmp_path / "gsm8k-test.jsonl", {"question": "1 + 1?", "answer": "#### 2"})
    assert workloads.read("gsm8k", tmp_path) == [Prompt("1 + 1?", "mathematics")]


def test_spec_bench_asks_the_first_turn(tmp_path: Path) -> None:
    write_rows(tmp_path / "spec-bench.jsonl", {"question_id": 1, "category": "qa", "turns": ["Who?", "Why?"]})
    assert workloads.read("spec_bench", tmp_path) == [Prompt("Who?", "qa")]


def test_one_category_can_be_asked_for(tmp_path: Path) -> None:
    """MT-bench's kinds are one of Spec-Bench's six."""
    kinds = ["qa", "writing", "rag", "coding"]
    write_rows(tmp_path / "spec-bench.jsonl", *({"category": kind, "turns": [f"{kind}?"]} for kind in kinds))
    assert workloads.read("spec_bench:rag", tmp_path) == [Prompt("rag?", "rag")]
    both = [Prompt("writing?", "multi_turn"), Prompt("coding?", "multi_turn")]
    assert workloads.read("spec_bench:multi_turn", tmp_path) == both
    assert workloads.parse_workloads("workloads", "spec_bench:rag,spec_bench:qa") == ("spec_bench:rag", "spec_bench:qa")
    assert workloads.label("spec_bench:rag") == "spec_bench:rag"
    with pytest.raises(ValueError, match="workloads=spec_bench:x must name a category of spec_bench; it has multi_tu"):
        workloads.read("spec_bench:x", tmp_path)


def test_humaneval_is_read_from_the_data_folder_first(tmp_path: Path) -> None:
    with gzip.open(tmp_path / "HumanEval.jsonl.gz", "wt") as stream:
        stream.write(json.dumps({"task_id": "HumanEval/0", "prompt": "def f():\n"}) + "\n")
    (prompt,) = workloads.read("humaneval", tmp_path)
    assert prompt.text.endswith("```python\ndef f():\n```")


@pytest.mark.parametrize("workload", ["gsm8k", "spec_bench"])
def test_a_missing_data_set_says_where_it_was_looked_for(workload: str, tmp_path: Path) -> None:
    with pytest.raises(UnavailableError, match=f"workloads={workload} must have one file .*--data-dir"):
        workloads.read(workload, tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"prompt": "x"}\n{"prompt": 3}\n', r"a\.jsonl:2: prompt=3 must be a text"),
        ("a.jsonl", '{"prompt": " "}\n', r"a\.jsonl:1: prompt=' ' must be a text that is not empty"),
        ("a.jsonl", '{"prompt": "x"}\n{"pro', r"a\.jsonl:2: must be one JSON object a line"),
        ("a.jsonl", "[1]\n", r"a\.jsonl:1: '\[1\]' must be a JSON object"),
        ("a.gz", "not gzipped", r"a\.gz: must be a whole file"),
        ("a.txt", "\n", r"a\.txt: must hold at least one prompt"),
    ],
)
def test_a_malformed_row_is_named_by_file_and_line(name: str, content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        workloads.read(str(tmp_path / name), None)


def test_spec_bench_without_turns_is_malformed(tmp_path: Path) -> None:
    write_rows(tmp_path / "spec_bench.jsonl", {"category": "qa", "turns": []})
    with pytest.raises(ValueError, match=r"spec_bench\.jsonl:1: turns=\[\] must be a list"):
        workloads.read("spec_bench", tmp_path)


def test_the_sample_depends_on_the_seed_alone() -> None:
    prompts = [Prompt(str(number)) for number in range(50)]
    assert workloads.sample(prompts, 8, 1) == workloads.sample(prompts, 8, 1) != workloads.sample(prompts, 8, 2)
    assert len(set(workloads.sample(prompts, 50, 0))) == 50
