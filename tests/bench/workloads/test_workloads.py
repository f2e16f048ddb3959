"""Readers of prompts: what they take, and how they name a malformed row."""

from __future__ import annotations

import gzip
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from bench.campaign.config import BenchConfig
from bench.measure.prompts import Prompts
from bench.workloads import random_tokens, registry
from bench.workloads.base import Malformed, Number, Prompt, Summary, UnavailableError, turns_of
from bench.workloads.sets import sharegpt

DATA = Path(__file__).parents[1] / "data"
GSM8K_ROWS = [{"question": "1 + 1?", "answer": "#### 2"}, {"question": "1 + 2?", "answer": "so\n#### 3"}]


def write_rows(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_a_text_file_has_one_prompt_a_line(tmp_path: Path) -> None:
    path = tmp_path / "mine.txt"
    path.write_text("first\n\n  second \n")
    assert registry.read(str(path), None) == [Prompt("first"), Prompt("  second ")]
    assert registry.label(str(path)) == "mine"


@pytest.mark.parametrize("name", ["mine.txt", "mine.jsonl"])
def test_a_byte_order_mark_is_no_text(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    lines = {"mine.txt": "one\ntwo\n", "mine.jsonl": '{"prompt": "one"}\n{"prompt": "two"}\n'}
    path.write_text(lines[name], encoding="utf-8-sig")
    assert [prompt.text for prompt in registry.read(str(path), None)] == ["one", "two"]


def test_only_a_line_feed_ends_a_prompt(tmp_path: Path) -> None:
    """Separators that str.splitlines knows are text; a carriage return before the line feed is not."""
    inside = "a\u2028b\u2029c\x85d\x0be\x0cf\x1cg"
    path = tmp_path / "mine.txt"
    path.write_bytes(f"{inside}\r\nsecond\n".encode())
    assert [prompt.text for prompt in registry.read(str(path), None)] == [inside, "second"]
    write_rows(tmp_path / "mine.jsonl", {"prompt": inside}, {"prompt": "second"})
    assert [prompt.text for prompt in registry.read(str(tmp_path / "mine.jsonl"), None)] == [inside, "second"]


def test_halves_of_characters_are_malformed(tmp_path: Path) -> None:
    """JSON may hold them, and no tokenizer takes them: a row is named, not every cell lost."""
    path = write_rows(tmp_path / "mine.jsonl", {"prompt": "a\ud800b"}, {"prompt": "b \U0001f600"})
    with pytest.raises(ValueError, match=r"mine\.jsonl:1: prompt='a\\ud800b' must not contain an unpaired surrogate"):
        registry.read(str(path), None)
    assert registry.read(str(path), None, Malformed("skip")) == [Prompt("b \U0001f600")]
    path = write_rows(tmp_path / "category.jsonl", {"prompt": "a", "category": "\ud800"})
    with pytest.raises(ValueError, match=r"category\.jsonl:1: category='\\ud800' must not contain an unpaired"):
        registry.read(str(path), None)
    turns = [{"from": "human", "value": "\udfff"}, {"from": "gpt", "value": "x"}]
    write_rows(tmp_path / "sharegpt_gpt4.jsonl", {"conversations": turns})
    with pytest.raises(ValueError, match=r"gpt4\.jsonl:1: value='\\udfff' must not contain an unpaired"):
        registry.read("sharegpt", tmp_path)


def test_dialogues_that_begin_with_another_speaker_are_counted(tmp_path: Path) -> None:
    question, answer = {"from": "human", "value": "Why?"}, {"from": "gpt", "value": "So."}
    rows = [[answer, question], [question, answer], [{"from": "system", "value": "Be brief."}, question, answer], []]
    write_rows(tmp_path / "sharegpt_gpt4.jsonl", *({"conversations": row} for row in rows))
    malformed = Malformed()
    assert registry.read("sharegpt", tmp_path, malformed) == [Prompt("Why?", "gpt4")]
    assert [place.rpartition(":")[2] for place in malformed.passed_over] == ["1", "3", "4"]
    assert not malformed.skipped


def test_json_lines_have_a_prompt_and_perhaps_a_category(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "mine.jsonl", {"prompt": "a", "category": "x"}, {"prompt": "b"})
    assert registry.read(str(path), None) == [Prompt("a", "x"), Prompt("b")]


def test_gsm8k_asks_the_question(tmp_path: Path) -> None:
    write_rows(tmp_path / "gsm8k-test.jsonl", {"question": "1 + 1?", "answer": "#### 2"})
    (prompt,) = registry.read("gsm8k", tmp_path)
    assert (prompt.text, prompt.category, prompt.truth) == ("1 + 1?", "mathematics", Number("2"))


def test_the_fixtures_are_read_whole() -> None:
    assert [prompt.truth for prompt in registry.read("gsm8k", DATA)] == [Number("42"), Number("1,750"), Number("-5")]
    assert [prompt.truth.entry_point for prompt in registry.read("humaneval", DATA)] == ["half", "fourfold"]
    article = registry.read("xsum", DATA)[0]
    assert article.truth == Summary("A lorry has damaged a bridge.")
    assert article.text.startswith("Summarize this article in one sentence.\n\nThe bridge")
    assert article.raw.startswith("The bridge")
    assert article.raw.endswith("\n\nSummary:")
    (news,) = registry.read("cnn_dailymail", DATA)
    assert news.text.startswith("summarize: The bridge over the river")
    assert news.truth == Summary("A lorry has damaged a bridge.")
    assert [prompt.text for prompt in registry.read("wmt14", DATA)] == [
        "translate English to German: The bridge is closed.",
        "translate English to German: Pupils have planted trees.",
    ]
    assert {prompt.category for prompt in registry.read("spec_bench", DATA)} == {"qa", "multi_turn", "rag"}


@pytest.mark.parametrize("layout", ["main/test-00000-of-00001.parquet", "gsm8k/main/test-00000-of-00001.parquet"])
def test_parquet_in_the_layout_of_the_hub(layout: str, tmp_path: Path) -> None:
    write_parquet(tmp_path / layout, GSM8K_ROWS)
    assert [prompt.truth for prompt in registry.read("gsm8k", tmp_path)] == [Number("2"), Number("3")]


def test_a_malformed_row_of_parquet_is_named(tmp_path: Path) -> None:
    write_parquet(tmp_path / "xsum.parquet", [{"document": "d", "summary": "s"}, {"document": "d", "summary": ""}])
    with pytest.raises(ValueError, match=r"xsum\.parquet:row 2: summary='' must be a non-empty string"):
        registry.read("xsum", tmp_path)
    assert len(registry.read("xsum", tmp_path, Malformed("skip"))) == 1
    (tmp_path / "xsum.parquet").write_bytes(b"PAR1 no more")
    with pytest.raises(ValueError, match=r"xsum\.parquet: must be a whole Parquet file"):
        registry.read("xsum", tmp_path)


def write_parquet(path: Path, rows: list[dict[str, Any]]) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pyarrow.Table.from_pylist(rows), path)


def test_parquet_without_pyarrow_names_the_package_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "gsm8k.parquet").touch()
    with pytest.raises(UnavailableError, match=r"must be read with pyarrow .*pip install pyarrow"):
        registry.read("gsm8k", tmp_path)


def test_sharegpt_asks_first_questions_and_each_file_is_a_category(tmp_path: Path) -> None:
    tides, chinese = Prompt("How do tides work?", "gpt4"), Prompt("潮汐是怎么形成的？", "zh_38K")
    assert registry.read("sharegpt", DATA) == [tides, chinese]
    assert registry.read("sharegpt:zh_38K", DATA) == [chinese]
    write_rows(tmp_path / "sharegpt_V3_format.jsonl", {"conversations": [{"from": "human"}]})
    with pytest.raises(ValueError, match=r"V3_format\.jsonl:1: conversations must be a list of objects with `from`"):
        registry.read("sharegpt", tmp_path)


def test_the_wheels_json_is_cut_off_inside_its_last_record(tmp_path: Path) -> None:
    turns = [{"from": "human", "value": "Why {so}?"}, {"from": "gpt", "value": "Well."}]
    whole = json.dumps([{"id": number, "conversations": turns} for number in range(3)], indent=1)
    path = tmp_path / "ShareGPT_V3_unfiltered_cleaned_split.json"
    path.write_text(whole)
    assert registry.read("sharegpt", tmp_path) == 3 * [Prompt("Why {so}?", "V3_unfiltered")]
    path.write_text(whole[:-40])
    with pytest.raises(ValueError, match="json:record 3: must be complete, but the file is damaged or truncated there"):
        registry.read("sharegpt", tmp_path)
    malformed = Malformed("skip")
    assert len(registry.read("sharegpt", tmp_path, malformed)) == 2
    assert len(malformed.skipped) == 1


def test_sharegpt_without_a_file_comes_from_the_wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from specdec.distill.prompts import Dialogue
    from specdec.runtime.artifacts import LoadError

    monkeypatch.setattr(sharegpt, "read_dialogues", lambda source: [Dialogue(source)])
    assert registry.read("sharegpt", None) == [Prompt("sharegpt", "V3_unfiltered")]

    def fail(source: str) -> None:
        raise LoadError("no network")

    monkeypatch.setattr(sharegpt, "read_dialogues", fail)
    with pytest.raises(
        UnavailableError, match=r"workloads=sharegpt: no network; or put sharegpt_gpt4.jsonl, .*--data-d"
    ):
        registry.read("sharegpt", tmp_path)


def fake_hub(monkeypatch: pytest.MonkeyPatch, load: Callable[..., Any]) -> SimpleNamespace:
    """Stands in for `datasets`; the hub cannot be reached."""

    def unreachable(*arguments: Any, **options: Any) -> None:
        raise OSError("no network")

    config = SimpleNamespace(HF_HUB_OFFLINE=False)
    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load, config=config))
    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", unreachable)
    return config


def test_without_a_folder_rows_come_from_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    config = fake_hub(
        monkeypatch, lambda *names, **options: asked.append((names, options, config.HF_HUB_OFFLINE)) or GSM8K_ROWS
    )
    assert [prompt.truth for prompt in registry.read("gsm8k", None)] == [Number("2"), Number("3")]
    assert asked == [(("openai/gsm8k", "main"), {"split": "test", "revision": None}, True)]
    fake_hub(monkeypatch, lambda *names, **options: [{"document": "d", "summary": 3}])
    with pytest.raises(ValueError, match="EdinburghNLP/xsum:row 1: summary=3 must be a non-empty string"):
        registry.read("xsum", None)


def test_a_translation_without_its_source_is_malformed(tmp_path: Path) -> None:
    for row, message in [
        ({"translation": "x"}, "translation='x' must be an object with `en`; correct or remove the row"),
        ({"translation": {"de": "x"}}, "en=None must be a non-empty string"),
    ]:
        write_rows(tmp_path / "wmt14.jsonl", row)
        with pytest.raises(ValueError, match=rf"wmt14\.jsonl:1: {message}"):
            registry.read("wmt14", tmp_path)


@pytest.mark.parametrize("workload", ["gsm8k", "xsum", "cnn_dailymail", "wmt14"])
def test_an_unreachable_hub_names_the_remedy(workload: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*names: Any, **options: Any) -> None:
        raise ConnectionError("offline\nand more")

    fake_hub(monkeypatch, fail)
    remedy = rf"connect to the network, or put it into a folder as {workload}\*\.jsonl and name that with --data-dir"
    with pytest.raises(
        UnavailableError, match=rf"workloads={workload} must be downloaded from the hub once \(offline\); {remedy}"
    ):
        registry.read(workload, None)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UnavailableError, match=r"with datasets \(.*pip install datasets, or put it into a fol"):
        registry.read(workload, None)


def test_malformed_rows_are_skipped_only_on_request_and_counted(
    tmp_path: Path, make_config: Callable[..., BenchConfig]
) -> None:
    rows = ['{"prompt": "a"}', "{broken", '{"prompt": 3}', "[1]", '{"prompt": "b"}']
    path = tmp_path / "mine.jsonl"
    path.write_text("\n".join(rows))
    malformed = Malformed("skip")
    assert registry.read(str(path), None, malformed) == [Prompt("a"), Prompt("b")]
    assert [reason.partition("mine.jsonl:")[2].partition(":")[0] for reason in malformed.skipped] == ["2", "3", "4"]
    config = make_config(workloads=(str(path),), malformed="skip", num_prompts=2)
    assert len(Prompts(config).malformed["mine"].skipped) == 3
    with pytest.raises(ValueError, match=r"mine\.jsonl:2: must be one JSON object per line"):
        Prompts(make_config(workloads=(str(path),), num_prompts=2))
    path.write_text("{broken")
    with pytest.raises(
        ValueError, match=r"must have at least one prompt, .* all are malformed, such as .*mine\.jsonl:1"
    ):
        registry.read(str(path), None, Malformed("skip"))


@pytest.mark.parametrize("answer", ["7", "#### none", "####", "#### ²", "#### 5 or 6"])
def test_an_answer_without_its_number_is_malformed(answer: str, tmp_path: Path) -> None:
    write_rows(tmp_path / "gsm8k.jsonl", {"question": "?", "answer": answer})
    with pytest.raises(ValueError, match=r"gsm8k\.jsonl:1: answer='.*' must end in #### and a number"):
        registry.read("gsm8k", tmp_path)


def test_spec_bench_has_the_first_turn_and_the_later_ones(tmp_path: Path) -> None:
    write_rows(tmp_path / "spec-bench.jsonl", {"question_id": 1, "category": "qa", "turns": ["Who?", "Why?"]})
    assert registry.read("spec_bench", tmp_path) == [Prompt("Who?", "qa", later=("Why?",))]


def test_translations_and_summaries_of_spec_bench_are_scored_by_their_reference(tmp_path: Path) -> None:
    kinds = ["translation", "summarization", "qa"]
    rows = ({"category": kind, "turns": ["?"], "reference": [f"{kind}!"]} for kind in kinds)
    write_rows(tmp_path / "spec-bench.jsonl", *rows)
    truths = [prompt.truth for prompt in registry.read("spec_bench", tmp_path)]
    assert truths == [Summary("translation!"), Summary("summarization!"), None]


@pytest.mark.parametrize("reference", [[], ["a", "b"], "a", [""], [3], None])
def test_another_reference_is_malformed(reference: Any, tmp_path: Path) -> None:
    write_rows(tmp_path / "spec-bench.jsonl", {"category": "translation", "turns": ["?"], "reference": reference})
    with pytest.raises(ValueError, match=r"spec-bench\.jsonl:1: reference=.* must be a list of one text"):
        registry.read("spec_bench", tmp_path)


def test_one_category_can_be_selected(tmp_path: Path) -> None:
    """MT-bench's kinds are one of Spec-Bench's six."""
    kinds = ["qa", "writing", "rag", "coding"]
    write_rows(tmp_path / "spec-bench.jsonl", *({"category": kind, "turns": [f"{kind}?"]} for kind in kinds))
    assert registry.read("spec_bench:rag", tmp_path) == [Prompt("rag?", "rag")]
    both = [Prompt("writing?", "multi_turn"), Prompt("coding?", "multi_turn")]
    assert registry.read("spec_bench:multi_turn", tmp_path) == both
    assert registry.parse_workloads("workloads", "spec_bench:rag,spec_bench:qa") == ("spec_bench:rag", "spec_bench:qa")
    assert registry.label("spec_bench:rag") == "spec_bench:rag"
    with pytest.raises(ValueError, match="workloads=spec_bench:x must name a category of spec_bench; it has multi_tu"):
        registry.read("spec_bench:x", tmp_path)


def test_humaneval_is_read_from_the_data_folder_first(tmp_path: Path) -> None:
    with gzip.open(tmp_path / "HumanEval.jsonl.gz", "wt") as stream:
        stream.write(json.dumps({"prompt": "def f():\n", "test": "def check(f): f()", "entry_point": "f"}) + "\n")
    (prompt,) = registry.read("humaneval", tmp_path)
    assert prompt.text.endswith("```python\ndef f():\n```")


@pytest.mark.parametrize("workload", ["gsm8k", "spec_bench"])
def test_a_missing_data_set_names_the_searched_paths(workload: str, tmp_path: Path) -> None:
    with pytest.raises(UnavailableError, match=f"workloads={workload} must have one file .*--data-dir"):
        registry.read(workload, tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"prompt": "x"}\n{"prompt": 3}\n', r"a\.jsonl:2: prompt=3 must be a non-empty string"),
        ("a.jsonl", '{"prompt": " "}\n', r"a\.jsonl:1: prompt=' ' must be a non-empty string"),
        ("a.jsonl", '{"prompt": "x"}\n{"pro', r"a\.jsonl:2: must be one JSON object per line"),
        ("a.jsonl", "[1]\n", r"a\.jsonl:1: '\[1\]' must be a JSON object"),
        ("a.gz", "not gzipped", r"a\.gz: must be a complete UTF-8 text file"),
        ("a.txt", "\n", r"a\.txt must have at least one prompt, but its data have none"),
    ],
)
def test_a_malformed_row_is_named_by_file_and_line(name: str, content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        registry.read(str(tmp_path / name), None)


def test_spec_bench_without_turns_is_malformed(tmp_path: Path) -> None:
    write_rows(tmp_path / "spec_bench.jsonl", {"category": "qa", "turns": []})
    with pytest.raises(ValueError, match=r"spec_bench\.jsonl:1: turns=\[\] must be a list"):
        registry.read("spec_bench", tmp_path)


def test_the_sample_depends_on_the_seed_alone() -> None:
    prompts = [Prompt(str(number)) for number in range(50)]
    assert registry.sample(prompts, 8, 1) == registry.sample(prompts, 8, 1) != registry.sample(prompts, 8, 2)
    assert len(set(registry.sample(prompts, 50, 0))) == 50


@pytest.mark.parametrize("layout", ["qualitative", "speed/qualitative", "data/speed/qualitative"])
@pytest.mark.parametrize("kind", ["parquet", "jsonl"])
def test_speed_bench_is_read_from_the_folder_of_its_script(layout: str, kind: str, tmp_path: Path) -> None:
    """Files as prepare_data.py writes them, with the columns that are used and one that is not."""
    rows = [
        {"question_id": "q1", "category": "coding", "turns": ["Write it.", "Test it."]},
        {"question_id": "q2", "category": "rag", "turns": ["Who?"]},
    ]
    folder = tmp_path / layout
    folder.mkdir(parents=True)
    if kind == "parquet":
        pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "test.parquet")
    else:
        write_rows(folder / "test.jsonl", *rows)
    first, second = registry.read("speed_bench", tmp_path)
    assert (first.text, first.category, first.later) == ("Write it.", "coding", ("Test it.",))
    assert second == Prompt("Who?", "rag")
    assert registry.read("speed_bench:rag", tmp_path) == [second]
    with pytest.raises(UnavailableError, match="workloads=speed_bench_8k must have one file throughput_8k/test"):
        registry.read("speed_bench_8k", tmp_path)


def test_speed_bench_with_texts_to_fetch_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "throughput_2k"
    folder.mkdir()
    placeholder = "FULL BENCHMARK DATA SHOULD BE FETCHED FROM THE SOURCE USING SPECDEC_BENCH"
    write_rows(folder / "test.jsonl", {"category": "mixed", "turns": [placeholder]})
    with pytest.raises(ValueError, match=r"test\.jsonl:1: turns must be complete, .* run prepare_data\.py"):
        registry.read("speed_bench_2k", tmp_path)


@pytest.mark.parametrize(
    ("turns", "message"),
    [
        ([], r"turns=\[\] must be a list with a question"),
        ("Q", "turns='Q' must be a list"),
        (["Q", ""], r"turns\[1\]='' must be a non-empty string"),
    ],
)
def test_conversations_without_questions_are_malformed(turns: Any, message: str, tmp_path: Path) -> None:
    path = write_rows(tmp_path / "mt_bench.jsonl", {"category": "writing", "turns": turns})
    with pytest.raises(ValueError, match=rf"{path.name}:1: {message}"):
        registry.read("mt_bench", tmp_path)


def test_turns_of_a_conversation_are_prompts() -> None:
    prompt = Prompt("a", "x", truth=Number("1"), later=("b", "c"))
    first, second, third = turns_of(prompt)
    assert (first.turn, first.truth, first.later) == (1, Number("1"), ())
    assert (second.text, second.earlier, second.turn, second.truth) == ("b", ("a",), 2, None)
    assert (third.text, third.earlier, third.category) == ("c", ("a", "b"), "x")


def test_mooncake_rows_are_requests_of_a_trace(tmp_path: Path) -> None:
    """Milliseconds, and blocks of 512 tokens by their ids: the second request begins as the first."""
    rows = [
        {"timestamp": 0, "input_length": 600, "output_length": 5, "hash_ids": [7, 8]},
        {"timestamp": 1500, "input_length": 1000, "output_length": 3, "hash_ids": [7, 9]},
        {"arrival_s": 2.5, "input_length": 4, "output_length": 2},
    ]
    path = write_rows(tmp_path / "calls.jsonl", *rows)
    prompts = registry.read(str(path), None)
    assert [(prompt.arrival_s, prompt.max_tokens) for prompt in prompts] == [(0.0, 5), (1.5, 3), (2.5, 2)]
    first, second, third = (random_tokens.draw(prompt.drawn, range(100)) for prompt in prompts)
    assert [len(tokens) for tokens in (first, second, third)] == [600, 1000, 4]
    assert first[:512] == second[:512]
    assert first[512:] != second[512:600]
    assert len({prompt.text for prompt in prompts}) == 3  # the digest of a run's prompts is of texts


TIMED = {"output_length": 1, "timestamp": 0}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"input_length": 0, "output_length": 1, "timestamp": 0}, "input_length=0 must be an integer of at least 1"),
        ({"input_length": 5, "timestamp": 0}, "output_length=None must be an integer of at least 1"),
        ({"input_length": 5, "output_length": 1}, "timestamp=None must be a number >= 0"),
        ({"input_length": 5, "output_length": 1, "arrival_s": -1}, "arrival_s=-1 must be a number >= 0"),
        ({**TIMED, "input_length": 513, "hash_ids": [1]}, "hash_ids must be one for each 512 of the 513"),
        ({**TIMED, "input_length": 5, "hash_ids": ["a"]}, "hash_ids=.* must be a list of integers"),
    ],
)
def test_malformed_requests_of_a_trace_are_named(row: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = write_rows(tmp_path / "calls.jsonl", row)
    with pytest.raises(ValueError, match=rf"calls\.jsonl:1: {message}"):
        registry.read(str(path), None)
